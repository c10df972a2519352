"""The public model classes: building, saving, loading, and every way in which files can be wrong."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pipeline import AUTOENCODER, TRANSFORMER, autoencoder, same, stir, transformer

from sana.checkpoints import weights as weights_module
from sana.checkpoints.layout import PARTS, find_weights
from sana.checkpoints.pretrained import AutoencoderDC, SanaTransformer2DModel
from sana.checkpoints.weights import inspect, load_into
from sana.config import TransformerConfig
from sana.errors import CheckpointError, InvalidInput, ModelNotFound, NonFinite
from sana.memory import tiling

FILE = "diffusion_pytorch_model.safetensors"
INDEX = FILE + ".index.json"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A tiny transformer in a folder."""
    transformer().save_pretrained(tmp_path)
    return tmp_path


def load(folder: Path, **options: Any) -> SanaTransformer2DModel:
    return SanaTransformer2DModel.from_pretrained(folder, **options)


# --- building and configuration ---------------------------------------------------------------------------------------


def test_constructor_takes_the_documented_fields() -> None:
    model = transformer()
    assert (model.config.in_channels, model.config["num_layers"], model.config.dropout) == (4, 2, 0.0)
    assert isinstance(model.config, TransformerConfig)
    assert dict(model.config)["caption_channels"] == 8
    assert set(model.config) == set(model.config.to_dict())
    assert "qk_norm" in model.config
    assert len(model.config) == len(dict(**model.config))
    assert model.config == transformer().config
    with pytest.raises(KeyError):
        model.config["inner_dim"]
    with pytest.raises(AttributeError):
        model.config.num_layers = 3  # type: ignore[misc]


def test_constructor_refuses_unknown_fields() -> None:
    with pytest.raises(
        InvalidInput, match=r"SanaTransformer2DModel has no argument 'num_layer'\. Did you mean 'num_layers'\?"
    ):
        SanaTransformer2DModel(num_layer=2)
    with pytest.raises(InvalidInput, match="qk_norm"):
        SanaTransformer2DModel(qk_norm="rms")


@pytest.mark.parametrize("kind", [dict, lambda config: config, lambda config: config.to_dict()])
def test_from_config(kind: Callable[[Any], Any]) -> None:
    model = transformer()
    again = SanaTransformer2DModel.from_config(kind(model.config))
    assert again.config == model.config
    assert SanaTransformer2DModel.from_config(model.config, num_layers=1).config.num_layers == 1
    with pytest.warns(UserWarning, match="no field 'new_thing'"):
        SanaTransformer2DModel.from_config({**TRANSFORMER, "new_thing": 1, "_private": 2})


def test_properties() -> None:
    model = transformer().to(torch.bfloat16)
    assert (model.dtype, model.device.type) == (torch.bfloat16, "cpu")
    assert model.num_parameters() == sum(p.numel() for p in model.parameters())
    model.requires_grad_(False).proj_out.requires_grad_(True)
    assert model.num_parameters(only_trainable=True) == 16 * 4 + 4
    assert model.is_gradient_checkpointing is False
    model.enable_gradient_checkpointing()
    assert model.gradient_checkpointing is True
    model.disable_gradient_checkpointing()
    assert model.is_gradient_checkpointing is False


# --- round trips ------------------------------------------------------------------------------------------------------

