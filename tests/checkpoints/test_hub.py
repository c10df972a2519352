"""From a name to a folder, against a hub on the loopback device."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from fake_hub import Fault, Hub
from huggingface_hub import constants

from sana.cards import CARDS
from sana.checkpoints import hub as module
from sana.checkpoints.built_in import is_built_in
from sana.checkpoints.hub import locate
from sana.checkpoints.layout import missing_files
from sana.errors import CheckpointError, InvalidInput, ModelNotFound

REPO = "acme/sana-tiny"
CONFIG = b'{"in_channels": 4}'
WEIGHTS = bytes(range(256)) * 8
PIPELINE = {
    "model_index.json": json.dumps(
        {
            "_class_name": "SanaPipeline",
            "tokenizer": ["transformers", "GemmaTokenizer"],
            "text_encoder": ["transformers", "Gemma2Model"],
            "transformer": ["diffusers", "SanaTransformer2DModel"],
            "vae": ["diffusers", "AutoencoderDC"],
            "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
        }
    ).encode(),
    "README.md": b"read me",
    "asset/picture.png": WEIGHTS,
    "tokenizer/tokenizer_config.json": b"{}",
    "tokenizer/tokenizer.json": WEIGHTS,
    "text_encoder/config.json": CONFIG,
    "text_encoder/model.safetensors.index.json": b'{"weight_map": {"a": "model-00001-of-00002.safetensors", '
    b'"b": "model-00002-of-00002.safetensors"}}',
    "text_encoder/model-00001-of-00002.safetensors": b"1" + WEIGHTS,
    "text_encoder/model-00002-of-00002.safetensors": b"2" + WEIGHTS,
    "text_encoder/model.bf16.safetensors": b"3" + WEIGHTS,
    "transformer/config.json": CONFIG,
    "transformer/diffusion_pytorch_model.safetensors": b"4" + WEIGHTS,
    "transformer/diffusion_pytorch_model.bf16.safetensors": b"5" + WEIGHTS,
    "vae/config.json": CONFIG,
    "vae/diffusion_pytorch_model.safetensors": b"6" + WEIGHTS,
    "scheduler/scheduler_config.json": b"{}",
}
PLAIN = {name for name in PIPELINE if "bf16" not in name and name not in ("README.md", "asset/picture.png")}
BF16 = {
    name
    for name in PIPELINE
    if "bf16" in name or name.startswith(("tok", "vae", "sched", "model_")) or "config" in name
}
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def tiny_repository(hub: Hub) -> None:
    hub.push(REPO, PIPELINE)


@pytest.fixture
def get(hub: Hub, tmp_path: Path) -> Any:
    """Call `locate` with the fake hub and an empty cache."""

    def call(name: str = REPO, **options: Any) -> Path:
        hub.requests.clear()
        return locate(name, endpoint=hub.url, cache_dir=tmp_path / "cache", **options).folder

    return call


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_only_what_is_needed_is_fetched(get: Any, hub: Hub) -> None:
    folder = get()
    assert files(folder) == PLAIN
    assert {name: (folder / name).read_bytes() for name in PLAIN} == {name: PIPELINE[name] for name in PLAIN}


def test_variant_is_fetched_where_it_exists_and_plain_files_elsewhere(get: Any) -> None:
    assert files(get(variant="bf16")) == BF16


def test_single_part(get: Any) -> None:
    assert files(get(parts=("transformer",))) == {"model_index.json", "transformer/config.json", TRANSFORMER}


def test_model_saved_alone(get: Any, hub: Hub) -> None:
    hub.push("acme/vae", {"config.json": CONFIG, "diffusion_pytorch_model.safetensors": WEIGHTS, "x.md": b""})
    folder = get("acme/vae", parts=("",))
    assert files(folder) == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert get("acme/vae", parts=("",)) == folder
    assert hub.requests == []


@pytest.mark.parametrize("options", [{}, {"variant": "bf16"}, {"parts": ("vae", "transformer")}, {"revision": "main"}])
def test_complete_snapshot_makes_no_request(get: Any, hub: Hub, options: dict[str, Any]) -> None:
    folder = get(**options)
    assert get(**options) == folder
    assert get(**options, local_files_only=True) == folder
    assert hub.requests == []


def test_complete_snapshot_without_a_listing_makes_no_request(get: Any, hub: Hub, tmp_path: Path) -> None:
    """Caches of huggingface_hub 1.x and of other programs hold no listing of the repository."""
    folder = get()
    forget_listings(tmp_path)
    assert get() == folder
    assert hub.requests == []
    assert get(variant="bf16") == folder, "without the listing nobody knows whether the vae has the variant"
    assert hub.requests != []
    forget_listings(tmp_path)
    assert get(variant="bf16", local_files_only=True) == folder


def forget_listings(tmp_path: Path) -> None:
    from huggingface_hub import _tree_cache

    for listing in (tmp_path / "cache").glob("*/trees"):
        shutil.rmtree(listing)
    _tree_cache._IN_MEMORY_TREE_CACHE.clear()


def test_second_need_fetches_the_difference(get: Any, hub: Hub) -> None:
    get()
    get(variant="bf16")
    assert set(hub.gets()) == BF16 - PLAIN


def test_revision_is_pinned(get: Any, hub: Hub) -> None:
    old = hub.branches[REPO]["main"]
    folder = get()
    new = hub.push(REPO, {**PIPELINE, "vae/config.json": b'{"new": 1}'})
    assert folder.name == old
    assert get() == folder, "a complete snapshot is served without asking for news"
    assert hub.requests == []
    pinned = get(revision=new)
    assert pinned.name == new
    assert (pinned / "vae/config.json").read_bytes() == b'{"new": 1}'
    assert hub.gets() == ["vae/config.json"], "blobs that both commits share are kept"
    assert get(revision=old) == folder
    assert hub.requests == []


def test_branch_and_force_download(get: Any, hub: Hub) -> None:
    dev = hub.push(REPO, {**PIPELINE, "vae/config.json": b'{"dev": 1}'}, branch="dev")
    assert get(revision="dev").name == dev
    old = get()
    new = hub.push(REPO, {**PIPELINE, "vae/config.json": b'{"newer": 1}'})
    assert get() == old
    assert get(force_download=True).name == new


def test_located_tells_commit_and_card(hub: Hub, tmp_path: Path) -> None:
    card = CARDS["sana-1.6b-1024"]
    commit = hub.push(str(card.hub_id), PIPELINE)
    found = locate("sana-1.6b-1024", endpoint=hub.url, cache_dir=tmp_path / "c")
    assert (found.commit, found.card, found.variant) == (commit, card, "bf16")
    assert files(found.folder) == BF16
    by_id = locate(str(card.hub_id), endpoint=hub.url, cache_dir=tmp_path / "c")
    assert (by_id.card, by_id.variant) == (card, None), "a hub id means what it means in the reference"


def test_missing_variant_is_said_before_any_download(get: Any, hub: Hub) -> None:
    with pytest.raises(
        CheckpointError, match=r"`variant=fp16`, but no such modeling files are available\. Available: bf16"
    ):
        get(variant="fp16")
    assert hub.gets() == []


def test_variant_only_repository(get: Any, hub: Hub) -> None:
    hub.push("acme/half", {name: PIPELINE[name] for name in BF16 if name != "vae/diffusion_pytorch_model.safetensors"})
    with pytest.raises(OSError, match=r"no weights in text_encoder/, no model.safetensors: pass variant='bf16'"):
        get("acme/half")
    assert hub.gets() == []


def test_pickles_are_refused_before_any_download(get: Any, hub: Hub) -> None:
    hub.push("acme/old", {"config.json": CONFIG, "diffusion_pytorch_model.bin": WEIGHTS})
    with pytest.raises(CheckpointError, match=r"only pickled weights .*use_safetensors=False"):
        get("acme/old", parts=("",))
    assert hub.gets() == []
    assert "diffusion_pytorch_model.bin" in files(get("acme/old", parts=("",), use_safetensors=False))


def test_cut_connection_is_resumed(get: Any, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100)
    hub.faults.append(Fault(path=TRANSFORMER, method="GET", cut=700, times=1))
    folder = get()
    ranges = [wanted for method, path, wanted in hub.requests if method == "GET" and path.endswith(TRANSFORMER)]
    assert ranges == [None, "bytes=700-"]
    assert (folder / TRANSFORMER).read_bytes() == PIPELINE[TRANSFORMER]


def test_interrupted_download_keeps_finished_files(get: Any, hub: Hub) -> None:
    hub.faults.append(Fault(path=TRANSFORMER, status=500))
    with pytest.raises(ModelNotFound, match=r"status 500 .*try again later") as caught:
        get()
    assert caught.value.__cause__ is not None
    finished = set(hub.gets()) - {TRANSFORMER}
    hub.faults.clear()
    folder = get()
    assert files(folder) == PLAIN
    assert TRANSFORMER in hub.gets()
    assert not finished & set(hub.gets())


def test_damage_on_the_way_is_found_and_removed(get: Any, hub: Hub) -> None:
    hub.faults.append(Fault(path=TRANSFORMER, method="GET", garble=True, times=1))
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model.safetensors was damaged .*load it again"):
        get()
    assert (get() / TRANSFORMER).read_bytes() == PIPELINE[TRANSFORMER]
    assert hub.gets() == [TRANSFORMER]


PAGE = b"<!DOCTYPE html><html><body>Please sign in to this network.</body></html>"


@pytest.mark.parametrize("file", [TRANSFORMER, "vae/config.json", "model_index.json"])
def test_web_page_instead_of_a_file_is_found_and_removed(get: Any, hub: Hub, file: str) -> None:
    hub.push(REPO, {**PIPELINE, "vae/config.json": CONFIG + b" " * 200, file: PIPELINE[file] + b" " * 200})
    hub.faults.append(Fault(path=file, method="GET", body=PAGE, times=1))
    with pytest.raises(
        CheckpointError, match=rf"{Path(file).name} was damaged .*outside a network that asks"
    ) as caught:
        get()
    assert one_sentence(caught.value)
    assert (get() / file).read_bytes() == PIPELINE[file] + b" " * 200


def test_small_files_that_are_no_json_are_taken_as_they_come(get: Any, hub: Hub) -> None:
    hub.push(REPO, {**PIPELINE, "tokenizer/words.txt": b"<html>"})
    assert (get() / "tokenizer/words.txt").read_bytes() == b"<html>"


def test_what_a_cache_lacks_is_told_without_its_index(get: Any, tmp_path: Path) -> None:
    assert missing_files(tmp_path, None, None) == ("model_index.json",)


def test_web_page_instead_of_the_hub(get: Any, hub: Hub) -> None:
    hub.faults.append(Fault(path="/api/", body=PAGE))
    with pytest.raises(
        ModelNotFound, match=r"answered for by something else, perhaps the login page .*try again"
    ) as caught:
        get()
    assert one_sentence(caught.value)


def test_silent_hub_is_given_up(get: Any, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert module.REQUEST_TIMEOUT <= 10
    monkeypatch.setattr(module, "REQUEST_TIMEOUT", 2)
    hub.faults.append(Fault(path="/api/", delay=30))
    with pytest.raises(ModelNotFound, match=r"could not be used \(ReadTimeout\)") as caught:  # not after its answer
        get()
    assert one_sentence(caught.value)
    assert len(hub.requests) == 1, "nothing is tried twice before the hub has spoken once"


@pytest.mark.parametrize("revision", ["v9", "../../etc", "a b", "refs/pr/1", "x" * 300])
def test_wrong_revisions_are_named(get: Any, hub: Hub, revision: str) -> None:
    with pytest.raises(ModelNotFound, match=r"has no revision|could not be used|answered with status"):
        get(revision=revision)
    assert hub.gets() == []


def test_repository_that_lists_what_it_has_not(get: Any, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_lacks", lambda *args, **options: ("vae/config.json",))
    with pytest.raises(ModelNotFound, match=r"has no vae/config.json: it is no model of this kind"):
        get()


def test_hub_libraries_without_a_listing_are_served_too(get: Any, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    folder = get()
    monkeypatch.setattr(huggingface_hub, "get_cached_repo_tree", None, raising=False)
    assert get() == folder
    assert hub.requests == []


def test_a_blob_that_rotted_in_the_cache_is_found_at_loading(get: Any) -> None:
    from sana.checkpoints.digests import verify

    path = get() / TRANSFORMER
    assert verify(path)
    content = bytearray(path.read_bytes())
    content[77] ^= 1
    path.resolve().write_bytes(content)
    with pytest.raises(CheckpointError, match="its SHA-256 differs"):
        verify(path)


def test_the_folder_of_the_built_in_model_is_known(tmp_path: Path) -> None:
    card = CARDS["nano"]
    assert is_built_in(locate("nano").folder, card)
    assert not is_built_in(tmp_path, card)
    assert not is_built_in(locate("nano").folder, CARDS["sana-1.6b-1024"])


def test_cut_file_in_the_cache_is_fetched_again_or_named(get: Any, hub: Hub) -> None:
    blob = (get() / TRANSFORMER).resolve()
    blob.write_bytes(WEIGHTS[:100])
    with pytest.raises(ModelNotFound, match=f"offline because its file {TRANSFORMER} is cut short"):
        get(local_files_only=True)
    assert (get() / TRANSFORMER).read_bytes() == PIPELINE[TRANSFORMER]
    assert hub.gets() == [TRANSFORMER]


@pytest.mark.parametrize("status", [500, 502, 503, 404, 401, 403, 429])
def test_hub_in_trouble_without_a_cache(get: Any, hub: Hub, status: int) -> None:
    hub.faults.append(Fault(path=".*", status=status))
    with pytest.raises(ModelNotFound, match=f"status {status}|has no model of that name") as caught:
        get()
    assert one_sentence(caught.value)
    assert caught.value.__cause__ is not None
    assert len(hub.requests) == 1


def test_hub_in_trouble_with_enough_in_the_cache(
    get: Any, hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = get(variant="bf16")
    forget_listings(tmp_path)
    hub.faults.append(Fault(path=".*", status=503))
    with caplog.at_level(logging.WARNING):
        assert get(variant="bf16") == folder
    assert [record.levelname for record in caplog.records if record.name == module.__name__] == ["WARNING"]
    assert folder.name in caplog.text


def test_no_connection(get: Any, tmp_path: Path, hub: Hub) -> None:
    with pytest.raises(ModelNotFound, match=r"http://127.0.0.1:9 could not be used .*pass a folder") as caught:
        locate(REPO, endpoint="http://127.0.0.1:9", cache_dir=tmp_path / "cache")
    assert one_sentence(caught.value)


@pytest.mark.parametrize("way", ["argument", "environment"])
def test_offline_and_incomplete(get: Any, hub: Hub, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    get(parts=("vae",))
    if way == "environment":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFound, match=r"cannot be loaded offline because not all .*HF_HUB_OFFLINE") as caught:
        get(local_files_only=way == "argument")
    assert one_sentence(caught.value)
    assert hub.requests == []


def test_unknown_repository_revision_and_gate(get: Any, hub: Hub) -> None:
    with pytest.raises(ModelNotFound, match=r"no folder 'acme/sana-tiiny' here.*has no model of that name"):
        get("acme/sana-tiiny")
    with pytest.raises(ModelNotFound, match=r"Did you mean 'Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers'\?"):
        get("efficient-large-model/Sana_1600M_1024px_BF16_diffuser")
    with pytest.raises(ModelNotFound, match="has no revision 'v9'"):
        get(revision="v9")
    hub.faults.append(Fault(path=".*", status=403, code="GatedRepo"))
    with pytest.raises(ModelNotFound, match=r"is gated: accept its terms at .*hf auth login"):
        get()


def test_repository_of_another_kind(get: Any, hub: Hub) -> None:
    hub.push("acme/text", {"README.md": b"", "notes.txt": b""})
    with pytest.raises(ModelNotFound, match="holds no model in the known layout"):
        get("acme/text")


def test_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "acme" / "sana-tiny").mkdir(parents=True)
    assert locate(REPO).folder == Path(REPO), "a folder goes before a hub id of the same name"
    assert locate(tmp_path).folder == tmp_path
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(InvalidInput, match="is a file; give the model folder"):
        locate(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("./outputs/finla", r"There is no model folder './outputs/finla'\. Did you mean 'final'\?"),
        ("~/no/such/thing", r"There is no model folder"),
        ("a/b/c", r"There is no model folder"),
        ("sana-1.6b-104", r"There is no model 'sana-1.6b-104'\. Did you mean 'sana-1.6b-1024'\? Known names: nano, "),
        ("output", r"Did you mean 'outputs'\?"),
        ("", r"There is no model ''"),
        (" ", r"There is no model ' '"),
    ],
)
def test_unknown_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, says: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "final").mkdir(parents=True)
    with pytest.raises(ModelNotFound, match=says):
        locate(name)


def test_mistyped_relative_path_that_looks_like_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: Hub
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "final").mkdir(parents=True)
    for options in ({"local_files_only": True}, {"endpoint": "http://127.0.0.1:9"}):
        with pytest.raises(ModelNotFound, match=r"no folder 'outputs/finla' here either\. Did you mean 'final'\?"):
            locate("outputs/finla", cache_dir=tmp_path / "cache", **options)


def test_built_in_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.resources.files", lambda package: tmp_path)
    with pytest.raises(ModelNotFound, match="'nano' is not part of this installation"):
        locate("nano")
    (tmp_path / "assets" / "nano").mkdir(parents=True)
    found = locate("nano")
    assert (found.folder, found.card) == (tmp_path / "assets" / "nano", CARDS["nano"])


def one_sentence(error: Exception) -> bool:
    text = str(error)
    return "\n" not in text and len(text) < 300


def test_the_built_in_name_goes_before_a_folder_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nano").mkdir()
    assert locate("nano").card is CARDS["nano"]
    assert locate("nano").folder.resolve() != (tmp_path / "nano").resolve()
    for spelled in ("./nano", Path("nano"), str(tmp_path / "nano")):
        assert locate(spelled).folder.resolve() == (tmp_path / "nano").resolve()
    (tmp_path / "nano").rmdir()
    assert locate(Path("nano")).card is CARDS["nano"]
