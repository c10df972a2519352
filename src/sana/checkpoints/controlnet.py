"""The public class of the control branch: the pure module plus loading, saving and a start from a transformer.

Shapes: as in `sana.models.controlnet`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import torch

from sana.checkpoints.layout import Weights
from sana.checkpoints.pretrained import FieldMapping, GradientCheckpointing, PretrainedMixin
from sana.config import ControlNetConfig
from sana.errors import CheckpointError, InvalidInput
from sana.models.controlnet import WIRINGS, LinearControlNet
from sana.models.linear_dit import LinearDiT
from sana.nn.placement import placed_like

WIRING_KEY = "_sanakit_wiring"
"""Key in a control network's `config.json` for what is not joined as in diffusers; other readers skip names that begin
with an underscore."""


class ControlNetSettings(ControlNetConfig, FieldMapping):
    """`SanaControlNetModel.config`; as a mapping it has the fields that are written."""

    def _names(self) -> tuple[str, ...]:
        return tuple(self.to_dict())


class SanaControlNetModel(GradientCheckpointing, PretrainedMixin, LinearControlNet):
    """SANA's control branch; see `LinearControlNet` for its inputs and `ControlNetConfig` for its fields."""

    config_type = ControlNetSettings
    config: ControlNetSettings

    @classmethod
    def from_weights(cls, config: Mapping[str, Any], weights: Weights, *args: Any, **options: Any) -> Self:
        """As of `PretrainedMixin`; `wiring` is what the folder notes, without a note as in diffusers.

        Errors: CheckpointError, also for a note that is none of `WIRINGS`.
        """
        noted = config.get(WIRING_KEY, cls.wiring)
        if noted not in WIRINGS:
            where = weights.folder / "config.json"
            raise CheckpointError(f"{WIRING_KEY} in {where} is {noted!r:.40}; it can be {' or '.join(WIRINGS)}.")
        network = super().from_weights(config, weights, *args, **options)
        network.wiring = str(noted)
        return network

    def notes(self) -> dict[str, Any]:
        """See `PretrainedMixin`."""
        return {} if self.wiring == "diffusers" else {WIRING_KEY: self.wiring}

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
