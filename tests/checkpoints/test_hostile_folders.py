"""Folders made to harm: absurd configurations, wrong classes, paths that lead out, wrong tokenizers."""

import contextlib
import json
import os
import resource
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_pipeline import AUTOENCODER, FILE, INDEX, TRANSFORMER, autoencoder, load, parts, same, transformer

from sana.checkpoints import text_parts
from sana.checkpoints.autoencoder import AutoencoderDC
from sana.checkpoints.bounds import MAX_DEPTH, MAX_ITEMS, MAX_TEXT, check_config, shown
from sana.checkpoints.folder import load_parts, save_parts
from sana.checkpoints.pretrained import SanaTransformer2DModel
from sana.errors import CheckpointError, InvalidInput, ModelNotFound, SanaError
from sana.memory.trimming import give_back


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    return parts()


@pytest.fixture(scope="module")
def whole(made: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    save_parts(folder, made)
    return folder


@pytest.fixture
def pipeline(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "copy")


def change(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


# --- A10: configurations ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"num_layers": 10**9}, "sets num_layers to 1000000000, which no real model has"),
        ({"num_layers": 10**4000}, "sets num_layers to 1000.*, which no real model has"),
        ({"num_layers": 5000}, "asks for 5000 num_layers but the files hold only"),
        ({"attention_head_dim": -8}, r"describes no model that can be built: .*attention_head_dim is -8"),
        ({"mlp_ratio": 1e300}, r"sets mlp_ratio to 1e\+300, which no real model has"),
        ({"mlp_ratio": float("inf")}, "sets mlp_ratio to inf, which no real model has"),
        ({"patch_size": [[[[[[[[[[1]]]]]]]]]]}, "sets patch_size to lists inside lists too deep, which"),
        ({"sample_size": list(range(MAX_ITEMS + 1))}, "sets sample_size to 4097 entries, which no real model has"),
        ({"qk_norm": "x" * (MAX_TEXT + 1)}, "sets qk_norm to a text of 4097 letters, which no real model has"),
        ({"qk_norm": "rms\n" * 100}, "qk_norm"),
        ({"auto_map": {"AutoModel": "evil.M"}}, "holds auto_map: the model brings code of its own, which is never run"),
        ({"custom_pipeline": "evil"}, "holds custom_pipeline: the model brings code of its own"),
        ({"quantization_config": {"quant_method": "x"}}, "holds quantization_config: the model is quantised"),
        ({"_class_name": "x" * 1000}, "is the configuration of xxx.*, not of SanaTransformer2DModel: load it with"),
        ({"_class_name": ["os", "system"]}, r"is the configuration of \['os', 'system'\], not of"),
        ({"x" * 5000: 1 << 60}, "sets xxx.* to 1152921504606846976, which no real model has"),
    ],
)  # fmt: skip
def test_absurd_configurations_are_refused(saved: Path, config: dict[str, Any], says: str) -> None:
    (saved / "config.json").write_text(json.dumps({**TRANSFORMER, **config}))
    with pytest.raises(CheckpointError, match=says) as caught:
        load(saved)
    assert len(str(caught.value)) < 900
    assert "\n" not in str(caught.value)


NUMBERS = st.sampled_from([0, -1, 1, 2, 3, 7, 64, 4096, 1 << 24, 1 << 25, 10**9, 1 << 63, True, None, 0.5, -2.5, 1e18])
VALUES = st.one_of(
    NUMBERS, st.text(max_size=5), st.lists(NUMBERS, max_size=3), st.lists(st.lists(NUMBERS, max_size=2), max_size=7)
)


@pytest.mark.filterwarnings("ignore:.*has no field.*:UserWarning")
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_random_configurations_never_do_more_than_fail(tmp_path: Path, data: st.DataObject) -> None:
    made = {"transformer": (SanaTransformer2DModel, TRANSFORMER), "vae": (AutoencoderDC, AUTOENCODER)}
    if not (tmp_path / "vae").exists():
        transformer().save_pretrained(tmp_path / "transformer")
        autoencoder().save_pretrained(tmp_path / "vae")
        for name, (kind, _) in made.items():
            kind.from_pretrained(tmp_path / name)  # what is imported on the way counts before memory is limited
    part = data.draw(st.sampled_from(sorted(made)))
    cls, fields = made[part]
    keys = data.draw(st.lists(st.sampled_from(sorted(fields)), min_size=1, max_size=3))
    config = {**fields, **{key: data.draw(VALUES) for key in keys}}
    (tmp_path / part / "config.json").write_text(json.dumps(config))
    with _memory(256 << 20), contextlib.suppress(SanaError):
        cls.from_pretrained(tmp_path / part)


