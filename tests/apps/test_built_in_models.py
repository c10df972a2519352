"""The built-in models that share parts of nano: small, whole wherever they are named, and the same by every road."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import Sana
from PIL import Image

import sana as package
from sana.cards import CARDS, Card
from sana.checkpoints.built_in import folder_of, part_folder
from sana.checkpoints.tensors import read_header
from sana.engine.fingerprint import fingerprint
from sana.engine.golden import sketch
from sana.engine.parts import Parts, load

SHARING = [card for card in CARDS.values() if card.shared]
ASSETS = folder_of(CARDS["nano"]).parent
PROMPT = "a red fish above a yellow boat"
SIDE = {"height": 256, "width": 256, "use_resolution_binning": False}
PIPELINES: dict[str, tuple[str, dict[str, Any]]] = {
    "nano-sprint": ("SanaSprintPipeline", {"num_inference_steps": 2, "guidance_scale": CARDS["nano-sprint"].guidance}),
    "nano-controlnet": ("SanaControlNetPipeline", {"num_inference_steps": 3, "guidance_scale": 4.5}),
}
each = pytest.mark.parametrize("card", SHARING, ids=lambda card: card.name)


@pytest.fixture(scope="module")
def nano() -> Parts:
    return load("nano", device="cpu")


def order(card: Card) -> list[str]:
    """The words that draw with a model, without --output; a control network follows `edges.png`."""
    words = [PROMPT, "-m", card.name, "--seed", "3"]
    if card.control is None:
        return words
    sketch().save("edges.png")
    return [*words, "--steps", "3", "--control", card.control, "edges.png"]


def pixels(file: str | Path) -> Any:
    return np.asarray(Image.open(file).convert("RGB"))


def test_they_are_small_and_repeat_nothing() -> None:
    extra = [*(folder_of(card) for card in SHARING), ASSETS / "demo"]
    sizes = {file: file.stat().st_size for folder in extra for file in folder.rglob("*") if file.is_file()}
    assert sum(sizes.values()) <= 24e6
    assert {path.name for path in ASSETS.iterdir()} == {"demo", *(str(c.folder) for c in CARDS.values() if c.folder)}


@each
def test_they_are_kept_in_half_precision_and_read_in_float32_without_a_word(
    card: Card, nano: Parts, caplog: pytest.LogCaptureFixture
) -> None:
    for file in folder_of(card).rglob("*.safetensors"):
        assert {entry.dtype for entry in read_header(file)} == {torch.float16}
    name, _ = PIPELINES[card.name]
    with caplog.at_level(logging.WARNING, "sana"):
        loaded = load(card.name, device="cpu")
        pipe = getattr(package, name).from_pretrained(card.name)
    assert caplog.records == []
    for found in (loaded, pipe):
        weighted = [found.transformer, found.text_encoder, found.vae, *([found.controlnet] if card.control else [])]
        assert {part.dtype for part in weighted} == {torch.float32}
    assert (loaded.name, loaded.card) == (card.name, card)
    assert loaded.tokenizer.get_vocab() == nano.tokenizer.get_vocab()
    for part in ("text_encoder", "vae", "transformer"):
        same = fingerprint(getattr(loaded, part)) == fingerprint(getattr(nano, part))
        assert same == (part in card.shared), part
    assert (loaded.scheduler.config == nano.scheduler.config) == ("scheduler" in card.shared)
    assert len(loaded.controlnets) == bool(card.control)


@each
def test_the_class_that_the_folder_names_is_the_one_that_is_chosen(card: Card) -> None:
    pipe = package.AutoPipelineForText2Image.from_pretrained(card.name)
    assert type(pipe).__name__ == PIPELINES[card.name][0]
    assert pipe.load_config(card.name)["_sanakit_card"] == card.name


def test_a_shared_part_is_found_by_the_name_of_the_model(nano: Parts) -> None:
    found = package.AutoencoderDC.from_pretrained("nano-sprint", subfolder="vae")
    assert fingerprint(found) == fingerprint(nano.vae)
    found = package.SanaTransformer2DModel.from_pretrained("nano-controlnet", subfolder="transformer")
    assert fingerprint(found) == fingerprint(nano.transformer)
    scheduler = package.DPMSolverMultistepScheduler.from_pretrained("nano-controlnet")
    assert scheduler.config["flow_shift"] == CARDS["nano"].flow_shift
    assert package.SCMScheduler.from_pretrained("nano-sprint", subfolder="scheduler").config
    branch = package.SanaControlNetModel.from_pretrained("nano-controlnet", subfolder="controlnet")
    assert branch.num_parameters() == CARDS["nano-controlnet"].control_params


@each
def test_command_and_python_draw_the_same_and_it_is_drawn_again(card: Card, sana: Sana) -> None:
    said = sana(*order(card), "-o", "one.png")
    assert said.code == 0, said.err
    assert said.err.startswith(f"{card.name} is a built-in model (")
    assert f"{3 if card.control else 2} steps" in said.err
    controls = [package.ControlRequest(kind="ink", image="edges.png")] if card.control else []
    request = package.Request(prompt=PROMPT, seed=3, controls=tuple(controls), steps=3 if card.control else None)
    drawn = package.generate_images(load(card.name, device="cpu"), request).image
    assert np.array_equal(pixels("one.png"), np.asarray(drawn))
    again = sana("replay", "one.png")
    assert (again.code, again.out.strip()) == (0, "identical"), again.err
    told = sana("info", "one.png").out
    assert f"--model {card.name}" in told
    assert "--controlnet" not in told


@each
def test_converted_they_are_whole_folders_that_draw_the_same(card: Card, sana: Sana) -> None:
    assert sana("convert", card.name, "whole").code == 0
    index = json.loads(Path("whole/model_index.json").read_text())
    listed = {name for name, entry in index.items() if isinstance(entry, list)}
    assert {path.name for path in Path("whole").iterdir() if path.is_dir()} == listed > set(card.shared)
    for file in Path("whole").rglob("*.safetensors"):
        assert {entry.dtype for entry in read_header(file)} == {torch.float16}
    drawing = order(card)
    assert sana(*drawing, "-o", "one.png").code == 0
    said = sana(*[word if word != card.name else "whole" for word in drawing], "-o", "two.png")
    assert said.code == 0, said.err
    assert f"whole has the architecture and the limits of {card.name}" in said.err
    assert np.array_equal(pixels("one.png"), pixels("two.png"))


@each
def test_saved_they_are_whole_folders_that_the_reference_loads(card: Card, tmp_path: Path) -> None:
    import diffusers

    name, settings = PIPELINES[card.name]
    ours = getattr(package, name).from_pretrained(card.name)
    ours.save_pretrained(tmp_path)
    theirs = getattr(diffusers, name).from_pretrained(tmp_path, torch_dtype=torch.float32)
    for part in ("vae", "transformer"):
        tensors = getattr(theirs, part).state_dict()
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in getattr(ours, part).state_dict().items())
    assert type(theirs.scheduler).__name__ == type(ours.scheduler).__name__
    if card.controlnet is not None:
        settings = {**settings, "control_image": sketch()}
    latents = []
    for pipe in (ours, theirs):
        pipe.set_progress_bar_config(disable=True)
        noise = torch.Generator().manual_seed(0)
        latents.append(pipe(PROMPT, generator=noise, output_type="latent", **SIDE, **settings).images)
    apart = float((latents[0] - latents[1]).norm() / latents[1].norm())
    # The reference's control network has no normed queries and keys: it loads such a branch, and draws another picture.
    unlike = card.controlnet is not None and card.controlnet.qk_norm is not None
    assert torch.isfinite(latents[1]).all()
    assert unlike or apart < 1e-4


def test_nano_with_the_control_network_beside_it_is_the_model_with_it_inside(sana: Sana) -> None:
    inside = order(CARDS["nano-controlnet"])
    assert sana(*inside, "-o", "inside.png").code == 0
    beside = [word if word != "nano-controlnet" else "nano" for word in inside]
    refused = sana(*beside, "-o", "beside.png")
    assert refused.code == 2
    assert (
        "nano has no control network for --control. Name one with --controlnet, such as nano-controlnet." in refused.err
    )
    said = sana(*beside, "--controlnet", "nano-controlnet", "-o", "beside.png")
    assert said.code == 0, said.err
    assert np.array_equal(pixels("inside.png"), pixels("beside.png"))
    assert "--controlnet nano-controlnet" in sana("info", "beside.png").out
    assert sana("replay", "beside.png").out.strip() == "identical"


@pytest.mark.parametrize(("name", "memory"), [("nano-sprint", "low"), ("nano-controlnet", "lowest")])
def test_parts_that_come_and_go_draw_the_same(name: str, memory: str, sana: Sana) -> None:
    card = CARDS[name]
    assert sana(*order(card), "-o", "one.png").code == 0
    said = sana(*order(card), "--memory", memory, "-o", "two.png")
    assert said.code == 0, said.err
    assert np.array_equal(pixels("one.png"), pixels("two.png"))


@each
def test_what_is_told_counts_the_shared_parts(card: Card, sana: Sana) -> None:
    verified = sana("models", "verify", card.name, "--json")
    assert verified.code == 0, verified.err
    files = {one["file"]: one["state"] for one in json.loads(verified.out)["files"]}
    assert set(files.values()) == {"whole"}
    assert "nano/vae/diffusion_pytorch_model.safetensors" in files
    assert ("nano/transformer/config.json" in files) == ("transformer" in card.shared)
    (told,) = json.loads(sana("models", "info", str(folder_of(card)), "--json").out)["models"]
    assert told["follows"] == card.name
    assert all(one["bytes"] > 0 for one in told["parts"].values())
    page = sana("info", str(folder_of(card))).out
    assert "vae " in page
    assert "normed" not in page
    assert f"{card.name} is built in" in sana("models", "pull", card.name).err
    assert f"{card.name} is built in" in sana("models", "rm", card.name).err


@each
def test_a_dry_run_knows_the_shapes(card: Card, sana: Sana, no_loading: None) -> None:
    said = sana(*order(card), "--dry-run", "--json")
    assert said.code == 0, said.err
    found = json.loads(said.out)
    assert found["model"] == card.name
    assert found["settings"]["steps"] == (3 if card.control else card.steps)
    assert found["settings"]["guidance"] == card.guidance
    assert found["estimate"]["download_bytes"] == 0
    assert 0 < found["estimate"]["memory_bytes"] < 2e9


def test_sprint_draws_from_pictures_and_is_judged_exactly(sana: Sana) -> None:
    pipe = package.SanaSprintImg2ImgPipeline.from_pretrained("nano-sprint")
    pipe.set_progress_bar_config(disable=True)
    made = pipe(PROMPT, image=sketch(), strength=0.5, num_inference_steps=2, **SIDE).images[0]
    assert made.size == (256, 256)
    said = sana(PROMPT, "-m", "nano-sprint", "--seed", "3", "--best-of", "2", "-o", "best.png", "--json")
    assert said.code == 0, said.err
    assert json.loads(said.out)["selection"][0]["judge"] == "exact"
    refused = sana(PROMPT, "-m", "nano-sprint", "--negative-prompt", "a cat", "-o", "no.png")
    assert refused.code == 2
    assert "nano-sprint is a SANA-Sprint model and has no negative prompt" in refused.err


def test_a_deeper_one_is_a_whole_folder(sana: Sana) -> None:
    assert sana("models", "grow", "nano-sprint", "deep", "--layers", "7").code == 0
    assert {path.name for path in Path("deep").iterdir() if path.is_dir()} == {
        *("tokenizer", "text_encoder", "vae"),
        *("transformer", "scheduler"),
    }
    assert sana(PROMPT, "-m", "deep", "--seed", "3", "-o", "deep.png").code == 0
    assert sana(PROMPT, "-m", "nano-sprint", "--seed", "3", "-o", "one.png").code == 0
    assert np.array_equal(pixels("deep.png"), pixels("one.png"))


def test_a_training_takes_the_encoders_from_where_they_are() -> None:
    from sana.training.exports import stored_dtypes
    from sana.training.starting import StartModel

    start = StartModel("nano-sprint", torch.device("cpu"))
    assert start.folder == folder_of(CARDS["nano"])
    assert start.card == CARDS["nano-sprint"]
    assert stored_dtypes("nano-controlnet") == dict.fromkeys(("text_encoder", "transformer", "vae"), torch.float16)


def test_an_original_file_of_one_takes_what_it_lacks_from_the_model_itself(sana: Sana) -> None:
    assert sana("convert", "nano-sprint", "sprint.safetensors").code == 0
    said = sana("convert", "sprint.safetensors", "back", "--base", "nano-sprint", "--card", "nano-sprint")
    assert said.code == 0, said.err
    assert part_folder(Path("back"), "vae").is_dir()
    assert sana(PROMPT, "-m", "back", "--seed", "3", "-o", "back.png").code == 0
    assert sana(PROMPT, "-m", "nano-sprint", "--seed", "3", "-o", "one.png").code == 0
    assert np.array_equal(pixels("back.png"), pixels("one.png"))
