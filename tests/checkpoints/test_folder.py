"""Whole pipelines from and to folders, both ways with the reference."""

import json
import logging
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import tiny_pipeline
import torch
from fake_hub import Hub
from safetensors.torch import load_file, save_file
from tiny_pipeline import parts, same

from sana.checkpoints import folder as module
from sana.checkpoints.autoencoder import AutoencoderDC
from sana.checkpoints.folder import load_parts, save_parts
from sana.checkpoints.hub import locate
from sana.checkpoints.layout import sole_variant
from sana.checkpoints.pretrained import SanaTransformer2DModel
from sana.checkpoints.schedulers import DPMSolverMultistepScheduler, SCMScheduler
from sana.checkpoints.text_parts import no_progress_bars
from sana.errors import CheckpointError, InvalidInput, ModelNotFound
from sana.flow import schedulers as flow

MODELS = ("text_encoder", "vae", "transformer")


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    return parts()


@pytest.fixture(scope="module")
def whole(made: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved pipeline that no test changes."""
    folder = tmp_path_factory.mktemp("whole")
    save_parts(folder, made)
    return folder


@pytest.fixture
def saved(whole: Path, tmp_path: Path) -> Path:
    """A copy of the saved pipeline to damage."""
    return shutil.copytree(whole, tmp_path / "copy")


def all_same(one: Any, other: dict[str, Any]) -> bool:
    take = one.get if isinstance(one, dict) else lambda name: getattr(one, name)
    return all(same(take(name), other[name]) for name in MODELS)


WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "variant": {"variant": "fp16"},
    "sharded": {"max_shard_size": "20KB"},
    "sharded variant": {"variant": "bf16", "max_shard_size": "20KB"},
    "pickled": {"safe_serialization": False},
}


def reading(way: str) -> dict[str, Any]:
    options: dict[str, Any] = {"variant": WAYS[way].get("variant")}
    return options | ({"use_safetensors": False} if way == "pickled" else {})


@pytest.mark.parametrize("way", WAYS)
def test_reference_loads_what_we_save(made: dict[str, Any], tmp_path: Path, way: str) -> None:
    from diffusers import SanaPipeline

    save_parts(tmp_path, made, **WAYS[way])
    assert bool(list(tmp_path.rglob("*-of-*"))) == ("sharded" in way)
    pipe = SanaPipeline.from_pretrained(tmp_path, variant=WAYS[way].get("variant"))
    assert all_same(pipe, made)
    assert pipe.tokenizer("a fox").input_ids == made["tokenizer"]("a fox").input_ids
    assert type(pipe.scheduler).__name__ == "DPMSolverMultistepScheduler"
    assert {name: pipe.scheduler.config[name] for name in made["scheduler"].config} == dict(made["scheduler"].config)
    assert pipe.transformer.config["num_layers"] == 2
    assert pipe.vae.config["encoder_qkv_multiscales"] == [[], [5]]


@pytest.mark.parametrize("way", WAYS)
def test_we_load_what_the_reference_saves(made: dict[str, Any], tmp_path: Path, way: str) -> None:
    import diffusers

    oracle = {
        "transformer": diffusers.SanaTransformer2DModel(**tiny_pipeline.TRANSFORMER),
        "vae": diffusers.AutoencoderDC(**tiny_pipeline.AUTOENCODER),
    }
    for name, model in oracle.items():
        model.load_state_dict(made[name].state_dict())
    scheduler = diffusers.DPMSolverMultistepScheduler(**tiny_pipeline.SCHEDULER)
    kept = {"tokenizer": made["tokenizer"], "text_encoder": made["text_encoder"]}
    diffusers.SanaPipeline(**kept, **oracle, scheduler=scheduler).save_pretrained(tmp_path, **WAYS[way])
    loaded = load_parts(tmp_path, **reading(way))
    assert all_same(loaded, made)
    assert loaded["tokenizer"]("a fox").input_ids == made["tokenizer"]("a fox").input_ids
    assert type(loaded["scheduler"]) is DPMSolverMultistepScheduler
    assert loaded["scheduler"].flow_shift == 3.0
    assert loaded["scheduler"].config.lambda_min_clipped == -float("inf")
    assert not any(loaded[name].training for name in MODELS)


@pytest.mark.parametrize("way", WAYS)
def test_round_trip(made: dict[str, Any], tmp_path: Path, way: str) -> None:
    save_parts(tmp_path, made, **WAYS[way])
    loaded = load_parts(tmp_path, **reading(way))
    assert list(loaded) == list(module.COMPONENTS)
    assert all_same(loaded, made)


def test_one_part_may_lack_the_variant(saved: Path, made: dict[str, Any]) -> None:
    tiny_pipeline.stir(tiny_pipeline.transformer(), seed=9).save_pretrained(saved / "transformer", variant="fp16")
    loaded = load_parts(saved, variant="fp16")
    assert same(loaded["vae"], made["vae"])
    assert not same(loaded["transformer"], made["transformer"])


# --- dtypes -----------------------------------------------------------------------------------------------------------

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, (F32, F32, F32)),
        (BF16, (BF16, BF16, BF16)),
        ("bfloat16", (BF16, BF16, BF16)),
        ({"transformer": BF16}, (F32, F32, BF16)),
        ({"transformer": "float16", "default": BF16}, (BF16, BF16, F16)),
        ({"vae": F16, "text_encoder": F16}, (F16, F16, F32)),
        ("auto", (F32, F32, F32)),
    ],
)
def test_dtypes(whole: Path, choice: Any, expected: tuple[torch.dtype, ...], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "sana"):
        loaded = load_parts(whole, torch_dtype=choice)
    assert tuple(loaded[name].dtype for name in MODELS) == expected
    assert caplog.records == []


@pytest.mark.parametrize(
    ("choice", "expected", "named"),
    [
        (F16, (BF16, BF16, F16), "text_encoder and vae"),
        ("float16", (BF16, BF16, F16), "text_encoder and vae"),
        ({"default": F16, "vae": F32}, (BF16, F32, F16), "text_encoder:"),
        ({"default": F16, "text_encoder": F16}, (F16, BF16, F16), "vae:"),
    ],
)
def test_float16_spares_text_encoder_and_autoencoder(
    whole: Path, choice: Any, expected: tuple[torch.dtype, ...], named: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "sana"):
        loaded = load_parts(whole, torch_dtype=choice)
    assert tuple(loaded[name].dtype for name in MODELS) == expected
    assert len(caplog.records) == 1
    assert named in caplog.text
    assert "bfloat16 because float16 overflows" in caplog.text


def test_stored_dtypes(made: dict[str, Any], tmp_path: Path) -> None:
    half = {name: parts()[name].to(F16) for name in MODELS}
    save_parts(tmp_path, {**made, **half})
    assert [load_parts(tmp_path, torch_dtype="auto")[name].dtype for name in MODELS] == [BF16, BF16, F16]
    assert [load_parts(tmp_path, torch_dtype={"vae": "auto"})[name].dtype for name in MODELS] == [F32, F16, F32]
    save_parts(tmp_path, {**made, "text_encoder": parts()["text_encoder"].to(BF16)})
    assert load_parts(tmp_path, only=("text_encoder",))["text_encoder"].dtype == BF16, "as the reference reads it"


def test_half_precision_files_are_read_as_float32_without_a_word(
    made: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_parts(tmp_path, {**made, **{name: parts()[name].to(F16) for name in MODELS}})
    with caplog.at_level(logging.WARNING, "sana"):
        for choice in (None, {"transformer": F32}):
            loaded = load_parts(tmp_path, torch_dtype=choice)
            assert [loaded[name].dtype for name in MODELS] == [F32, F32, F32]
    assert caplog.records == []
    known, variants = module.COMPONENTS, {"text_encoder": None}
    assert module.part_dtypes(tmp_path, None, variants, known, device="cuda") == {"text_encoder": BF16}
    assert len(caplog.records) == 1


def test_wrong_dtypes(whole: Path) -> None:
    with pytest.raises(InvalidInput, match=r"names 'transfomer', which is no part .*Did you mean 'transformer'\?"):
        load_parts(whole, torch_dtype={"transfomer": F16})
    with pytest.raises(InvalidInput, match="torch_dtype is 'fp16'"):
        load_parts(whole, torch_dtype="fp16")


# --- components -------------------------------------------------------------------------------------------------------


def test_components_by_keyword(whole: Path, saved: Path) -> None:
    shutil.rmtree(saved / "vae")
    shutil.rmtree(saved / "text_encoder")
    vae = tiny_pipeline.autoencoder()
    loaded = load_parts(saved, vae=vae, text_encoder=None)
    assert loaded["vae"] is vae
    assert loaded["text_encoder"] is None
    assert loaded["transformer"] is not None
    with pytest.raises(InvalidInput, match=r"no argument 'transfromer'\. Did you mean 'transformer'\?"):
        load_parts(whole, transfromer=None)


def test_only_some_parts(saved: Path) -> None:
    shutil.rmtree(saved / "transformer")
    loaded = load_parts(saved, only=("vae", "scheduler"))
    assert {name for name, part in loaded.items() if part is not None} == {"vae", "scheduler"}
    with pytest.raises(InvalidInput, match=r"no part 'vea' in .*Did you mean 'vae'\?"):
        load_parts(saved, only=("vea",))


def test_absent_parts_are_saved_and_loaded_as_such(made: dict[str, Any], tmp_path: Path) -> None:
    from diffusers import SanaPipeline

    save_parts(tmp_path, {**made, "text_encoder": None, "tokenizer": None})
    assert json.loads((tmp_path / "model_index.json").read_text())["text_encoder"] == [None, None]
    loaded = load_parts(tmp_path)
    assert (loaded["text_encoder"], loaded["tokenizer"]) == (None, None)
    assert SanaPipeline.from_pretrained(tmp_path, text_encoder=None, tokenizer=None).text_encoder is None


def test_other_schedulers(made: dict[str, Any], tmp_path: Path) -> None:
    save_parts(tmp_path, {**made, "scheduler": flow.SCMScheduler(sigma_data=0.25)}, class_name="SanaSprintPipeline")
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "SanaSprintPipeline"
    loaded = load_parts(tmp_path, only=("scheduler",))["scheduler"]
    assert type(loaded) is SCMScheduler
    assert loaded.sigma_data == 0.25
    for name in (tmp_path, tmp_path / "scheduler"):
        assert SCMScheduler.from_pretrained(name).sigma_data == 0.25
    assert SCMScheduler.from_pretrained(tmp_path, subfolder="scheduler").sigma_data == 0.25
    with pytest.raises(ModelNotFound, match=r"no scheduler_config.json in "):
        SCMScheduler.from_pretrained(tmp_path, subfolder="vae")


def test_scheduler_object_of_the_reference_is_saved(made: dict[str, Any], tmp_path: Path) -> None:
    import diffusers

    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=2.5)
    save_parts(tmp_path, {**made, "scheduler": theirs})
    ours = load_parts(tmp_path, only=("scheduler",))["scheduler"]
    assert (type(ours).__name__, ours.shift) == ("FlowMatchEulerDiscreteScheduler", 2.5)
    before = dict(ours.config)
    ours.save_pretrained(tmp_path / "again")
    assert dict(ours.config) == before
    assert diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "again").config.shift == 2.5


def test_compiled_modules_are_saved_as_themselves(made: dict[str, Any], tmp_path: Path) -> None:
    save_parts(tmp_path, {**made, "transformer": torch.compile(made["transformer"], backend="eager")})
    assert all_same(load_parts(tmp_path), made)


# --- failures ---------------------------------------------------------------------------------------------------------


def change_index(folder: Path, **entries: Any) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, **entries}))


def test_missing_variants_and_weights(saved: Path, made: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"`variant=bf16`, but no such modeling files are available\. There are only plain"
    ):
        load_parts(saved, variant="bf16")
    save_parts(tmp_path / "half", made, variant="fp16")
    with pytest.raises(
        OSError, match=r"pass variant='fp16' .*\(Error no file named diffusion_pytorch_model.bin found in directory "
    ):
        load_parts(tmp_path / "half")
    with pytest.raises(ValueError, match=r"`variant=bf16`, but no such modeling files are available\. Available: fp16"):
        load_parts(tmp_path / "half", variant="bf16")
    shutil.rmtree(saved / "vae")
    with pytest.raises(OSError, match=r"Error no file named diffusion_pytorch_model.bin found in directory .*vae"):
        load_parts(saved)


def test_pickles_are_refused(made: dict[str, Any], tmp_path: Path) -> None:
    save_parts(tmp_path, made, safe_serialization=False)
    with pytest.raises(CheckpointError, match="has only pickled weights"):
        load_parts(tmp_path)


def test_the_one_variant_that_will_do_is_found(whole: Path, made: dict[str, Any], tmp_path: Path) -> None:
    assert sole_variant(whole, module.COMPONENTS) is None, "plain weights are there"
    save_parts(tmp_path, made, variant="fp16")
    assert sole_variant(tmp_path, module.COMPONENTS) == "fp16"
    save_parts(tmp_path, made, variant="bf16")
    with pytest.raises(CheckpointError, match="has no plain weights but the variants bf16, fp16: keep one of them"):
        sole_variant(tmp_path, module.COMPONENTS)
    made["vae"].save_pretrained(tmp_path / "vae")
    made["transformer"].save_pretrained(tmp_path / "transformer", variant="third")
    (tmp_path / "transformer" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    assert sole_variant(tmp_path, module.COMPONENTS) == "bf16"


def test_progress_bars_stay_as_they_were() -> None:
    from transformers.utils import logging as transformers_logging

    enabled = transformers_logging.is_progress_bar_enabled()
    for switch in (transformers_logging.disable_progress_bar, transformers_logging.enable_progress_bar):
        switch()
        before = transformers_logging.is_progress_bar_enabled()
        with no_progress_bars():
            assert not transformers_logging.is_progress_bar_enabled()
        assert transformers_logging.is_progress_bar_enabled() is before
    (transformers_logging.enable_progress_bar if enabled else transformers_logging.disable_progress_bar)()


def test_no_pipeline_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"no model_index.json in .*its saving was interrupted"):
        load_parts(tmp_path)


def test_failed_save_leaves_the_folder_as_it_was(
    saved: Path, made: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(AutoencoderDC, "write_files", fail)
    with pytest.raises(OSError, match="No space left"):
        save_parts(saved, {**made, "transformer": tiny_pipeline.transformer(num_layers=1)})
    assert all_same(load_parts(saved), made)


def test_unknown_classes_are_named_before_anything_is_loaded(saved: Path) -> None:
    change_index(saved, transformer=["diffusers", "FluxTransformer2DModel"])
    shutil.rmtree(saved / "text_encoder")
    says = r"Part 'transformer' in .* of class FluxTransformer2DModel.*\(SanaTransformer2DModel\).*transformer=None"
    with pytest.raises(CheckpointError, match=says):
        load_parts(saved)
    change_index(saved, transformer=["subprocess", "Popen"])
    with pytest.raises(CheckpointError, match="Popen"):
        load_parts(saved)
    change_index(saved, **{"../vae": ["diffusers", "AutoencoderDC"]})
    with pytest.raises(CheckpointError, match=r"names a part '../vae', which is no folder name"):
        load_parts(saved)


def test_parts_that_cannot_be_saved_are_refused_before_anything_is_written(made: dict[str, Any], saved: Path) -> None:
    with pytest.raises(InvalidInput, match="Part 'vae' is a Linear, which cannot be saved"):
        save_parts(saved, {**made, "vae": torch.nn.Linear(1, 1)})
    load_parts(saved)
    with pytest.raises(InvalidInput, match="is a file; give a folder"):
        save_parts(saved / "model_index.json", made)


def edit_encoder(folder: Path, name: str, value: torch.Tensor | None) -> None:
    file = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("norm.weight", None, r"do not fit its config.json: 1 missing, first 'norm.weight'"),
        ("extra.weight", torch.zeros(1), r"do not fit its config.json: 1 unexpected, first 'extra.weight'"),
        ("norm.weight", torch.zeros(5), r"1 of a wrong shape, first 'norm.weight' in model.safetensors: \[5\]"),
        ("norm.weight", torch.full((8,), torch.nan), r"'norm.weight' in .* holds NaN or infinity"),
    ],
)
def test_text_encoder_is_checked_like_the_others(saved: Path, name: str, value: Any, says: str) -> None:
    edit_encoder(saved, name, value)
    with pytest.raises(CheckpointError, match=says) as caught:
        load_parts(saved, only=("text_encoder",))
    assert "\n" not in str(caught.value)


def test_damaged_small_parts(saved: Path) -> None:
    encoder = saved / "text_encoder" / "model.safetensors"
    encoder.write_bytes(encoder.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged or cut short"):
        load_parts(saved, only=("text_encoder",))
    (saved / "tokenizer" / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"The tokenizer in .* cannot be loaded"):
        load_parts(saved, only=("tokenizer",))
    (saved / "tokenizer" / "tokenizer_config.json").unlink()
    with pytest.raises(ModelNotFound, match=r"no tokenizer_config.json in "):
        load_parts(saved, only=("tokenizer",))
    (saved / "scheduler" / "scheduler_config.json").write_text('{"solver_order": 7}')
    with pytest.raises(CheckpointError, match=r"scheduler_config.json cannot be used: .*solver_order=7"):
        load_parts(saved, only=("scheduler",))


def test_code_in_a_folder_is_never_run(saved: Path, tmp_path: Path) -> None:
    for part, file in (("tokenizer", "tokenizer_config.json"), ("text_encoder", "config.json")):
        path = saved / part / file
        config = json.loads(path.read_text())
        path.write_text(
            json.dumps({**config, "auto_map": {"AutoTokenizer": ["evil.T", "evil.T"], "AutoModel": "evil.M"}})
        )
        (saved / part / "evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\nT = M = None\n")
    for part in ("text_encoder", "tokenizer"):
        with pytest.raises(
            CheckpointError, match=r"holds auto_map: the model brings code of its own, which is never run"
        ):
            load_parts(saved, only=(part,))
    assert not (tmp_path / "canary").exists()


# --- the network ------------------------------------------------------------------------------------------------------


def test_a_folder_is_loaded_without_any_connection(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def connect(self: socket.socket, address: Any) -> None:
        tried.append(address)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", connect)
    load_parts(whole)
    SanaTransformer2DModel.from_pretrained(whole, subfolder="transformer")
    assert tried == []


def test_from_the_hub(hub: Hub, whole: Path, made: dict[str, Any], tmp_path: Path) -> None:
    hub.push("acme/sana", whole)
    where = {"endpoint": hub.url, "cache_dir": tmp_path}
    alone = SanaTransformer2DModel.from_pretrained("acme/sana", subfolder="transformer", **where)
    assert same(alone, made["transformer"])
    assert not any("vae" in name for name in hub.gets())
    assert SanaTransformer2DModel.load_config("acme/sana", subfolder="transformer", **where)["num_layers"] == 2
    assert DPMSolverMultistepScheduler.from_pretrained("acme/sana", subfolder="scheduler", **where).flow_shift == 3
    assert all_same(load_parts(locate("acme/sana", **where).folder), made)
    hub.requests.clear()
    assert all_same(load_parts(locate("acme/sana", **where).folder), made)
    assert same(AutoencoderDC.from_pretrained("acme/sana", subfolder="vae", **where), made["vae"])
    assert hub.requests == []