class _memory:
    """Limits the memory of this process for the length of a block, where the system can."""

    def __init__(self, more: int) -> None:
        self.more = more

    def __enter__(self) -> None:
        self.kept = resource.getrlimit(resource.RLIMIT_AS)
        if sys.platform == "linux":
            give_back()  # what earlier tests freed would serve an allocation without any further memory
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + self.more, self.kept[1]))

    def __exit__(self, *failure: object) -> None:
        resource.setrlimit(resource.RLIMIT_AS, self.kept)


def test_values_are_shown_in_one_short_line() -> None:
    assert shown("plain") == "plain"
    assert shown("two\nlines") == r"'two\nlines'"
    assert shown(["x"]) == "['x']"
    assert len(shown("x" * 100_000)) == 80
    deep: Any = 1
    for _ in range(MAX_DEPTH):
        deep = [deep]
    with pytest.raises(CheckpointError, match="lists inside lists"):
        check_config({"a": deep}, Path("x"), num_tensors=1)
    check_config({"a": deep[0]}, Path("x"), num_tensors=1)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"num_hidden_layers": 10**6}, "asks for 1000000 num_hidden_layers but the files hold only"),
        ({"num_hidden_layers": 3}, "missing, first 'layers.2|describes no text encoder that can be built"),
        ({"hidden_size": 1 << 30}, "sets hidden_size to 1073741824"),
        ({"hidden_size": 1 << 20}, "of a wrong shape, first"),
        ({"hidden_size": -8}, "describes no text encoder that can be built"),
        ({"hidden_activation": "no_such"}, "describes no text encoder that can be built"),
        ({"vocab_size": 17}, r"of a wrong shape, first 'embed_tokens.weight' in model.safetensors: \[16, 8\]"),
        ({"auto_map": {"AutoModel": "evil.M"}}, "holds auto_map"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "holds quantization_config"),
    ],
)
def test_absurd_text_encoders_are_refused(pipeline: Path, config: dict[str, Any], says: str) -> None:
    path = pipeline / "text_encoder" / "config.json"
    change(path, **config)
    if "num_hidden_layers" in config:
        change(path, layer_types=None)
    with pytest.raises(CheckpointError, match=says) as caught:
        load_parts(pipeline, only=("text_encoder",))
    assert "\n" not in str(caught.value)


def test_text_encoders_with_and_without_a_head_read_each_other_s_files(pipeline: Path, made: dict[str, Any]) -> None:
    from transformers import Gemma2ForCausalLM

    folder = pipeline / "text_encoder"
    headed = text_parts.load_text_encoder(folder, "Gemma2ForCausalLM", dtype=torch.float32)
    assert same(headed.model, made["text_encoder"])
    assert headed.lm_head.weight is headed.model.embed_tokens.weight
    save_parts(pipeline, {**made, "text_encoder": headed})
    assert json.loads((pipeline / "model_index.json").read_text())["text_encoder"] == [
        "transformers",
        "Gemma2ForCausalLM",
    ]
    assert (folder / "generation_config.json").exists()
    assert same(text_parts.load_text_encoder(folder, "Gemma2Model", dtype=torch.float32), made["text_encoder"])
    assert same(Gemma2ForCausalLM.from_pretrained(folder), headed), "the public library reads it too"
    headed.config.tie_word_embeddings = False
    headed.lm_head.weight = torch.nn.Parameter(headed.lm_head.weight.detach() + 1)
    save_parts(pipeline, {**made, "text_encoder": headed})
    again = text_parts.load_text_encoder(folder, "Gemma2ForCausalLM", dtype=torch.float32)
    assert same(again, headed)
    with pytest.raises(CheckpointError, match=r"1 unexpected, first 'lm_head.weight'"):
        text_parts.load_text_encoder(folder, "Gemma2Model", dtype=torch.float32)


# --- A12: tokenizers --------------------------------------------------------------------------------------------------