WAYS: dict[str, tuple[dict[str, Any], dict[str, Any], set[str]]] = {
    "plain": ({}, {}, {FILE}),
    "variant": ({"variant": "fp16"}, {"variant": "fp16"}, {"diffusion_pytorch_model.fp16.safetensors"}),
    "sharded": (
        {"max_shard_size": "30KB"},
        {},
        {INDEX, *(f"diffusion_pytorch_model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4))},
    ),
    "sharded variant": (
        {"max_shard_size": 40_000, "variant": "bf16"},
        {"variant": "bf16"},
        {
            "diffusion_pytorch_model.safetensors.index.bf16.json",
            *(f"diffusion_pytorch_model.bf16-0000{i}-of-00003.safetensors" for i in (1, 2, 3)),
        },
    ),
    "pickled": ({"safe_serialization": False}, {"use_safetensors": False}, {"diffusion_pytorch_model.bin"}),
    "pickled shards": (
        {"safe_serialization": False, "max_shard_size": "40KB"},
        {"use_safetensors": False},
        {
            "diffusion_pytorch_model.bin.index.json",
            *(f"diffusion_pytorch_model-0000{i}-of-00003.bin" for i in (1, 2, 3)),
        },
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_round_trip(tmp_path: Path, way: str) -> None:
    save_options, load_options, names = WAYS[way]
    model = transformer(qk_norm="rms_norm_across_heads", guidance_embeds=True)
    model.save_pretrained(tmp_path, **save_options)
    assert {path.name for path in tmp_path.iterdir()} == names | {"config.json"}
    again = load(tmp_path, **load_options)
    assert same(again, model)
    assert again.config == model.config
    assert not again.training
    assert all(weight.requires_grad for weight in again.parameters())
    assert not any(tensor.is_meta for tensor in (*again.parameters(), *again.buffers()))


def test_autoencoder_round_trip_with_integer_buffers(tmp_path: Path) -> None:
    model = autoencoder(decoder_norm_types="batch_norm", decoder_act_fns=("relu", "silu"))
    model.save_pretrained(tmp_path)
    again = AutoencoderDC.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert again.config == model.config
    kinds = {tensor.dtype for tensor in again.state_dict().values()}
    assert kinds == {torch.bfloat16, torch.int64}
    assert same(AutoencoderDC.from_pretrained(tmp_path), model)


def test_config_file_is_the_published_form(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    assert config["_class_name"] == "SanaTransformer2DModel"
    assert "_diffusers_version" in config
    assert SanaTransformer2DModel.load_config(saved) == config


def test_saving_again_leaves_no_stale_weights(tmp_path: Path) -> None:
    model = transformer()
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    model.save_pretrained(tmp_path, variant="fp16", max_shard_size="30KB")
    stir(model, seed=5).save_pretrained(tmp_path)
    assert same(load(tmp_path), model)
    assert not (tmp_path / INDEX).exists()
    assert not same(load(tmp_path, variant="fp16"), model), "another variant is another set of files"
    stir(model, seed=6).save_pretrained(tmp_path, max_shard_size="40KB")
    assert same(load(tmp_path), model)
    assert not (tmp_path / FILE).exists()


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, torch.float32),
        ({"torch_dtype": torch.bfloat16}, torch.bfloat16),
        ({"dtype": torch.float16}, torch.float16),
        ({"torch_dtype": "bfloat16"}, torch.bfloat16),
        ({"torch_dtype": "torch.float64"}, torch.float64),
        ({"torch_dtype": "auto"}, torch.float16),
    ],
)
def test_dtype_of_half_precision_files(tmp_path: Path, options: dict[str, Any], dtype: torch.dtype) -> None:
    model = transformer().half()
    model.save_pretrained(tmp_path)
    again = load(tmp_path, **options)
    assert again.dtype == dtype
    assert same(again, model.to(dtype))


def test_load_does_not_disturb_the_default_dtype_or_generator(saved: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    load(saved, torch_dtype=torch.float16)
    assert torch.rand(1) == expected
    assert torch.get_default_dtype() == torch.float32


def test_parts_of_a_pipeline_folder(tmp_path: Path) -> None:
    autoencoder().save_pretrained(tmp_path / "vae")
    (tmp_path / "model_index.json").write_text("{}")
    assert AutoencoderDC.from_pretrained(tmp_path, subfolder="vae").config.latent_channels == 4
    with pytest.raises(InvalidInput, match="folder of a pipeline; pass subfolder='transformer' or subfolder='vae'"):
        AutoencoderDC.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="configuration of AutoencoderDC, not of SanaTransformer2DModel"):
        SanaTransformer2DModel.from_pretrained(tmp_path, subfolder="vae")
    with pytest.raises(ModelNotFound, match=r"no config.json in .*transformer"):
        SanaTransformer2DModel.from_pretrained(tmp_path, subfolder="transformer")


# --- wrong arguments --------------------------------------------------------------------------------------------------


def test_arguments_are_checked(saved: Path) -> None:
    load(saved, low_cpu_mem_usage=True, device_map="cpu")
    for options, says in (
        ({"varient": "fp16"}, r"from_pretrained has no argument 'varient'\. Did you mean 'variant'\?"),
        ({"torch_dtype": "fp8"}, "torch_dtype is 'fp8'; choose 'auto' or one of float32"),
        ({"torch_dtype": torch.int8}, "torch_dtype is torch.int8"),
        ({"device_map": "balanced"}, "device_map is 'balanced'; name one device"),
        ({"variant": "../fp16"}, "variant is '../fp16'"),
    ):
        with pytest.raises(InvalidInput, match=says):
            load(saved, **options)


def test_save_arguments_are_checked(saved: Path) -> None:
    with pytest.raises(InvalidInput, match=r"max_shard_size is '5 apples'"):
        transformer().save_pretrained(saved, max_shard_size="5 apples")
    with pytest.raises(InvalidInput, match="is a file; give a folder"):
        transformer().save_pretrained(saved / FILE)
    transformer().save_pretrained(saved / "not the main process", is_main_process=False)
    assert not (saved / "not the main process").exists()


# --- wrong files ------------------------------------------------------------------------------------------------------


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE)


def put(name: str, value: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.__setitem__(name, value)


def rename(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.__setitem__(new, tensors.pop(old))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda tensors: tensors.pop("proj_out.bias"),
            r"do not fit its config.json: 1 missing, first 'proj_out.bias'\.",
        ),
        (put("extra", torch.zeros(1)), rf"1 unexpected, first 'extra' in {FILE}\."),
        (
            rename("proj_out.bias", "proj_out.bais"),
            r"1 missing, first 'proj_out.bias'; 1 unexpected, first 'proj_out.bais'",
        ),
        (
            put("proj_out.bias", torch.zeros(5)),
            rf"1 of a wrong shape, first 'proj_out.bias' in {FILE}: \[5\] where the config asks for \[4\]",
        ),
        (put("proj_out.bias", torch.tensor([0, 0, torch.nan, 0])), r"'proj_out.bias' in .* holds NaN or infinity"),
        (put("proj_out.bias", torch.tensor([0, 0, -torch.inf, 0])), r"'proj_out.bias' in .* holds NaN or infinity"),
    ],
)
def test_wrong_tensors_are_named(saved: Path, change: Callable[[Any], object], says: str) -> None:
    edit(saved, change)
    with pytest.raises(CheckpointError, match=says) as caught:
        load(saved)
    assert "\n" not in str(caught.value)


