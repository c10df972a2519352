"""Quantised pipelines: a configuration for all parts or for each, memory switches, and a library that is missing."""

import importlib.util
from pathlib import Path

import pytest
import torch

import sana
from sana.checkpoints.folder import save_parts
from sana.errors import InvalidInput, MissingDependency
from sana.memory import quantize
from tiny_model import make_tiny_parts

INSTALLED = importlib.util.find_spec("bitsandbytes") is not None


@pytest.mark.skipif(INSTALLED, reason="bitsandbytes is installed")
def test_without_the_library_one_sentence_says_so(tmp_path: Path) -> None:
    save_parts(tmp_path, make_tiny_parts().components)
    config = sana.BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(MissingDependency, match=r"needs bitsandbytes, which is not installed.*pip install"):
        sana.SanaPipeline.from_pretrained(tmp_path, quantization_config={"transformer": config})


def test_a_pipeline_takes_a_configuration_for_each_part(tmp_path: Path) -> None:
    save_parts(tmp_path, make_tiny_parts().components)
    given = {"transformer": sana.Int8Config(modules_to_not_convert=("attn2",))}
    pipeline = sana.SanaPipeline.from_pretrained(tmp_path, quantization_config=given, device_map={"vae": "cpu"})
    assert quantize.noted(pipeline.transformer) == given["transformer"]
    assert quantize.noted(pipeline.text_encoder) is None
    both = sana.SanaPipeline.from_pretrained(tmp_path, quantization_config="int8")
    assert quantize.noted(both.text_encoder) == sana.Int8Config()
    both.enable_sequential_cpu_offload()
    assert both.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(InvalidInput, match="disable_offload"):
        both.to("cpu")
    both.save_pretrained(tmp_path / "new")
    again = sana.SanaPipeline.from_pretrained(tmp_path / "new")
    both.disable_offload()
    pairs = zip(again.transformer.parameters(), both.transformer.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    both.to("cpu")
