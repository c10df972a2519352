"""The documented code examples of SanaPipeline, run as they are printed but for four substitutions.

`sana` stands for `diffusers`, a small random checkpoint for the hub id, the CPU for CUDA, and the lines that quantise
with bitsandbytes, which needs CUDA, are left out.
"""

import sys
import types
from pathlib import Path

import pytest
from PIL import Image

import sana

FROM_THE_REFERENCE_DOCUMENTATION = """
import torch
from diffusers import SanaPipeline

pipe = SanaPipeline.from_pretrained(
    "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers", torch_dtype=torch.float32
)
pipe.to("cuda")
pipe.text_encoder.to(torch.bfloat16)
pipe.transformer = pipe.transformer.to(torch.bfloat16)

image = pipe(prompt='a cyberpunk cat with a neon sign that says "Sana"')[0]
image[0].save("output.png")
"""

FROM_THE_README = """
import torch
from diffusers import SanaPipeline

pipe = SanaPipeline.from_pretrained(
    "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers",
    variant="bf16",
    torch_dtype=torch.bfloat16,
)
pipe.to("cuda")

pipe.vae.to(torch.bfloat16)
pipe.text_encoder.to(torch.bfloat16)

prompt = 'a cyberpunk cat with a neon sign that says "Sana"'
image = pipe(
    prompt=prompt,
    height=1024,
    width=1024,
    guidance_scale=4.5,
    num_inference_steps=20,
    generator=torch.Generator(device="cuda").manual_seed(42),
)[0]

image[0].save("output.png")
"""

FROM_THE_MODEL_CARD = """
import torch
from diffusers import SanaPipeline

pipe = SanaPipeline.from_pretrained(
    "Efficient-Large-Model/Sana_1600M_1024px_diffusers",
    variant="fp16",
    torch_dtype=torch.float16,
)
pipe.to("cuda")

pipe.vae.to(torch.bfloat16)
pipe.text_encoder.to(torch.bfloat16)

prompt = 'A cute 🐼 eating 🎋, ink drawing style'
image = pipe(
    prompt=prompt,
    height=1024,
    width=1024,
    guidance_scale=4.5,
    num_inference_steps=20,
    generator=torch.Generator(device="cuda").manual_seed(42),
)[0]

image[0].save("output.png")
"""

QUANTISED = """
import torch
from diffusers import BitsAndBytesConfig as DiffusersBitsAndBytesConfig, SanaTransformer2DModel, SanaPipeline
from transformers import BitsAndBytesConfig as BitsAndBytesConfig, AutoModel

quant_config = BitsAndBytesConfig(load_in_8bit=True)
text_encoder_8bit = AutoModel.from_pretrained(
    "Efficient-Large-Model/Sana_1600M_1024px_diffusers",
    subfolder="text_encoder",
    quantization_config=quant_config,
    torch_dtype=torch.float16,
)

quant_config = DiffusersBitsAndBytesConfig(load_in_8bit=True)
transformer_8bit = SanaTransformer2DModel.from_pretrained(
    "Efficient-Large-Model/Sana_1600M_1024px_diffusers",
    subfolder="transformer",
    quantization_config=quant_config,
    torch_dtype=torch.float16,
)

pipeline = SanaPipeline.from_pretrained(
    "Efficient-Large-Model/Sana_1600M_1024px_diffusers",
    text_encoder=text_encoder_8bit,
    transformer=transformer_8bit,
    torch_dtype=torch.float16,
    device_map="balanced",
)

prompt = "a tiny astronaut hatching from an egg on the moon"
image = pipeline(prompt).images[0]
image.save("output.png")
"""


def adapted(snippet: str, folder: Path) -> str:
    for hub_id in ("Sana_1600M_1024px_BF16_diffusers", "Sana_1600M_1024px_diffusers"):
        snippet = snippet.replace(f'"Efficient-Large-Model/{hub_id}"', repr(str(folder)))
    snippet = snippet.replace("from diffusers import", "from sana import").replace('"cuda"', '"cpu"')
    snippet = snippet.replace('"balanced"', '"cpu"')
    snippet = snippet.replace("BitsAndBytesConfig as DiffusersBitsAndBytesConfig, ", "")
    snippet = snippet.replace("BitsAndBytesConfig as BitsAndBytesConfig, ", "")
    kept = [line for line in snippet.splitlines() if "quant" not in line]
    return "\n".join(kept)


@pytest.mark.parametrize(
    "snippet",
    [FROM_THE_REFERENCE_DOCUMENTATION, FROM_THE_README, FROM_THE_MODEL_CARD, QUANTISED],
    ids=["documentation", "readme", "model-card", "quantised"],
)
@pytest.mark.filterwarnings("ignore:.*torch_dtype.*")
def test_snippet(snippet: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = adapted(snippet, tiny_folder)
    assert "diffusers" not in code
    space: dict[str, object] = {}
    exec(compile(code, "snippet", "exec"), space)
    with Image.open(tmp_path / "output.png") as picture:
        assert picture.size == (1024, 1024)
        assert picture.mode == "RGB"
        assert len(set(picture.convert("L").get_flattened_data())) > 30, "a flat picture would prove nothing"


def test_every_name_that_the_snippets_import_is_exported() -> None:
    for name in ("SanaPipeline", "SanaTransformer2DModel", "AutoencoderDC", "SanaPipelineOutput", "load_image"):
        assert name in sana.__all__
    assert isinstance(sys.modules["sana"], types.ModuleType)
