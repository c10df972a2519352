"""Conversions there and back give the same bits, never write over anything, and appear whole or not at all."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_hub import Hub
from originals import (
    FAMILIES,
    TOLD,
    controlled_state,
    original_state,
    save_pth,
    small_autoencoder,
    tiny_branch,
    tiny_original,
)
from safetensors.torch import load_file, save_file
from tiny_pipeline import FILE, parts, same, transformer

from sana.cards import CARDS
from sana.checkpoints.autoencoder import AutoencoderDC
from sana.checkpoints.controlnet import SanaControlNetModel
from sana.checkpoints.convert import Conversion, convert
from sana.checkpoints.folder import load_parts, save_parts
from sana.checkpoints.pretrained import SanaTransformer2DModel
from sana.checkpoints.schedulers import DPMSolverMultistepScheduler, SCMScheduler
from sana.errors import CheckpointError, InvalidInput, ModelNotFound, NonFinite


def run(source: str | Path, target: Path, **options: Any) -> Any:
    return convert(Conversion(source=source, target=target, **options))


def alike(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], but: tuple[str, ...] = ()) -> bool:
    """Tell whether both hold the same bits under the same names, apart from the values of `but`."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and (name in but or torch.equal(one[name], other[name])) for name in one
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_an_original_becomes_a_folder_and_comes_back(tmp_path: Path, family: str) -> None:
    model = transformer(**FAMILIES[family])
    state = original_state(model)
    source = save_pth(tmp_path / "m.pth", state)
    done = run(source, tmp_path / "folder", told=TOLD)
    assert (done.form, done.left_out) == ("folder", ("pos_embed", "y_embedder.y_embedding"))
    assert same(SanaTransformer2DModel.from_pretrained(tmp_path / "folder"), model)
    run(tmp_path / "folder", tmp_path / "back.safetensors")
    # The original code fills the empty caption in itself; it is the one thing that a folder has no place for.
    back = load_file(tmp_path / "back.safetensors")
    assert alike(back, state, but=("y_embedder.y_embedding",))
    assert not back["y_embedder.y_embedding"].any()
    run(tmp_path / "back.safetensors", tmp_path / "again", told=TOLD)
    assert (tmp_path / "again" / FILE).read_bytes() == (tmp_path / "folder" / FILE).read_bytes()


def test_mixed_precisions_survive(tmp_path: Path) -> None:
    state = {
        name: tensor.half() if "attn" in name else tensor.bfloat16() if "mlp" in name else tensor
        for name, tensor in original_state(transformer()).items()
    }
    run(save_pth(tmp_path / "m.pth", state), tmp_path / "folder", told=TOLD)
    run(tmp_path / "folder", tmp_path / "back.safetensors")
    dropped = ("y_embedder.y_embedding", "pos_embed")
    back = load_file(tmp_path / "back.safetensors")
    assert alike(
        {name: tensor for name, tensor in back.items() if name not in dropped},
        {name: tensor for name, tensor in state.items() if name not in dropped},
    )


@pytest.mark.parametrize("kind", ["f32-sana", "f32-in", "f64-mix", "f128-in"])
def test_autoencoders_go_both_ways(tmp_path: Path, kind: str) -> None:
    model = small_autoencoder(kind)
    state = original_state(model)
    source = save_pth(tmp_path / f"{kind}-1.0.pth", state)
    run(source, tmp_path / "folder", told={"attention_head_dim": 4})
    loaded = AutoencoderDC.from_pretrained(tmp_path / "folder")
    assert same(loaded, model)
    assert loaded.config == model.config
    run(tmp_path / "folder", tmp_path / "back.safetensors")
    assert alike(load_file(tmp_path / "back.safetensors"), state)


