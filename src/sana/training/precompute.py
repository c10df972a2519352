"""Features of a recipe's pictures and texts, computed ahead of its training and exactly as the training would."""

import torch

from sana.errors import InvalidInput
from sana.training.batches import Batches
from sana.training.config import Recipe, build
from sana.training.dataset_batches import DatasetBatches, PriorBatches
from sana.training.dataset_features import DatasetFeatures
from sana.training.objectives.flow_settings import DataSettings, FlowMatchingSettings, table
from sana.training.origins import ModelOrigin
from sana.training.processes import device_of


def features_of(recipe: Recipe, name: str) -> list[DatasetFeatures]:
    """Open what a recipe trains on and return its features, of which nothing is computed yet.

    A recipe with prior preservation has those of its prior pictures too, which are drawn first where they are missing.

    Args:
        name: what messages call the recipe.

    Raises:
        InvalidInput: the recipe does not train on pictures, or names no folder for their features.
        BadData: pictures are missing or broken.
    """
    if recipe.objective != "flow_matching":
        raise InvalidInput(
            f"{name} trains {recipe.objective}, which reads no features of pictures; name another recipe."
        )
    settings = build(FlowMatchingSettings, recipe.settings, recipe.objective)
    data = table(DataSettings, settings, "data")
    if data is None:
        raise InvalidInput(f"{name} has no [flow_matching.data]: its training computes what it needs by itself.")
    if not data.features:
        raise InvalidInput(f"{name} keeps features in memory; name a folder for them: [flow_matching.data] features.")
    device = device_of(recipe.run)
    if device.type == "cpu":
        torch.set_num_threads(recipe.run.threads)  # sums of another number of threads have other last bits
    return _all(ModelOrigin(settings, recipe.run, device, prepare=False).batches)


def _all(batches: Batches) -> list[DatasetFeatures]:
    if isinstance(batches, PriorBatches):
        return [batches.instance.features, batches.prior.features]
    assert isinstance(batches, DatasetBatches)
    return [batches.features]