def test_tokenizers_of_another_model_are_refused(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sana

    nano = Path(sana.__file__).parent / "assets" / "nano" / "tokenizer"
    shutil.rmtree(pipeline / "tokenizer")
    shutil.copytree(nano, pipeline / "tokenizer")
    with pytest.raises(
        CheckpointError, match=r"has \d{4} tokens and the text encoder 16: they belong to different models"
    ):
        load_parts(pipeline)
    assert load_parts(pipeline, only=("tokenizer",))["tokenizer"] is not None
    encoder = torch.nn.Module()
    encoder.get_input_embeddings = lambda: torch.nn.Embedding(256_000, 1)  # type: ignore[assignment]
    text_parts.check_vocabulary(range(255_000), encoder, pipeline)
    with pytest.raises(CheckpointError, match="has 4096 tokens and the text encoder 256000"):
        text_parts.check_vocabulary(range(4096), encoder, pipeline)


def test_damaged_tokenizers_are_refused(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pipeline / "tokenizer"
    words = (folder / "tokenizer.json").read_bytes()
    for length in range(0, len(words), max(1, len(words) // 40)):
        (folder / "tokenizer.json").write_bytes(words[:length])
        with pytest.raises(CheckpointError, match=r"The tokenizer in .* cannot be loaded") as caught:
            load_parts(pipeline, only=("tokenizer",))
        assert "\n" not in str(caught.value)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelNotFound, match=r"There is no tokenizer.json in .*tokenizer, so there are no words"):
        load_parts(pipeline, only=("tokenizer",))
    (folder / "tokenizer.json").write_bytes(words)
    monkeypatch.setattr(text_parts, "MAX_TOKENIZER", len(words) - 1)
    with pytest.raises(CheckpointError, match=r"tokenizer.json has more than \d+ MB, which no tokenizer's has"):
        load_parts(pipeline, only=("tokenizer",))


# --- model_index.json and paths ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        (
            {"vae": ["diffusers", "SanaTransformer2DModel"]},
            r"Part 'vae' .* is of class SanaTransformer2DModel.*\(AutoencoderDC\)",
        ),
        ({"tokenizer": ["transformers", "Gemma2Model"]}, r"Part 'tokenizer' .* is of class Gemma2Model"),
        ({"vae": ["os", "system\n" + "x" * 1000]}, r"Part 'vae' .* is of class '?system"),
        ({"vae": "AutoencoderDC"}, "must name library and class of part 'vae'"),
        ({"vae": ["diffusers", "AutoencoderDC", "more"]}, "must name library and class of part 'vae'"),
        ({"vae": ["diffusers", {"a": 1}]}, "must name library and class of part 'vae'"),
        ({"../vae": ["diffusers", "AutoencoderDC"]}, r"names a part '\.\./vae', which is no folder name"),
        ({"guard": ["evil", "Guard"]}, r"Part 'guard' .* is of class Guard, which is not among the known ones"),
    ],
)
def test_wrong_entries_of_the_index_are_refused(pipeline: Path, entries: dict[str, Any], says: str) -> None:
    change(pipeline / "model_index.json", **entries)
    with pytest.raises(CheckpointError, match=says) as caught:
        load_parts(pipeline)
    assert len(str(caught.value)) < 600
    assert "\n" not in str(caught.value)


def test_flags_in_the_index_are_no_parts(pipeline: Path) -> None:
    change(pipeline / "model_index.json", requires_safety_checker=False)
    assert "requires_safety_checker" not in load_parts(pipeline, only=("scheduler",))


def test_a_part_that_the_index_forgets_is_named(pipeline: Path) -> None:
    path = pipeline / "model_index.json"
    index = json.loads(path.read_text())
    del index["vae"]
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model_index.json lists no vae: .*pass vae= an object, or vae=None"):
        load_parts(pipeline)
    assert load_parts(pipeline, vae=None)["vae"] is None
    assert load_parts(pipeline, only=("scheduler",))["vae"] is None


@pytest.mark.parametrize("name", ["../up", "/etc", "a/../../b"])
def test_a_subfolder_stays_inside(pipeline: Path, name: str) -> None:
    with pytest.raises(InvalidInput, match=r"subfolder is .*; it must name a folder inside the model's"):
        SanaTransformer2DModel.from_pretrained(pipeline / "transformer", subfolder=name)
    with pytest.raises(InvalidInput, match=r"subfolder is "):
        SanaTransformer2DModel.load_config(pipeline / "transformer", subfolder=name)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "..\\x", "a/b.safetensors", "", ".", ".."])
def test_an_index_of_shards_stays_inside(saved: Path, name: str) -> None:
    transformer().save_pretrained(saved, max_shard_size="40KB")
    index = json.loads((saved / INDEX).read_text())
    first = next(iter(index["weight_map"]))
    index["weight_map"][first] = name
    (saved / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"points outside its folder|are missing, first"):
        load(saved)


@pytest.mark.skipif(os.name != "posix", reason="needs links")
def test_links_are_followed_but_tell_nothing_of_what_they_point_to(saved: Path, tmp_path: Path) -> None:
    """The hub's cache is made of links, and people keep weights on another disk."""
    (tmp_path / "disk").mkdir()
    (saved / FILE).rename(tmp_path / "disk" / "w")
    (saved / FILE).symlink_to(tmp_path / "disk" / "w")
    assert same(load(saved), transformer())
    secret = tmp_path / "secret"
    secret.write_text("password: hunter2, and more of this kind")
    for name in (FILE, "config.json"):
        (saved / name).unlink()
        (saved / name).symlink_to(secret)
        with pytest.raises(CheckpointError) as caught:
            load(saved)
        assert "hunter2" not in str(caught.value)
        if name == FILE:
            (saved / FILE).unlink()
            (saved / FILE).symlink_to(tmp_path / "disk" / "w")
    (saved / "config.json").unlink()
    (saved / "config.json").symlink_to(saved / "config.json")
    with pytest.raises(SanaError, match=r"config\.json cannot be read|no config\.json"):
        load(saved)
