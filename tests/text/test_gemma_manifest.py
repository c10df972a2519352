"""The language model of the published folders has the published tensors."""

import hashlib

import torch


def test_names_shapes_and_counts_are_the_published_ones() -> None:
    from transformers import Gemma2Config, Gemma2Model

    config = Gemma2Config(
        vocab_size=256000,
        hidden_size=2304,
        intermediate_size=9216,
        num_hidden_layers=26,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
    )
    with torch.device("meta"):
        state = Gemma2Model(config).state_dict()
    lines = [f"{name}:{'x'.join(str(side) for side in tensor.shape)}" for name, tensor in sorted(state.items())]
    assert len(state) == 288
    assert sum(tensor.numel() for tensor in state.values()) == 2_614_341_888
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == "1db8515d3e46e0ed"