def test_every_tensor_is_checked_for_nan(saved: Path) -> None:
    good = load_file(saved / FILE)
    for name in list(good)[::5]:
        edit(saved, lambda tensors, name=name: tensors[name].view(-1)[-1:].fill_(torch.nan))
        with pytest.raises(CheckpointError, match=f"'{name}'"):
            load(saved)
        save_file(good, saved / FILE)


def test_overflow_of_the_wanted_dtype_is_told_apart(saved: Path) -> None:
    edit(saved, put("proj_out.bias", torch.tensor([0.0, 0.0, 7e4, 0.0])))
    with pytest.raises(CheckpointError, match=r"'proj_out.bias' .* does not fit into float16: choose"):
        load(saved, torch_dtype=torch.float16)
    load(saved, torch_dtype=torch.bfloat16)


def test_file_cut_anywhere_is_named(saved: Path) -> None:
    whole = (saved / FILE).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for length in (*range(0, header, 97), header, header + 1, len(whole) // 2, len(whole) - 1):
        (saved / FILE).write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=rf"{FILE} is damaged or cut short .*delete it"):
            load(saved)


def test_file_cut_between_header_and_data_is_an_error_and_no_signal(saved: Path) -> None:
    found = find_weights(saved, PARTS[""])
    stored = inspect(found)
    with torch.device("meta"):
        model = SanaTransformer2DModel(**TRANSFORMER)
    read = weights_module.safe_open

    class CutAfterOpening:
        def __init__(self, path: Path, **options: Any) -> None:
            self.handle = read(path, **options)
            os.truncate(path, 2000 + path.stat().st_size // 4)

        def __enter__(self) -> Any:
            return self.handle.__enter__()

        def __exit__(self, *args: Any) -> None:
            self.handle.__exit__(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights_module, "safe_open", CutAfterOpening)
        with pytest.raises(CheckpointError, match="damaged or cut short"):
            load_into(model, found, stored)


def test_header_flips_never_load_silently(saved: Path) -> None:
    whole = bytearray((saved / FILE).read_bytes())
    header = 8 + int.from_bytes(whole[:8], "little")
    for position in range(0, header, 61):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << (position % 7)
        (saved / FILE).write_bytes(damaged)
        try:
            again = load(saved)
        except CheckpointError:
            continue
        assert same(again, transformer()), f"bit flip at {position} changed the model"


def test_pickle_under_a_safetensors_name(saved: Path) -> None:
    torch.save({"a": torch.zeros(1)}, saved / FILE)
    with pytest.raises(CheckpointError, match="a pickle or an archive under a safetensors name; it is not opened"):
        load(saved)


class Canary:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


def test_pickles_are_refused_unless_allowed_and_never_run(tmp_path: Path) -> None:
    transformer().save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(
        CheckpointError, match=r"only pickled weights \(diffusion_pytorch_model.bin\).*use_safetensors=False"
    ):
        load(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.bin"
    for content in ({"proj_out.bias": Canary(tmp_path / "canary")}, [1], Canary(tmp_path / "canary")):
        torch.save(content, file)
        with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model.bin"):
            load(tmp_path, use_safetensors=False)
        with pytest.raises(CheckpointError, match="only pickled"):
            load(tmp_path)
    torch.save(transformer().state_dict(), file, _use_new_zipfile_serialization=False)
    assert same(load(tmp_path, use_safetensors=False), transformer())
    assert not (tmp_path / "canary").exists()


def test_wrong_shards(tmp_path: Path) -> None:
    transformer().save_pretrained(tmp_path, max_shard_size="40KB")
    index = json.loads((tmp_path / INDEX).read_text())
    shards = sorted(set(index["weight_map"].values()))
    aside = tmp_path / "aside"
    shutil.move(tmp_path / shards[1], aside)
    with pytest.raises(CheckpointError, match=rf"lists 2 files of which 1 are missing, first {shards[1]}"):
        load(tmp_path)
    shutil.copy(tmp_path / shards[0], tmp_path / shards[1])
    with pytest.raises(CheckpointError, match=rf"is in both {shards[0]} and {shards[1]}"):
        load(tmp_path)
    shutil.move(aside, tmp_path / shards[1])
    for name in ("../secret.safetensors", "/etc/passwd", "..\\x"):
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(CheckpointError, match="points outside its folder"):
            load(tmp_path)
    (tmp_path / INDEX).write_text("{}")
    with pytest.raises(CheckpointError, match="has no weight_map"):
        load(tmp_path)


def test_missing_files_and_variants(saved: Path) -> None:
    with pytest.raises(OSError, match=r"no file named diffusion_pytorch_model.fp16.bin found in .*leave variant out"):
        load(saved, variant="fp16")
    shutil.move(saved / FILE, saved / "diffusion_pytorch_model.bf16.safetensors")
    with pytest.raises(
        OSError, match=r"^Error no file named diffusion_pytorch_model.bin found in directory .*pass variant='bf16'"
    ):
        load(saved)
    (saved / "diffusion_pytorch_model.bf16.safetensors").unlink()
    with pytest.raises(OSError, match=r"Error no file named diffusion_pytorch_model.bin found in directory .*: check"):
        load(saved)
    (saved / "config.json").unlink()
    with pytest.raises(ModelNotFound, match=r"no config.json in .*its saving was interrupted"):
        load(saved)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ("{", "config.json is not valid JSON"),
        ("[]", "must hold a JSON object, not a list"),
        ("[" * 100_000, "config.json is not valid JSON"),
        (b"\xff\xfe", "config.json is not valid JSON"),
        ({"num_layers": 1_000_000}, "asks for 1000000 num_layers but the files hold only"),
        ({"num_layers": -1}, "describes no model that can be built: .*num_layers is -1"),
        ({"caption_channels": 1 << 40}, "sets caption_channels to 1099511627776, which no real model has"),
        ({"num_attention_heads": "two"}, "describes no model that can be built: .*num_attention_heads"),
        ({"num_attention_heads": 3, "cross_attention_dim": 24}, "of a wrong shape"),
        ({"_class_name": "FluxTransformer2DModel"}, "is the configuration of FluxTransformer2DModel"),
    ],
)  # fmt: skip
def test_wrong_configurations(saved: Path, config: Any, says: str) -> None:
    if isinstance(config, dict):
        config = json.dumps({**TRANSFORMER, **config})
    (saved / "config.json").write_bytes(config if isinstance(config, bytes) else config.encode())
    with pytest.raises(CheckpointError, match=says):
        load(saved)


