"""A control branch in front of a transformer, as a training runs it: differentiable in everything, for any level.

Shapes: B batch, C latent channels, h w latent size, T text length, E text width, N tokens, D width.
"""

from typing import Any

from torch import Tensor

from sana.models.controlnet import LinearControlNet


class Steering:
    """A branch under texts and control pictures; what does not change with state and time is computed once."""

    def __init__(self, network: LinearControlNet, embeds: Tensor, mask: Tensor, control: Tensor) -> None:
        """Read the texts [B, T, E] with their mask [B, T] and the encoded control pictures [B, C, h, w]."""
        self.network, self.mask, self._is_native = network, mask, network.wiring == "native"
        self._kv = network.cross_attention_kv(network.encode_caption(embeds))
        self._condition = network.condition(control, positions=not self._is_native)

    def __call__(self, x: Tensor, told: Tensor) -> dict[str, Any]:
        """Return what `LinearDiT.denoise` takes beside noisy latents x [B, C, h, w]; the branch is told `told` [B]."""
        network = self.network
        modulation, grid = network.modulation(told), network.grid(x)

        def residuals(tokens: Tensor) -> tuple[Tensor, ...]:
            return network.residuals(tokens + self._condition, grid, modulation, self._kv, self.mask)

        if self._is_native:
            return {"branch": residuals}
        return {"controlnet_block_samples": residuals(network.embed(x))}
