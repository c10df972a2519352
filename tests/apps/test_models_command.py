"""`sana models`, and what is said of a model before it is downloaded."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command import Sana

from sana.apps.cli import cache
from sana.apps.cli.known import millions
from sana.apps.cli.machine import Machine, introduce
from sana.apps.cli.output import Terminal, listed
from sana.cards import CARDS, Card
from sana.errors import ModelNotFound

SMALL = CARDS["sana-0.6b-512"]


@pytest.fixture(autouse=True)
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and the leave to download, which no test makes use of."""
    folder = tmp_path / "hub"
    monkeypatch.setattr(cache, "folder", lambda: folder)
    monkeypatch.setattr(cache, "is_offline", lambda: False)
    return folder


def fill(folder: Path, card: Card, *, without: str = "") -> None:
    """Put files of the names that a model has into the cache, but no content that could be loaded."""
    repository = folder / f"models--{str(card.hub_id).replace('/', '--')}"
    snapshot = repository / "snapshots" / ("0" * 40)
    parts = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
    dot = f".{card.variant}" if card.variant else ""
    stems = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
    configs = {"tokenizer": "tokenizer_config.json", "scheduler": "scheduler_config.json"}
    for part in parts:
        (snapshot / part).mkdir(parents=True)
        (snapshot / part / configs.get(part, "config.json")).write_text("{}")
        if part in stems and part != without:
            (snapshot / part / f"{stems[part]}{dot}.safetensors").touch()
    (snapshot / "model_index.json").write_text(json.dumps({part: ["library", "Class"] for part in parts}))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "weights.incomplete").write_bytes(bytes(3_000_000))


def test_the_table_lists_every_card_in_few_columns(sana: Sana, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    said = sana("models")
    assert said.code == 0
    for name, card in CARDS.items():
        line = next(line for line in said.out.splitlines() if line.startswith(f"{name} "))
        assert millions(card.params + card.control_params) in line
        assert ("a toy" in line) == (card.folder is not None)
        assert (" GB" in line) == (card.folder is None)
    terms = "others NVIDIA licence (NSCL v2-custom) and Gemma terms of use, for research only"
    assert terms in " ".join(said.out.split())
    assert max(map(len, said.out.splitlines())) <= 80


def test_the_table_marks_what_is_here(sana: Sana, hub_cache: Path) -> None:
    fill(hub_cache, SMALL)
    fill(hub_cache, CARDS["sana-1.6b-512"], without="vae")
    rows = {line.split()[0]: line for line in sana("models").out.splitlines() if line}
    assert rows["sana-0.6b-512"].endswith("here")
    assert rows["sana-1.6b-512"].endswith("9.1 GB")
    facts = {model["name"]: model for model in json.loads(sana("models", "--json").out)["models"]}
    assert (facts["sana-0.6b-512"]["here"], facts["sana-1.6b-512"]["here"], facts["nano"]["here"]) == (
        True,
        False,
        True,
    )
    assert facts["sana-1.6b-512"]["bytes_here"] == 3_000_000
    assert "3 MB of it here" in " ".join(sana("models", "sana-1.6b-512").out.split())


def test_one_model_is_told_with_terms_limits_and_bias(sana: Sana) -> None:
    said = sana("models", "sana-sprint-0.6b-1024")
    text = " ".join(said.out.split())
    for part in (
        "huggingface.co/Efficient-Large-Model/Sana_Sprint_0.6B_1024px_diffusers",
        "about 7.1 GB (text encoder 5.2 GB, transformer 1.2 GB, autoencoder 625 MB)",
        "sampler scm",
        "for research only",
        "https://ai.google.dev/gemma/terms",
        "https://ai.google.dev/gemma/prohibited_use_policy",
        "hands, fingers and crowded scenes",
        "social biases",
        "real people or events",
    ):
        assert part in text
    toy = sana("models", "nano").out
    assert "256x256 only" in toy
    assert "download" not in toy
    assert "people" in toy
    assert "those of" not in toy
    sprint = " ".join(sana("models", "info", "nano-sprint").out.split())
    assert "built in; tokenizer, text encoder and autoencoder are those of nano" in sprint
    assert "2 steps, guidance 4.5, sampler scm" in sprint
    control = " ".join(sana("models", "info", "nano-controlnet").out.split())
    assert "built in; tokenizer, text encoder, autoencoder, transformer and scheduler are those of nano" in control
    assert "3.7 M of the control network" in control
    assert "--control ink" in control


def test_wrong_names_are_answered_with_the_nearest(sana: Sana) -> None:
    wrong = sana("models", "sana-spint-0.6b")
    assert wrong.code == 3
    assert "Did you mean 'sana-sprint" in wrong.err
    assert "Did you mean 'nano-sprint'?" in sana("models", "nano-spint").err
    assert sana("models", "nano", "nano").code == 2


def test_models_as_json(sana: Sana) -> None:
    models = json.loads(sana("models", "--json").out)["models"]
    assert [model["name"] for model in models] == list(CARDS)
    assert [model["name"] for model in models if model["built_in"]] == ["nano", "nano-sprint", "nano-controlnet"]
    assert (models[1]["base"], models[1]["shared"]) == ("nano", ["tokenizer", "text_encoder", "vae"])
    assert (models[0]["base"], models[0]["shared"]) == (None, [])
    assert all(model["limits"] and model["bias"] and model["not_for"] for model in models)
    assert all(model["built_in"] or len(model["terms"]) == 3 for model in models)


def test_sizes_follow_from_parameters_and_precision() -> None:
    for card in CARDS.values():
        sizes = card.download_bytes
        if card.hub_id is None:
            assert sizes == {}
        else:
            assert sizes["transformer"] == (4 if card.is_single_file else 2) * card.params
            assert sizes["text_encoder"] == 2 * 2_614_341_888
            assert 7.0e9 < sum(sizes.values()) < 15.5e9


def test_a_download_is_announced_once_with_size_terms_and_limits(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal()
    introduce(SMALL, terminal)
    introduce(SMALL, terminal)
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("must be downloaded first, from huggingface.co/Efficient-Large-Model/Sana_600M_512px") == 1
    for part in ("about 7.1 GB", "are free in", "NVIDIA licence", "Gemma", "for research only", "limits", "bias"):
        assert part in said
    introduce(SMALL, Terminal(quiet=True))
    assert capsys.readouterr().err == ""


def test_only_the_parts_that_are_needed_count(capsys: pytest.CaptureFixture[str]) -> None:
    introduce(SMALL, Terminal(), parts=("vae",))
    assert "about 625 MB" in capsys.readouterr().err


def test_what_is_here_is_not_said_to_be_downloaded(capsys: pytest.CaptureFixture[str], hub_cache: Path) -> None:
    fill(hub_cache, SMALL)
    introduce(SMALL, Terminal())
    said = capsys.readouterr().err
    assert "download" not in said
    assert "for research only" in said
    assert len(said.splitlines()) == 1


def test_offline_nothing_is_said_of_downloads(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "is_offline", lambda: True)
    introduce(SMALL, Terminal())
    assert "download" not in capsys.readouterr().err


def test_a_disk_that_is_too_small_is_told_before_the_download(
    monkeypatch: pytest.MonkeyPatch, hub_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3_000_000_000))
    with pytest.raises(ModelNotFound, match=r"about 7\.1 GB to download, but only 3\.0 GB are free in .*HF_HOME"):
        introduce(SMALL, Terminal())
    assert "3.0 GB are free" in capsys.readouterr().err
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=8_000_000_000))
    introduce(SMALL, Terminal())