# --- memory and interruption ------------------------------------------------------------------------------------------


def peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux to measure peak memory")
def test_loading_peaks_at_about_one_copy(tmp_path: Path) -> None:
    wide = {"num_attention_heads": 64, "cross_attention_dim": 512, "num_layers": 5, "caption_channels": 512}
    model = SanaTransformer2DModel(**{**TRANSFORMER, **wide})
    model.save_pretrained(tmp_path)
    size = sum(weight.numel() * 4 for weight in model.parameters())
    assert size > 80_000_000
    del model
    load(tmp_path)  # warm: lazily loaded code counts too
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_bytes()
    again = load(tmp_path)
    assert (peak_bytes() - before) / size < 1.25
    assert again.num_parameters() * 4 == size


def test_interrupted_save_does_not_look_complete(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []

    def failing(tensors: Any, path: Path, **options: Any) -> None:
        path.write_bytes(b"half")
        written.append(path)
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        save_file(tensors, path, **options)

    monkeypatch.setattr(weights_module, "save_file", failing)
    with pytest.raises(OSError, match="No space left"):
        transformer().save_pretrained(saved, max_shard_size="30KB")
    assert not any(path.exists() for path in written), "nothing half written stays behind"
    with pytest.raises(ModelNotFound, match="its saving was interrupted"):
        load(saved)


def test_files_are_flushed_before_they_get_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[str, str]] = []
    real_sync, real_replace = weights_module.sync, Path.replace

    def sync(path: Path) -> None:
        events.append(("sync", path.name))
        real_sync(path)

    def replace(path: Path, target: Path) -> Path:
        events.append(("name", target.name))
        return real_replace(path, target)

    monkeypatch.setattr(weights_module, "sync", sync)
    monkeypatch.setattr(Path, "replace", replace)
    transformer().save_pretrained(tmp_path, max_shard_size="40KB")
    named = [name for kind, name in events if kind == "name"]
    assert named[-2:] == [INDEX, "config.json"]
    assert len(named) == 4
    for index, (kind, name) in enumerate(events):
        if kind == "name":
            assert events[index - 1] == ("sync", f".{name}.saving-{os.getpid()}")


