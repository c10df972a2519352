"""`sana models pull|verify|rm|info` and what lies below them, against a hub on the loopback device."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from fake_hub import Fault, Hub
from huggingface_hub import constants

from sana.apps.cli import cache, main
from sana.cards import CARDS
from sana.checkpoints import library
from sana.errors import InvalidInput, ModelNotFound

REPO = "acme/sana-tiny"
DATA = bytes(range(256)) * 40
PARTS = {"tokenizer": "tokenizer", "text_encoder": "model", "transformer": "x", "vae": "x", "scheduler": ""}


class Said(NamedTuple):
    code: int
    out: str
    err: str


def repository() -> dict[str, bytes]:
    """Return the files of a model, plain and in fp16, with content that nobody loads."""
    index = {part: ["library", f"{part.title()}Class"] for part in PARTS}
    files = {"model_index.json": json.dumps(index).encode(), "README.md": b"read me", "big.bin": DATA * 9}
    for part in PARTS:
        config = {"tokenizer": "tokenizer_config.json", "scheduler": "scheduler_config.json"}.get(part, "config.json")
        files[f"{part}/{config}"] = json.dumps({"part": part}).encode()
    for part in ("text_encoder", "transformer", "vae"):
        stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        files[f"{part}/{stem}.safetensors"] = part.encode() + DATA * 2
        files[f"{part}/{stem}.fp16.safetensors"] = part.encode() + DATA
    return files


@pytest.fixture
def sana(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """Run the command with the fake hub and an empty cache; nobody is asked anything."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + template[template.index("/{") :])
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("sys.stdin", None)
    monkeypatch.chdir(tmp_path)
    hub.push(REPO, repository())

    def run(*words: str) -> Said:
        hub.requests.clear()
        code = main(["models", *words])
        return Said(code, *capfd.readouterr())

    return run


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> str:
    """A card whose repository is the one on the hub, of which it wants fp16."""
    made = dataclasses.replace(CARDS["sana-0.6b-512"], name="sana-tiny", hub_id=REPO, variant="fp16", original=None)
    monkeypatch.setitem(CARDS, "sana-tiny", made)
    return "sana-tiny"


Sana = Callable[..., Said]


def test_pull_tells_size_terms_and_room_first_and_fetches_the_needed_variant_only(
    sana: Sana, hub: Hub, card: str
) -> None:
    said = sana("pull", card)
    assert said.code == 0, said.err
    text = " ".join(said.err.split())
    assert f"sana-tiny is fetched from 127.0.0.1/{REPO}: size 31 kB; " in text
    assert "licence NVIDIA licence" in text
    assert " are free in " in text
    assert f"To draw: sana -m {card}" in text
    assert text.index("licence") < text.index("is here, commit")
    fetched = set(hub.gets())
    assert {name.split("/")[0] for name in fetched} == {"model_index.json", *PARTS}
    assert all(".fp16." in name for name in fetched if name.endswith(".safetensors"))
    folder = Path(said.out.strip())
    assert (folder / "vae" / "diffusion_pytorch_model.fp16.safetensors").read_bytes() == b"vae" + DATA
    again = sana("pull", card)
    assert (again.code, hub.requests) == (0, [])
    assert "nothing was fetched, all of it was here" in again.err
    rows = {line.split()[0]: line for line in sana().out.splitlines() if line}
    assert rows[card].endswith("here")


def test_pull_by_hub_id_takes_the_plain_files_a_variant_and_a_revision(sana: Sana, hub: Hub) -> None:
    old = hub.branches[REPO]["main"]
    hub.push(REPO, {**repository(), "vae/config.json": b'{"a": 1}'})
    said = sana("pull", REPO, "--revision", old, "--json")
    assert said.code == 0, said.err
    document = json.loads(said.out)
    assert document["commit"] == old
    assert document["downloaded_bytes"] > 3 * 2 * len(DATA)
    assert "not stated; read the page of the model before you use it" in said.err
    assert sana("pull", REPO, "--variant", "fp16").code == 0
    wrong = sana("pull", REPO, "--variant", "fp8")
    assert wrong.code == 3
    assert "variant=fp8" in wrong.err
    assert "has no revision 'v9'" in sana("pull", REPO, "--revision", "v9").err


def test_a_model_that_is_one_file_brings_the_parts_it_lacks(
    sana: Sana, hub: Hub, card: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub.push("acme/control", {"checkpoints/c.pth": b"control" + DATA, "other.pth": DATA})
    monkeypatch.setitem(
        CARDS,
        "sana-control",
        dataclasses.replace(
            CARDS["sana-0.6b-1024-controlnet-hed"],
            name="sana-control",
            hub_id="acme/control",
            original="hf://acme/control/checkpoints/c.pth",
            base=card,
        ),
    )
    said = sana("pull", "sana-control")
    assert said.code == 0, said.err
    assert said.out.strip().endswith("checkpoints/c.pth")
    assert "other.pth" not in " ".join(hub.gets())
    assert not any(name.startswith("transformer/") for name in hub.gets()), "the file has the transformer"
    assert any(name.startswith("text_encoder/") for name in hub.gets())
    rows = {line.split()[0]: line for line in sana().out.splitlines() if line}
    assert rows["sana-control"].endswith("here")
    assert not rows[card].endswith("here")
    named = sana("pull", "hf://acme/control/other.pth")
    assert named.code == 0, named.err
    assert hub.gets() == ["other.pth"]


def test_a_download_that_was_cut_goes_on(sana: Sana, hub: Hub, card: str) -> None:
    name = "vae/diffusion_pytorch_model.fp16.safetensors"
    hub.faults = [Fault(path=f"/resolve/.*/{name}", method="GET", cut=5000, times=1)]
    assert sana("pull", card).code in (0, 3)
    hub.faults = []
    said = sana("pull", card)
    assert said.code == 0, said.err
    assert (Path(said.out.strip()) / name).read_bytes() == b"vae" + DATA
    ranges = [wanted for method, path, wanted in hub.requests if method == "GET" and path.endswith(name)]
    assert not ranges or ranges[-1] is not None


def test_offline_unknown_and_unreachable_are_one_sentence(
    sana: Sana, hub: Hub, card: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    unknown = sana("pull", "acme/none")
    assert unknown.code == 3
    assert "has no model of that name" in unknown.err
    hub.faults = [Fault(path=".*", status=503)]
    down = sana("pull", card)
    assert down.code == 3
    assert "answered with status 503" in down.err
    hub.faults = []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    offline = sana("pull", card)
    assert (offline.code, hub.requests) == (3, [])
    assert "cannot be loaded offline" in offline.err
    for said in (unknown, down, offline):
        assert len([line for line in said.err.splitlines() if line.startswith("sana: ")]) == 1


def test_a_disk_that_is_too_small_is_told_before_a_byte_is_fetched(
    sana: Sana, hub: Hub, card: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    said = sana("pull", card)
    assert said.code == 3
    assert "kB to download, but only" in said.err
    assert hub.gets() == []


def test_verify_reads_every_file(sana: Sana, card: str) -> None:
    missing = sana("verify", card)
    assert missing.code == 3
    assert f"{card} is not whole on this computer. To fetch it: sana models pull {card}" in missing.err
    folder = Path(sana("pull", card).out.strip())
    assert "golden   not checked here: its weights could not be had" in sana("verify", card).out
    whole = sana("verify", card, "--json")
    assert whole.code == 0, whole.err
    states = {entry["file"]: entry["state"] for entry in json.loads(whole.out)["files"]}
    assert set(states.values()) == {"whole"}
    assert len(states) == 9
    weights = (folder / "vae" / "diffusion_pytorch_model.fp16.safetensors").resolve()
    for i in (0, len(DATA) // 2, len(DATA) + 2):  # one bit, anywhere
        data = bytearray(weights.read_bytes())
        data[i] ^= 1
        weights.write_bytes(data)
        said = sana("verify", card)
        assert said.code == 3
        assert "damaged  vae/diffusion_pytorch_model.fp16.safetensors: " in said.out
        assert (
            f"1 of the 9 files of {card} are damaged. Mend it: sana models rm {card}, then pull it again." in said.err
        )
        data[i] ^= 1
        weights.write_bytes(data)
    (folder / "vae" / "config.json").resolve().write_bytes(b"{")
    assert sana("verify", card).code == 3


def test_verify_draws_what_the_built_in_model_drew(sana: Sana, monkeypatch: pytest.MonkeyPatch) -> None:
    from sana.engine import golden

    said = sana("verify", "nano", "--json")
    assert said.code == 0, said.err
    assert [(one["check"], one["passed"]) for one in json.loads(said.out)["golden"]] == [
        ("tokens", True), ("latents", True), ("pixels", True)
    ]  # fmt: skip
    kept = golden.GOLDEN["nano"]
    monkeypatch.setitem(golden.GOLDEN, "nano", dataclasses.replace(kept, latents=kept.latents[::-1]))
    wrong = sana("verify", "nano")
    assert wrong.code == 3
    assert "latents  WRONG: " in wrong.out
    assert "nano does not draw what it drew" in wrong.err


def test_rm_frees_what_it_says_and_nothing_outside_of_the_cache(sana: Sana, card: str, tmp_path: Path) -> None:
    assert sana("rm", card).code == 3
    folder = Path(sana("pull", card).out.strip())
    sana("pull", REPO)
    outside = tmp_path / "mine.txt"
    outside.write_text("mine")
    (folder / "link.txt").symlink_to(outside)
    (folder / "links").symlink_to(tmp_path)
    before = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("blobs/*") if path.is_file())
    said = sana("rm", card, "--json")
    assert said.code == 0, said.err
    assert json.loads(said.out)["freed_bytes"] == before
    assert outside.read_text() == "mine"
    assert [path.name for path in (tmp_path / "cache").glob("models--*")] == []
    assert sana("rm", REPO).code == 3


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("nano", "nano is built in"),
        ("own", "own is a folder of yours, not a download."),
        ("../cache", "There is no model '../cache'"),
        ("acme/..", "There is no model 'acme/..'"),
        ("a--b/c", "There is no model 'a--b/c'"),
        ("hf://acme/x/y.pth", "is one file of a repository. Name that: acme/x"),
        ("sana-0.6b-513", "Did you mean 'sana-0.6b-512'?"),
    ],
)
def test_rm_refuses_what_is_no_download(sana: Sana, tmp_path: Path, name: str, sentence: str) -> None:
    (tmp_path / "own").mkdir()
    said = sana("rm", name)
    assert said.code in (2, 3)
    assert sentence in said.err
    assert (tmp_path / "own").is_dir()


def test_rm_does_not_follow_a_repository_that_is_a_link(sana: Sana, tmp_path: Path) -> None:
    (tmp_path / "elsewhere" / "blobs").mkdir(parents=True)
    (tmp_path / "elsewhere" / "blobs" / "x").write_bytes(DATA)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / f"models--{REPO.replace('/', '--')}").symlink_to(tmp_path / "elsewhere")
    said = sana("rm", REPO)
    assert said.code == 2
    assert "is a link to another place. Remove it by hand." in said.err
    assert (tmp_path / "elsewhere" / "blobs" / "x").exists()
    held = library.Repository(repo="x/y", folder=tmp_path / "elsewhere")
    with pytest.raises(InvalidInput, match="link to another place"):
        library.remove(held, tmp_path / "cache")


def test_a_person_is_asked_before_anything_is_removed(
    sana: Sana, card: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sana("pull", card)
    answers = iter(["\n", "n\n", "y\n"])
    monkeypatch.setattr("sana.apps.cli.model_tasks.is_terminal", lambda stream: True)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(readline=lambda: next(answers), isatty=lambda: True))
    for _ in range(2):
        said = sana("rm", card)
        assert (said.code, said.out) == (2, "")
        assert "Nothing was removed." in said.err
    assert list((tmp_path / "cache").glob("models--*"))
    assert sana("rm", card).code == 0


def test_info_tells_what_is_here(sana: Sana, card: str) -> None:
    assert f"no; to fetch it: sana models pull {card}" in sana("info", card).out
    sana("pull", card)
    text = " ".join(sana("info", card).out.split())
    assert "complete on this computer, 31 kB in" in text
    assert "(commit " in text
    by_id = sana("info", REPO)
    assert by_id.code == 0, by_id.err
    assert "vae: VaeClass, 10 kB" in by_id.out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["pull"], "Which model? For example: sana models pull sana-0.6b-512"),
        (["pull", "a/b", "c/d"], "is about one model at a time"),
        (["rm", REPO, "--revision", "x"], "--revision belongs to `sana models pull`. Drop it."),
        (["--yes"], "--yes belongs to `sana models rm`. Drop it."),
        (["plul", "nano"], "Did you mean 'pull'?"),
        (["pull", "hf://acme/x"], "is no reference to a file on the hub"),
        (["pull", "http://evil.example/x"], "is no reference to a file on the hub"),
    ],
)
def test_wrong_words(sana: Sana, hub: Hub, words: list[str], sentence: str) -> None:
    said = sana(*words)
    assert said.code in (2, 3)
    assert sentence in said.err
    assert hub.requests == []


def test_the_library_is_read_without_torch_and_survives_odd_caches(tmp_path: Path) -> None:
    repo = tmp_path / "models--a--b"
    (repo / "blobs").mkdir(parents=True)
    (repo / "blobs" / "dangling").symlink_to(tmp_path / "none")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    held = library.find("a/b", tmp_path)
    assert held is not None
    assert (held.size, held.commits) == (0, {})
    assert library.find("a/c", tmp_path) is None
    assert cache.said(500.0) == "0 kB" or cache.said(500.0).endswith("kB")
    with pytest.raises(ModelNotFound):
        library.hub_id("nothing")
    assert os.path.lexists(repo / "blobs" / "dangling")
