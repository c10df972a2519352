"""What a run of the command leaves behind."""

from collections.abc import Callable
from typing import NamedTuple


class Said(NamedTuple):
    """Exit code, stdout and stderr."""

    code: int
    out: str
    err: str


Sana = Callable[..., Said]


TINY_AUTOENCODER = """\
[autoencoder.model]
latent_channels = 8
encoder_block_types = "ResBlock"
decoder_block_types = "ResBlock"
encoder_block_out_channels = [8, 8, 16, 32, 32, 32]
decoder_block_out_channels = [8, 8, 16, 32, 32, 32]
encoder_layers_per_block = [0, 1, 1, 1, 1, 1]
decoder_layers_per_block = [0, 1, 1, 1, 1, 1]
encoder_qkv_multiscales = [[], [], [], [], [], []]
decoder_qkv_multiscales = [[], [], [], [], [], []]
encoder_out_shortcut = false
decoder_in_shortcut = false
"""
"""The table of a recipe for the smallest autoencoder that there is."""