def test_orphans_of_a_killed_save_are_swept(saved: Path) -> None:
    orphan = saved / f".{FILE}.saving-12345"
    orphan.write_bytes(b"half")
    transformer().save_pretrained(saved)
    assert not orphan.exists()


def test_files_have_the_permissions_of_their_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    transformer().save_pretrained(tmp_path)
    assert {oct(path.stat().st_mode & 0o777) for path in tmp_path.iterdir()} == {"0o644"}


def test_model_that_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    model = transformer()
    with torch.no_grad():
        model.proj_out.bias[1] = torch.nan
    with pytest.raises(NonFinite, match=r"'proj_out.bias' holds NaN or infinity, so the model is not saved"):
        model.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- the autoencoder's memory switches --------------------------------------------------------------------------------


def test_slicing_and_tiling_of_the_autoencoder() -> None:
    model = autoencoder()
    pictures = torch.randn(2, 3, 20, 28, generator=torch.Generator().manual_seed(0))
    latents = model.encode(pictures).latent
    whole = model.decode(latents).sample
    assert (model.use_slicing, model.use_tiling, model.tile_sample_min_height, model.tile_latent_min_width) == (
        False,
        False,
        512,
        256,
    )
    model.enable_slicing()
    torch.testing.assert_close(model.decode(latents).sample, whole)
    torch.testing.assert_close(model.encode(pictures).latent, latents)
    model.disable_slicing()
    model.enable_tiling(8, 12, 6, 8)
    tiles = tiling.Tiling(tile_height=8, tile_width=12, stride_height=6, stride_width=8)
    tiled = model.decode(latents, return_dict=False)[0]
    assert torch.equal(tiled, tiling.tiled_decode(model, latents, tiles))
    assert torch.equal(model.encode(pictures).latent, tiling.tiled_encode(model, pictures, tiles))
    assert not torch.allclose(tiled, whole)
    assert torch.equal(model(pictures).sample, model.decode(model.encode(pictures).latent).sample)
    model.disable_tiling()
    assert torch.equal(model.decode(latents).sample, whole)
    with pytest.raises(InvalidInput, match="cannot cover a picture"):
        model.enable_tiling(tile_sample_min_height=4)


def test_tiling_is_the_reference_s(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    model = autoencoder()
    oracle = diffusers.AutoencoderDC(**AUTOENCODER).eval()
    oracle.load_state_dict(model.state_dict())
    pictures = torch.randn(2, 3, 20, 28, generator=torch.Generator().manual_seed(0))
    for one in (model, oracle):
        one.enable_tiling(8, 12, 6, 8)
        one.enable_slicing()
    with torch.no_grad():
        latents = oracle.encode(pictures).latent
        torch.testing.assert_close(model.encode(pictures).latent, latents, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model.decode(latents).sample, oracle.decode(latents).sample, rtol=1e-5, atol=1e-5)