def test_a_control_branch_goes_both_ways(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = transformer()
    branch = tiny_branch(base)
    state = controlled_state(base, branch)
    run(save_pth(tmp_path / "both.pth", state), tmp_path / "folder", told=TOLD)
    assert same(SanaTransformer2DModel.from_pretrained(tmp_path / "folder", subfolder="transformer"), base)
    found = SanaControlNetModel.from_pretrained(tmp_path / "folder", subfolder="controlnet")
    assert same(found, branch)
    assert found.wiring == "native"  # as the readers of the original file join it
    place = tmp_path / "folder"
    run(place / "transformer", tmp_path / "back.safetensors", controlnet=place / "controlnet")
    assert alike(load_file(tmp_path / "back.safetensors"), state, but=("y_embedder.y_embedding",))
    assert not caplog.messages
    branch.save_pretrained(tmp_path / "joined as in diffusers")
    run(place / "transformer", tmp_path / "told.safetensors", controlnet=tmp_path / "joined as in diffusers")
    assert [text for text in caplog.messages if "joined as in diffusers" in text]
    with pytest.raises(InvalidInput, match="together with its transformer"):
        run(place / "controlnet", tmp_path / "alone.safetensors")
    stranger = transformer()
    with torch.no_grad():
        stranger.patch_embed.proj.bias.add_(1)
    stranger.save_pretrained(tmp_path / "stranger")
    with pytest.raises(InvalidInput, match=r"differ in 'x_embedder.proj.bias'"):
        run(tmp_path / "stranger", tmp_path / "wrong.safetensors", controlnet=place / "controlnet")
    assert not (tmp_path / "wrong.safetensors").exists()


def test_a_whole_pipeline_is_made_with_the_parts_of_another(tmp_path: Path) -> None:
    save_parts(tmp_path / "base", parts())
    source, model = tiny_original(tmp_path / "m.pth", qk_norm="rms_norm_across_heads")
    done = run(source, tmp_path / "whole", told=TOLD, base=tmp_path / "base", scheduler="flow-euler")
    assert done.form == "pipeline"
    loaded = load_parts(tmp_path / "whole")
    assert same(loaded["transformer"], model)
    assert same(loaded["vae"], parts()["vae"])
    assert type(loaded["scheduler"]).__name__ == "FlowMatchEulerDiscreteScheduler"
    assert loaded["scheduler"].config["shift"] == 3.0
    back = run(tmp_path / "whole", tmp_path / "back.safetensors")
    assert list(back.configs) == ["transformer"]
    vae = run(tmp_path / "whole", tmp_path / "vae.safetensors", part="vae")
    assert list(vae.configs) == ["vae"]
    with pytest.raises(ModelNotFound, match="no folder of a pipeline: it has no tokenizer"):
        run(source, tmp_path / "other", told=TOLD, base=tmp_path / "whole" / "transformer")


def test_a_folder_of_pickles_becomes_safetensors(tmp_path: Path) -> None:
    model = transformer()
    model.save_pretrained(tmp_path / "old", safe_serialization=False)
    run(tmp_path / "old", tmp_path / "new")
    assert [path.name for path in sorted((tmp_path / "new").iterdir())] == ["config.json", FILE]
    assert same(SanaTransformer2DModel.from_pretrained(tmp_path / "new"), model)
    whole = parts()
    save_parts(tmp_path / "pipe", whole, safe_serialization=False)
    done = run(tmp_path / "pipe", tmp_path / "safe", dtype="bfloat16", variant="bf16", max_shard_size="20KB")
    assert done.form == "pipeline"
    names = {path.name for path in (tmp_path / "safe" / "transformer").iterdir()}
    assert "diffusion_pytorch_model.safetensors.index.bf16.json" in names
    assert not list((tmp_path / "safe").rglob("*.bin"))
    loaded = load_parts(tmp_path / "safe", variant="bf16", torch_dtype="auto")
    assert same(loaded["transformer"], whole["transformer"].bfloat16())


def test_a_single_pickle_becomes_safetensors(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(2).half(), "n": torch.arange(3)}
    torch.save(tensors, tmp_path / "x.bin")
    assert run(tmp_path / "x.bin", tmp_path / "x.safetensors").form == "tensors"
    assert alike(load_file(tmp_path / "x.safetensors"), tensors)
    run(tmp_path / "x.bin", tmp_path / "h.safetensors", dtype="bfloat16")
    assert {name: t.dtype for name, t in load_file(tmp_path / "h.safetensors").items()} == {
        "a": torch.bfloat16, "b": torch.bfloat16, "n": torch.int64,
    }  # fmt: skip
    source, _ = tiny_original(tmp_path / "m.pth")
    assert run(source, tmp_path / "m.safetensors").form == "original"
    with pytest.raises(InvalidInput, match="tells no configuration: give a target that ends in"):
        run(tmp_path / "x.bin", tmp_path / "folder")


def test_the_averaged_weights_are_converted_on_demand(tmp_path: Path) -> None:
    average = transformer()
    with torch.no_grad():
        average.proj_out.bias.add_(1)
    source = save_pth(tmp_path / "t.pth", original_state(transformer()), state_dict_ema=original_state(average))
    run(source, tmp_path / "folder", told=TOLD, ema=True)
    assert same(SanaTransformer2DModel.from_pretrained(tmp_path / "folder"), average)


def test_nothing_is_written_over(tmp_path: Path) -> None:
    source, model = tiny_original(tmp_path / "m.pth")
    for target in (tmp_path / "full", tmp_path / "taken.safetensors"):
        if target.suffix:
            target.write_bytes(b"mine")
        else:
            target.mkdir()
            (target / "notes.txt").write_text("mine")
        with pytest.raises(InvalidInput, match="is there already; give another name, or --force"):
            run(source, target, told=TOLD)
        run(source, target, force=True, **({} if target.suffix else {"told": TOLD}))
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"
    assert same(SanaTransformer2DModel.from_pretrained(tmp_path / "full"), model)
    (tmp_path / "file").write_text("x")
    refused: dict[str, dict[str, Any]] = {
        "would be a pickle, which is never written": {"target": tmp_path / "new.pth"},
        "is the source itself": {"source": tmp_path / "full", "target": tmp_path / "full", "force": True},
        "is a file; give a folder": {"target": tmp_path / "file"},
        "holds no other parts": {"target": tmp_path / "new.safetensors", "scheduler": "scm"},
        "choose one of flow-dpm": {"target": tmp_path / "new", "scheduler": "euler"},
        "choose 'auto' or one of float32": {"target": tmp_path / "new", "dtype": "int4"},
        "choose transformer, controlnet or vae": {"target": tmp_path / "new", "part": "unet"},
    }
    for text, options in refused.items():
        with pytest.raises(InvalidInput, match=text):
            run(**{"source": source, "told": TOLD, **options})
    (tmp_path / "dir.safetensors").mkdir()
    with pytest.raises(InvalidInput, match="is a folder; give the name of a file"):
        run(source, tmp_path / "dir.safetensors")
    assert not (tmp_path / "new").exists()


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = original_state(transformer())
    state["final_layer.linear.bias"][0] = float("nan")
    source = save_pth(tmp_path / "m.pth", state)
    with pytest.raises(CheckpointError, match=r"'final_layer.linear.bias' in .*m.pth holds NaN"):
        run(source, tmp_path / "out", told=TOLD)
    with pytest.raises(NonFinite, match=r"'final_layer.linear.bias' holds NaN"):
        run(source, tmp_path / "out.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.pth"]
    good, _ = tiny_original(tmp_path / "good.pth")

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sana.checkpoints.convert.write_tensors", full)
    monkeypatch.setattr("sana.checkpoints.weights.write_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        run(good, tmp_path / "out.safetensors")
    with pytest.raises(OSError, match="No space left"):
        run(good, tmp_path / "out", told=TOLD)
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(path.name for path in left) == ["good.pth", "m.pth"]


def test_the_card_of_a_file_goes_into_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    from sana.config import TransformerConfig

    source, model = tiny_original(tmp_path / "renamed.pth", sample_size=16)
    config = TransformerConfig.from_dict(model.config.to_dict())
    card = dataclasses.replace(CARDS["sana-1.6b-4k"], name="pet", transformer=config, sampler="flow-dpm")
    save_parts(tmp_path / "base", parts())
    done = run(source, tmp_path / "out", card=card, base=tmp_path / "base")
    assert (done.card, done.assumed) == ("pet", ())
    assert json.loads((tmp_path / "out" / "model_index.json").read_text())["_sanakit_card"] == "pet"
    assert load_parts(tmp_path / "out", only=("scheduler",))["scheduler"].config["flow_shift"] == 6.0


def test_a_folder_is_checked_like_any_other(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="holds no model"):
        run(tmp_path, tmp_path / "new" / "folder")
    transformer().save_pretrained(tmp_path / "m")
    save_file({"a": torch.ones(2)}, tmp_path / "m" / FILE)
    with pytest.raises(CheckpointError, match="do not belong together"):
        run(tmp_path / "m", tmp_path / "new")


def test_a_pipeline_keeps_every_bit_also_of_half_precision(tmp_path: Path) -> None:
    """What overflows when it is used in float16 is stored so all the same, and some tensors in another precision."""
    whole = parts()
    for name in ("vae", "text_encoder", "transformer"):
        whole[name].half()
    whole["vae"].decoder.conv_in.float()
    save_parts(tmp_path / "half", whole, safe_serialization=False)
    run(tmp_path / "half", tmp_path / "same")
    for name in ("vae", "transformer"):
        wanted = whole[name].state_dict()
        assert alike(load_file(tmp_path / "same" / name / FILE), wanted), name
    kept = load_file(tmp_path / "same" / "text_encoder" / "model.safetensors")
    assert alike(kept, load_file(tmp_path / "half" / "text_encoder" / "model.safetensors"))
    part = run(tmp_path / "half", tmp_path / "vae", part="vae")
    assert (part.form, list(part.configs)) == ("folder", ["vae"])
    assert alike(load_file(tmp_path / "vae" / FILE), whole["vae"].state_dict())


@pytest.mark.parametrize(("stored", "wanted"), [("bf16", None), (None, "bf16"), ("fp16", "bf16")])
@pytest.mark.parametrize("size", ["10GB", "20KB"])
def test_a_whole_pipeline_has_one_variant(tmp_path: Path, stored: str | None, wanted: str | None, size: str) -> None:
    save_parts(tmp_path / "base", parts(), variant=stored, max_shard_size=size)
    source, model = tiny_original(tmp_path / "m.pth")
    run(source, tmp_path / "whole", told=TOLD, base=tmp_path / "base", variant=wanted)
    loaded = load_parts(tmp_path / "whole", variant=wanted)
    assert same(loaded["transformer"], model)
    for name in ("vae", "text_encoder"):
        assert same(loaded[name], parts()[name])
    files = {file.name for file in (tmp_path / "whole").rglob("*.safetensors")}
    assert all((wanted or ".") in name and "fp16" not in name for name in files)


@pytest.mark.parametrize("sprint", [False, True])
def test_without_a_card_the_base_tells_the_scheduler(tmp_path: Path, sprint: bool) -> None:
    """A model of 4096 px keeps its shift, and one of Sprint never gets the scheduler of another kind."""
    schedulers = {"4k": DPMSolverMultistepScheduler(flow_shift=6.0), "sprint": SCMScheduler()}
    source, _ = tiny_original(tmp_path / "m.pth", guidance_embeds=sprint)
    for name, scheduler in schedulers.items():
        save_parts(tmp_path / name, {**parts(), "scheduler": scheduler})
        run(source, tmp_path / f"on-{name}", told=TOLD, base=tmp_path / name)
        made = load_parts(tmp_path / f"on-{name}", only=("scheduler",))["scheduler"]
        index = json.loads((tmp_path / f"on-{name}" / "model_index.json").read_text())
        assert isinstance(made, SCMScheduler) == sprint
        assert index["_class_name"] == ("SanaSprintPipeline" if sprint else "SanaPipeline")
        if not sprint:
            assert made.config["flow_shift"] == {"4k": 6.0, "sprint": 3.0}[name]


def test_options_without_effect_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    source, model = tiny_original(tmp_path / "m.pth")
    model.save_pretrained(tmp_path / "folder")
    vae = save_pth(tmp_path / "f32-sana.pth", original_state(small_autoencoder("f32-sana")))
    file, folder, new = tmp_path / "new.safetensors", tmp_path / "folder", tmp_path / "new"
    refused: list[tuple[str, Path, Path, dict[str, Any]]] = [
        ("--variant has no effect where OUT is one file", folder, file, {"variant": "bf16"}),
        ("--shard has no effect where OUT is one file", folder, file, {"max_shard_size": "1MB"}),
        ("--controlnet has no effect where OUT is a folder", folder, new, {"controlnet": folder}),
        ("--ema has no effect where IN is a folder", folder, new, {"ema": True}),
        ("--scheduler has no effect where IN is a folder", folder, new, {"scheduler": "scm"}),
        ("--base has no effect where IN is a folder", folder, new, {"base": folder}),
        ("--card has no effect where IN is a folder", folder, file, {"card": CARDS["nano"]}),
        ("--config has no effect where IN is a folder", folder, file, {"told": TOLD}),
        ("--config has no effect where a file becomes a file", source, file, {"told": TOLD}),
        ("--part has no effect where IN is one file", source, new, {"part": "vae"}),
        ("--from-variant has no effect where IN is one file", source, file, {"from_variant": "fp16"}),
        ("--base has no effect where IN is an autoencoder", vae, new, {"base": folder}),
        ("max_shard_size is 'big'", tmp_path / "nowhere.pth", new, {"max_shard_size": "big"}),
        ("variant is '../x'", tmp_path / "nowhere.pth", new, {"variant": "../x"}),
    ]
    for text, given, target, options in refused:
        with pytest.raises(InvalidInput, match=text.replace(".", r"\.")):
            run(given, target, **options)
    assert not file.exists()
    assert not new.exists()


def test_settings_that_are_no_settings_are_refused(tmp_path: Path) -> None:
    source, _ = tiny_original(tmp_path / "m.pth")
    wrong: tuple[Any, ...] = (0, -8, "8", 8.0, True, None)
    for name in TOLD:
        for value in wrong:
            with pytest.raises(InvalidInput, match=f"{name} is .*; it must be a whole number above 0"):
                run(source, tmp_path / "new", told={**TOLD, name: value})
    transformer(sample_size=1 << 20).save_pretrained(tmp_path / "wide")
    with pytest.raises(InvalidInput, match=r"sample_size is 1048576.* up to 512"):
        run(tmp_path / "wide", tmp_path / "new.safetensors")


def test_a_folder_of_another_kind_is_named(tmp_path: Path) -> None:
    save_parts(tmp_path / "p", parts())
    with pytest.raises(CheckpointError, match="holds a Gemma2Model, which cannot be converted; SanaTransformer2DModel"):
        run(tmp_path / "p" / "text_encoder", tmp_path / "new.safetensors")


def test_what_is_fetched_is_what_is_written(hub: Hub, tmp_path: Path) -> None:
    """A file gets the control branch of a repository too; of a base, at its own revision, only what is copied."""
    base = transformer()
    save_parts(tmp_path / "p", {**parts(), "transformer": base, "controlnet": tiny_branch(base)})
    hub.push("some/controlled", tmp_path / "p")
    where = {"cache_dir": tmp_path / "cache", "endpoint": hub.url}
    done = run("some/controlled", tmp_path / "both.safetensors", where=where)
    assert list(done.configs) == ["transformer", "controlnet"]
    assert not [name for name in hub.gets() if "text_encoder" in name or "vae" in name]
    save_parts(tmp_path / "q", parts())
    hub.push("some/base", tmp_path / "q")
    hub.requests.clear()
    where["revision"] = hub.branches["some/controlled"]["main"]
    run(tmp_path / "both.safetensors", tmp_path / "whole", told=TOLD, base="some/base", where=where)
    assert not [name for name in hub.gets() if "transformer" in name]
    assert load_parts(tmp_path / "whole")["controlnet"] is not None
