"""The documented code examples of the pipelines, run as they are printed but for some substitutions.

`sana` stands for `diffusers`, a small random checkpoint for the hub id, the CPU for CUDA, and a file for the address of
a picture. Where bitsandbytes is not installed, our own int8 takes its place.
"""

import importlib.util
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sana
from sana import SanaSprintPipeline
from tiny_model import make_tiny_sprint

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

PAG_FROM_THE_REFERENCE_DOCUMENTATION = """
import torch
from diffusers import SanaPAGPipeline

pipe = SanaPAGPipeline.from_pretrained(
    "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers",
    pag_applied_layers=["transformer_blocks.8"],
    torch_dtype=torch.float32,
)
pipe.to("cuda")
pipe.text_encoder.to(torch.bfloat16)
pipe.transformer = pipe.transformer.to(torch.bfloat16)

image = pipe(prompt='a cyberpunk cat with a neon sign that says "Sana"')[0]
image[0].save("output.png")
"""

PAG_FROM_THE_README = """
# run `pip install git+https://github.com/huggingface/diffusers` before use Sana in diffusers
import torch
from diffusers import SanaPAGPipeline

pipe = SanaPAGPipeline.from_pretrained(
  "Efficient-Large-Model/Sana_1600M_1024px_diffusers",
  variant="fp16",
  torch_dtype=torch.float16,
  pag_applied_layers="transformer_blocks.8",
)
pipe.to("cuda")

pipe.text_encoder.to(torch.bfloat16)
pipe.vae.to(torch.bfloat16)

prompt = 'a cyberpunk cat with a neon sign that says "Sana"'
image = pipe(
    prompt=prompt,
    guidance_scale=5.0,
    pag_scale=2.0,
    num_inference_steps=20,
    generator=torch.Generator(device="cuda").manual_seed(42),
)[0]
image[0].save('output.png')
"""

PAG_FROM_THE_MODEL_CARD = """
import torch
from diffusers import SanaPAGPipeline
pipe = SanaPAGPipeline.from_pretrained(
    "Efficient-Large-Model/Sana_1600M_1024px_diffusers",
    variant="fp16",
    torch_dtype=torch.float16,
    pag_applied_layers="transformer_blocks.8",
)
pipe.to("cuda")
pipe.text_encoder.to(torch.bfloat16)
pipe.vae.to(torch.bfloat16)
prompt = 'A cute 🐼 eating 🎋, ink drawing style'
image = pipe(
    prompt=prompt,
    height=1024,
    width=1024,
    guidance_scale=5.0,
    pag_scale=2.0,
    num_inference_steps=20,
    generator=torch.Generator(device="cuda").manual_seed(42),
)[0]
image[0].save('output.png')
"""

SPRINT = """
import torch
from diffusers import SanaSprintPipeline
pipe = SanaSprintPipeline.from_pretrained(
    "Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers", torch_dtype=torch.bfloat16
)
pipe.to("cuda")
image = pipe(prompt="a tiny astronaut hatching from an egg on the moon")[0]
image[0].save("output.png")
"""

SPRINT_QUANTISED = """
import torch
from diffusers import BitsAndBytesConfig as DiffusersBitsAndBytesConfig, SanaTransformer2DModel, SanaSprintPipeline
from transformers import BitsAndBytesConfig as BitsAndBytesConfig, AutoModel
quant_config = BitsAndBytesConfig(load_in_8bit=True)
text_encoder_8bit = AutoModel.from_pretrained(
    "Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers",
    subfolder="text_encoder",
    quantization_config=quant_config,
    torch_dtype=torch.bfloat16,
)
quant_config = DiffusersBitsAndBytesConfig(load_in_8bit=True)
transformer_8bit = SanaTransformer2DModel.from_pretrained(
    "Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers",
    subfolder="transformer",
    quantization_config=quant_config,
    torch_dtype=torch.bfloat16,
)
pipeline = SanaSprintPipeline.from_pretrained(
    "Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers",
    text_encoder=text_encoder_8bit,
    transformer=transformer_8bit,
    torch_dtype=torch.bfloat16,
    device_map="balanced",
)
prompt = "a tiny astronaut hatching from an egg on the moon"
image = pipeline(prompt).images[0]
image.save("output.png")
"""

IMAGE_TO_IMAGE = """
import torch
from diffusers import SanaSprintImg2ImgPipeline
from diffusers.utils.loading_utils import load_image
image = load_image(
    "https://hugging-face.cn/datasets/huggingface/documentation-images/resolve/main/diffusers/penguin.png"
)
pipe = SanaSprintImg2ImgPipeline.from_pretrained(
    "Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers",
    torch_dtype=torch.bfloat16)
pipe.to("cuda")
image = pipe(
    prompt="a cute pink bear",
    image=image,
    strength=0.5,
    height=832,
    width=480
).images[0]
image.save("output.png")
"""

