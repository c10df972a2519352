"""References to one file of a repository: that file alone is fetched, from its commit, and found again offline."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_hub import Fault, Hub
from originals import TOLD, original_state, save_pth, tiny_branch, tiny_original
from tiny_pipeline import parts, same, transformer

from sana.cards import CARDS
from sana.checkpoints import hub as module
from sana.checkpoints.folder import save_parts
from sana.checkpoints.hub import locate
from sana.checkpoints.pretrained import SanaTransformer2DModel
from sana.checkpoints.references import Reference, parse_reference
from sana.errors import CheckpointError, InvalidInput, ModelNotFound
from sana.pipelines import SanaControlNetPipeline

REPO = "somebody/Mine"
FILE = "checkpoints/mine.pth"
NAME = f"hf://{REPO}/{FILE}"


@pytest.fixture
def published(hub: Hub, tmp_path: Path) -> tuple[dict[str, Any], Any]:
    """A repository of an original file among much else; where it is, and the model."""
    path, model = tiny_original(tmp_path / "mine.pth")
    hub.push(REPO, {FILE: path.read_bytes(), "other.bin": b"x" * 5000, "README.md": b"hello"})
    return {"endpoint": hub.url, "cache_dir": tmp_path / "cache"}, model


def test_a_reference_fetches_its_file_alone(hub: Hub, published: tuple[dict[str, Any], Any]) -> None:
    where, model = published
    located = locate(NAME, single=True, **where)
    assert hub.gets() == [FILE]
    assert located.file is not None
    assert (located.file.name, located.name, located.card) == ("mine.pth", NAME, None)
    assert located.commit == hub.branches[REPO]["main"]
    loaded = SanaTransformer2DModel.from_single_file(NAME, **where, **TOLD)
    assert same(loaded, model)
    assert hub.gets() == [FILE]  # from the cache


def test_web_addresses_are_references(hub: Hub, published: tuple[dict[str, Any], Any]) -> None:
    where, model = published
    for address in (
        f"https://huggingface.co/{REPO}/blob/main/{FILE}",
        f"https://huggingface.co/{REPO}/resolve/main/{FILE}?download=true",
    ):
        assert same(SanaTransformer2DModel.from_single_file(address, **where, **TOLD), model)
    assert hub.gets() == [FILE]


def test_a_pinned_revision_is_that_one(hub: Hub, published: tuple[dict[str, Any], Any], tmp_path: Path) -> None:
    where, model = published
    first = hub.branches[REPO]["main"]
    newer, _ = tiny_original(tmp_path / "newer.pth")
    state = {name: tensor * 2 for name, tensor in original_state(model).items()}
    hub.push(REPO, {FILE: save_pth(newer, state).read_bytes()})
    load = SanaTransformer2DModel.from_single_file
    assert not same(load(NAME, **where, **TOLD), model)
    assert same(load(NAME, revision=first, **where, **TOLD), model)
    assert same(load(f"hf://{REPO}@{first}/{FILE}", **where, **TOLD), model)
    assert same(load(f"https://huggingface.co/{REPO}/blob/{first}/{FILE}", **where, **TOLD), model)


def test_offline_only_the_cache_counts(hub: Hub, published: tuple[dict[str, Any], Any]) -> None:
    where, model = published
    with pytest.raises(ModelNotFound, match=r"checkpoints/mine.pth of 'somebody/Mine' .*not in the cache .* offline"):
        locate(NAME, single=True, local_files_only=True, **where)
    locate(NAME, single=True, **where)
    hub.requests.clear()
    assert same(SanaTransformer2DModel.from_single_file(NAME, local_files_only=True, **where, **TOLD), model)
    assert hub.requests == []
    locate(NAME, single=True, force_download=True, **where)
    assert hub.gets() == [FILE]


def test_what_the_hub_does_not_have_is_said(hub: Hub, published: tuple[dict[str, Any], Any]) -> None:
    where, _ = published
    refused = {
        f"hf://{REPO}/checkpoints/other.pth": "has no file checkpoints/other.pth: check the path",
        f"hf://nobody/Mine/{FILE}": "no model of that name",
        f"hf://{REPO}@gone/{FILE}": "has no revision 'gone'",
    }
    for name, text in refused.items():
        with pytest.raises(ModelNotFound, match=text):
            locate(name, single=True, **where)


def test_a_damaged_download_is_removed(hub: Hub, published: tuple[dict[str, Any], Any]) -> None:
    where, model = published
    hub.faults.append(Fault(path="/resolve/", method="GET", garble=True, times=1))
    with pytest.raises((CheckpointError, ModelNotFound)):
        locate(NAME, single=True, **where)
    assert same(SanaTransformer2DModel.from_single_file(NAME, **where, **TOLD), model)


def test_a_card_of_a_single_file_and_the_card_of_a_reference(
    hub: Hub, published: tuple[dict[str, Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    where, _ = published
    card = dataclasses.replace(CARDS["sana-1.6b-1024-controlnet-hed"], name="pet", original=NAME, hub_id=REPO)
    monkeypatch.setitem(module.CARDS, "pet", card)
    for name in ("pet", REPO, NAME):
        located = locate(name, single=True, **where)
        assert (located.card, located.name) == (card, NAME)
    with pytest.raises(InvalidInput, match=r"hf://somebody/Mine/.*is one file; load it with from_single_file"):
        locate("pet", **where)


def test_a_file_is_a_model_only_where_it_can_be(tmp_path: Path) -> None:
    path, model = tiny_original(tmp_path / "mine.pth")
    located = locate(path, single=True)
    assert (located.file, located.folder, located.name) == (path, tmp_path, "mine.pth")
    assert locate(str(path), single=True).file == path
    with pytest.raises(InvalidInput, match="is a file; give the model folder"):
        locate(path)
    with pytest.raises(InvalidInput, match="is one file; load it with from_single_file"):
        SanaTransformer2DModel.from_pretrained(NAME)
    with pytest.raises(InvalidInput, match="is no single file; load it with SanaTransformer2DModel"):
        SanaTransformer2DModel.from_single_file(tmp_path)
    assert same(SanaTransformer2DModel.from_single_file(path, **TOLD), model)


def test_references_are_read_or_refused() -> None:
    assert parse_reference("hf://a/b.c/d/e.pth") == Reference(repo="a/b.c", file="d/e.pth")
    assert parse_reference("hf://a/b@v1.0/e.pth") == Reference(repo="a/b", file="e.pth", revision="v1.0")
    assert parse_reference("https://hf.co/a/b/blob/main/e%20f.pth").file == "e f.pth"
    for wrong in (
        "hf://", "hf://a", "hf://a/b", "hf://a/b/", "hf://a/b/../x", "hf://a/b/x//y", "hf://../b/x", "hf://a/b/x\\y",
        "hf://a/b/./x", "https://example.com/a/b/blob/main/x", "https://huggingface.co/a/b", "http://[::1",
        "https://huggingface.co.evil.org/a/b/blob/main/x", "https://huggingface.co/a/b/blob/main/..%2f..%2fx",
    ):  # fmt: skip
        with pytest.raises(InvalidInput):
            parse_reference(wrong)


def test_other_parts_come_from_the_folder_around_the_file(tmp_path: Path) -> None:
    from sana.checkpoints.original.loading import base_folder

    (tmp_path / "m" / "checkpoints").mkdir(parents=True)
    path, _ = tiny_original(tmp_path / "m" / "checkpoints" / "mine.pth")
    assert base_folder(locate(path, single=True)) is None
    (tmp_path / "m" / "model_index.json").write_text("{}")
    assert base_folder(locate(path, single=True)) == tmp_path / "m"
    assert torch.load(path, weights_only=True)["epoch"] == 1


def test_a_control_network_is_fetched_beside_parts_that_are_given(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it is not named: it is a part that a repository may have or not, and so it is offline."""
    base = transformer()
    save_parts(tmp_path / "p", {**parts(), "controlnet": tiny_branch(base)}, class_name="SanaControlNetPipeline")
    hub.push(REPO, tmp_path / "p")
    monkeypatch.setattr(module, "locate", functools.partial(locate, endpoint=hub.url))
    where: dict[str, Any] = {"cache_dir": tmp_path / "cache", "torch_dtype": torch.float32}
    for offline in (False, True):
        pipe = SanaControlNetPipeline.from_pretrained(REPO, transformer=base, local_files_only=offline, **where)
        assert type(pipe.controlnet).__name__ == "SanaControlNetModel"
        assert pipe.transformer is base
    assert not [name for name in hub.gets() if name.startswith("transformer/")]
    fetched = len(hub.gets())
    SanaControlNetPipeline.from_pretrained(REPO, transformer=base, controlnet=None, **where)
    assert len(hub.gets()) == fetched
    plain = {**parts(), "controlnet": None}
    save_parts(tmp_path / "q", plain)
    hub.push("somebody/Plain", tmp_path / "q")
    with pytest.raises(CheckpointError, match="has no controlnet: pass controlnet="):
        SanaControlNetPipeline.from_pretrained("somebody/Plain", transformer=base, **where)