def test_a_hub_id_brings_the_plain_files_and_the_same_terms(sana: Sana, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ModelNotFound("There is no network in this test.")

    monkeypatch.setattr("sana.engine.parts.load", refuse)
    said = sana("a fox", "-m", str(CARDS["sana-1.6b-1024"].hub_id))
    assert said.code == 3
    assert "about 18.2 GB" in said.err  # the plain files are float32
    assert "for research only" in " ".join(said.err.split())


def test_the_built_in_model_goes_before_a_folder_of_its_name(
    sana: Sana, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_folder, "nano")
    said = sana("a fox", "--steps", "1", "-o", "a.png")
    assert said.code == 0, said.err
    assert "nano is the built-in model" in said.err
    assert "There is a folder nano here too. For the model in it: -m ./nano" in said.err
    assert (Machine().folder, Machine().source) == (None, "nano")
    other = sana("a fox", "--steps", "1", "-o", "b.png", "-m", "./nano")
    assert other.code == 0, other.err
    assert "built-in" not in other.err


def test_a_folder_goes_before_a_published_model_of_its_name_and_says_so(
    sana: Sana, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_folder, "sana-0.6b-512")
    said = sana("a fox", "--steps", "1", "-o", "a.png", "-m", "sana-0.6b-512")
    assert said.code == 0, said.err
    assert "sana-0.6b-512 is taken from the folder of that name here, not from the hub." in said.err


def test_compile_is_asked_of_the_parts_and_its_cost_is_told(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    asked = []
    device = SimpleNamespace(type="cpu")
    parts = SimpleNamespace(compile=lambda: asked.append(1), name="nano", device=device, placement=None)
    monkeypatch.setattr("sana.engine.parts.load", lambda *_, **__: parts)
    Machine().load(Terminal())
    assert not asked
    Machine(compile=True).load(Terminal())
    assert asked
    assert "takes longer" in capsys.readouterr().err


def test_two_columns_are_wrapped_to_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    lines = listed({"name": "word " * 12, "empty": "", "several": ("one", "two")})
    assert max(map(len, lines)) <= 38
    assert lines[-2:] == ["  several  one", "           two"]
    monkeypatch.setenv("COLUMNS", "1")
    assert listed({"name": "word word"})


@pytest.mark.parametrize(
    ("params", "text"), [(6_300_000, "6.3 M"), (591_747_872, "592 M"), (1_604_462_752, "1.6 B"), (999, "0.0 M")]
)
def test_numbers_of_parameters(params: int, text: str) -> None:
    assert millions(params) == text


@pytest.mark.parametrize(("size", "text"), [(3e6, "3 MB"), (9.1e9, "9.1 GB"), (130e9, "130 GB"), (0, "0 MB")])
def test_numbers_of_bytes(size: float, text: str) -> None:
    assert cache.said(size) == text


def test_paths_do_not_name_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert cache.tilde(tmp_path / "a") == str(Path("~") / "a")
    assert cache.tilde(tmp_path) == "~"
    assert cache.tilde(f"{tmp_path}x") == f"{tmp_path}x"