IMAGE_TO_IMAGE_IN_THE_CLASS = """
import torch
from diffusers import SanaSprintImg2ImgPipeline
from diffusers.utils.loading_utils import load_image
pipe = SanaSprintImg2ImgPipeline.from_pretrained(
    "Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers", torch_dtype=torch.bfloat16
)
pipe.to("cuda")
image = load_image(
    "https://hugging-face.cn/datasets/huggingface/documentation-images/resolve/main/diffusers/penguin.png"
)
image = pipe(prompt="a cute pink bear", image=image, strength=0.5, height=832, width=480).images[0]
image.save("output.png")  # printed as `image[0].save`, which no picture has
"""


def adapted(snippet: str, folders: dict[str, Path]) -> str:
    for hub_id, folder in folders.items():
        snippet = snippet.replace(f'"Efficient-Large-Model/{hub_id}"', repr(str(folder)))
    snippet = re.sub(r'"https://[^"]*"', '"penguin.png"', snippet)
    snippet = snippet.replace("diffusers.utils.loading_utils", "sana").replace(
        "from diffusers import", "from sana import"
    )
    snippet = snippet.replace("in diffusers", "").replace("/diffusers", "")
    snippet = snippet.replace('"cuda"', '"cpu"').replace('"balanced"', '"cpu"')
    if importlib.util.find_spec("bitsandbytes") is None:
        lines = snippet.splitlines()
        # Models of transformers know no quantisation but its own, so the text encoder stays as it is.
        quantised = [i for i, line in enumerate(lines) if "quantization_config" in line]
        snippet = "\n".join(line for i, line in enumerate(lines) if i not in quantised[:1])
        snippet = snippet.replace("DiffusersBitsAndBytesConfig(load_in_8bit=True)", '"int8"')
    return snippet


@pytest.fixture(scope="module")
def folders(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return small models under the names of the published ones; those with PAG have the blocks that it names."""
    sprint = tmp_path_factory.mktemp("sprint") / "model"
    SanaSprintPipeline(**make_tiny_sprint(sample_size=32).components).save_pretrained(sprint)
    return {
        "Sana_1600M_1024px_BF16_diffusers": tiny_folder,
        "Sana_1600M_1024px_diffusers": tiny_folder,
        "Sana_Sprint_1.6B_1024px_diffusers": sprint,
    }


SNIPPETS = {
    "documentation": FROM_THE_REFERENCE_DOCUMENTATION,
    "readme": FROM_THE_README,
    "model-card": FROM_THE_MODEL_CARD,
    "quantised": QUANTISED,
    "pag-documentation": PAG_FROM_THE_REFERENCE_DOCUMENTATION,
    "pag-readme": PAG_FROM_THE_README,
    "pag-model-card": PAG_FROM_THE_MODEL_CARD,
    "sprint": SPRINT,
    "sprint-quantised": SPRINT_QUANTISED,
    "image-to-image": IMAGE_TO_IMAGE,
    "image-to-image-class": IMAGE_TO_IMAGE_IN_THE_CLASS,
}


@pytest.mark.parametrize("name", SNIPPETS)
@pytest.mark.filterwarnings("ignore:.*torch_dtype.*")
def test_snippet(name: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((300, 200), Image.Resampling.BICUBIC).save("penguin.png")
    code = adapted(SNIPPETS[name], folders)
    if "pag" in name:
        code = code.replace("transformer_blocks.8", "transformer_blocks.1")  # of two
    assert "diffusers import" not in code
    space: dict[str, object] = {}
    exec(compile(code, "snippet", "exec"), space)
    with Image.open(tmp_path / "output.png") as picture:
        assert picture.size == ((480, 832) if "image" in name else (1024, 1024))
        assert picture.mode == "RGB"
        assert len(set(picture.convert("L").get_flattened_data())) > 30, "a flat picture would prove nothing"


def test_every_name_that_the_snippets_import_is_exported() -> None:
    imported = re.findall(r"from diffusers import (.*)", "\n".join(SNIPPETS.values()))
    names = {word.split(" as ")[0].strip() for line in imported for word in line.split(",")}
    assert len(names) >= 6
    for name in (*names, "AutoencoderDC", "SanaPipelineOutput", "load_image"):
        assert name in sana.__all__
        assert getattr(sana, name).__name__ == name
    assert isinstance(sys.modules["sana"], types.ModuleType)
