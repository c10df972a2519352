"""The public class of the control branch: the pure module plus loading, saving and a start from a transformer.

Shapes: as in `sana.models.controlnet`.
"""

import dataclasses
from pathlib import Path
from typing import Any, Self

import torch

from sana.checkpoints.layout import read_json
from sana.checkpoints.pretrained import FieldMapping, GradientCheckpointing, PretrainedMixin
from sana.checkpoints.storage import write_json
from sana.config import ControlNetConfig
from sana.errors import CheckpointError, InvalidInput
from sana.models.controlnet import LinearControlNet
from sana.models.linear_dit import LinearDiT
from sana.nn.placement import placed_like

WIRING_KEY = "_sanakit_wiring"
"""Key in a control network's `config.json`, where other readers skip what begins with an underscore."""


def note_wiring(folder: Path, wiring: str) -> None:
    """Write beside a saved network how it is joined to its transformer; without a note that is as in diffusers."""
    file = folder / "config.json"
    write_json(file, {**read_json(file), WIRING_KEY: wiring})


def wiring_in(folder: Path) -> str:
    """Return how the network of a folder is joined: diffusers or native.

    Errors: CheckpointError for a note that says neither.
    """
    noted = read_json(folder / "config.json").get(WIRING_KEY, "diffusers")
    if noted not in ("diffusers", "native"):
        raise CheckpointError(
            f"{WIRING_KEY} in {folder / 'config.json'} is {noted!r:.40}; it can be diffusers or native."
        )
    return str(noted)


class ControlNetSettings(ControlNetConfig, FieldMapping):
    """`SanaControlNetModel.config`; as a mapping it has the fields that are written."""

    def _names(self) -> tuple[str, ...]:
        return tuple(self.to_dict())


class SanaControlNetModel(GradientCheckpointing, PretrainedMixin, LinearControlNet):
    """SANA's control branch; see `LinearControlNet` for its inputs and `ControlNetConfig` for its fields."""

    config_type = ControlNetSettings
    config: ControlNetSettings

    @classmethod
    def from_transformer(cls, transformer: LinearDiT, num_layers: int = 7) -> Self:
        """Make a new branch for a transformer: embedders and first blocks copied, all projections zero.

        It has the transformer's device, dtype and mode, and changes nothing until it is trained. Of a transformer that
        embeds guidance, time alone is copied.
        Errors: InvalidInput for a number of blocks that the transformer does not have.
        """
        count = len(transformer.transformer_blocks)
        if not 1 <= num_layers <= count - 1:
            raise InvalidInput(
                f"num_layers is {num_layers}; a transformer of {count} blocks takes residuals of 1 to {count - 1}."
            )
        names = {field.name for field in dataclasses.fields(ControlNetConfig)}
        fields: dict[str, Any] = {k: v for k, v in transformer.config.to_dict().items() if k in names}
        weight = transformer.scale_shift_table
        branch = placed_like(cls(**{**fields, "num_layers": num_layers}), weight)
        state = {
            name.replace("time_embed.timestep_embedder.", "time_embed.emb.timestep_embedder."): tensor
            for name, tensor in transformer.state_dict().items()
        }
        own = branch.state_dict()
        with torch.no_grad():
            for name, tensor in own.items():
                if not name.startswith(("input_block.", "controlnet_blocks.")):
                    tensor.copy_(state[name])
        return branch.train(transformer.training)
