"""The documented LoRA methods of the pipelines: what they do, what they refuse, and what a call makes of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sana import SanaPipeline
from sana.engine.fingerprint import fingerprint
from sana.errors import InvalidInput
from sana.pipelines.lora import LoraMixin, TooLate
from tiny_lora import EVERYWHERE, random_lora
from tiny_model import make_tiny_parts


@pytest.fixture(scope="module")
def shared() -> SanaPipeline:
    pipe = SanaPipeline(**{k: v for k, v in make_tiny_parts().components.items() if v is not None})
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(shared: SanaPipeline) -> Any:
    yield shared
    for name in shared.adapters.fused:
        del name
        shared.adapters.unfuse()
        break
    shared.adapters.enable()
    shared.unload_lora_weights()


def draw(pipe: SanaPipeline, **options: Any) -> np.ndarray[Any, Any]:
    latents = pipe(
        "a red fox",
        num_inference_steps=2,
        height=256,
        width=256,
        use_resolution_binning=False,
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
        **options,
    ).images
    found: np.ndarray[Any, Any] = latents.numpy()
    return found


def tensors(pipe: SanaPipeline, seed: int = 0, **options: Any) -> dict[str, torch.Tensor]:
    return random_lora(pipe.transformer, seed=seed, ends=EVERYWHERE, **options)


def test_all_documented_names_are_there() -> None:
    documented = (
        "load_lora_weights save_lora_weights lora_state_dict load_lora_into_transformer fuse_lora unfuse_lora"
        " unload_lora_weights set_adapters disable_lora enable_lora delete_adapters get_active_adapters"
        " get_list_adapters set_lora_device enable_lora_hotswap num_fused_loras fused_loras lora_scale"
    )
    for name in documented.split():
        assert hasattr(SanaPipeline, name), name
    assert issubclass(SanaPipeline, LoraMixin)


def test_a_lora_changes_the_picture_and_leaves_no_trace(pipe: SanaPipeline) -> None:
    base, weights = draw(pipe), fingerprint(pipe.transformer)
    report = pipe.load_lora_weights(tensors(pipe))
    assert report.unmatched == ()
    changed = draw(pipe)
    assert not np.array_equal(changed, base)
    assert fingerprint(pipe.transformer) == weights
    pipe.unload_lora_weights()
    assert np.array_equal(draw(pipe), base)
    assert fingerprint(pipe.transformer) == weights


def test_strength_in_the_call(pipe: SanaPipeline) -> None:
    base = draw(pipe)
    pipe.load_lora_weights(tensors(pipe), "a")
    whole = draw(pipe)
    half = draw(pipe, attention_kwargs={"scale": 0.5})
    assert pipe.lora_scale == 0.5
    assert pipe.attention_kwargs == {"scale": 0.5}
    assert np.array_equal(draw(pipe, attention_kwargs={"scale": 0.0}), base)
    assert np.array_equal(draw(pipe), whole)
    assert pipe.lora_scale == 1.0
    pipe.set_adapters("a", 0.5)
    assert np.array_equal(draw(pipe), half)
    assert not np.array_equal(half, whole)
    for scale in (float("nan"), "1", None):
        with pytest.raises(InvalidInput, match="must be a finite number"):
            draw(pipe, attention_kwargs={"scale": scale})
    with pytest.warns(UserWarning, match="'gain': 1.* only 'scale' has a meaning") as caught:
        draw(pipe, attention_kwargs={"scale": 0.5, "gain": 1})
    assert caught[0].filename == __file__


def test_without_adapters_the_strength_is_ignored_aloud(pipe: SanaPipeline) -> None:
    with pytest.warns(UserWarning, match="is ignored: no adapter is loaded") as caught:
        draw(pipe, attention_kwargs={"scale": 0.5})
    assert caught[0].filename == __file__


def test_hot_swapped_pictures_are_those_of_each_alone(pipe: SanaPipeline) -> None:
    alone = []
    for seed in (1, 2):
        pipe.load_lora_weights(tensors(pipe, seed), "x")
        alone.append(draw(pipe))
        pipe.unload_lora_weights()
    pipe.load_lora_weights(tensors(pipe, 1), "a")
    pipe.load_lora_weights(tensors(pipe, 2), "b")
    for turn in (0, 1, 0):
        pipe.set_adapters(("a", "b")[turn])
        assert np.array_equal(draw(pipe), alone[turn])
    pipe.load_lora_weights(tensors(pipe, 2), "a", hotswap=True)
    assert np.array_equal(draw(pipe), alone[1])


def test_lists_and_switches(pipe: SanaPipeline) -> None:
    assert pipe.get_active_adapters() == []
    assert pipe.get_list_adapters() == {}
    base = draw(pipe)
    pipe.load_lora_weights(tensors(pipe, 1), "a")
    pipe.load_lora_weights(tensors(pipe, 2), adapter_name="b")
    pipe.set_adapters(["a", "b"], adapter_weights=[0.5, None])
    assert pipe.get_active_adapters() == ["a", "b"]
    assert pipe.get_list_adapters() == {"transformer": ["a", "b"]}
    assert pipe.adapters.active == {"a": 0.5, "b": 1.0}
    both = draw(pipe)
    pipe.disable_lora()
    assert np.array_equal(draw(pipe), base)
    pipe.enable_lora()
    assert np.array_equal(draw(pipe), both)
    pipe.set_lora_device(["a"], "cpu")
    pipe.delete_adapters("a")
    assert pipe.get_list_adapters() == {"transformer": ["b"]}
    pipe.delete_adapters(["b"])
    assert np.array_equal(draw(pipe), base)


def test_fused_and_back(pipe: SanaPipeline) -> None:
    base, weights = draw(pipe), fingerprint(pipe.transformer)
    pipe.load_lora_weights(tensors(pipe), "a")
    unfused = draw(pipe, attention_kwargs={"scale": 0.5})
    pipe.fuse_lora(lora_scale=0.5)
    assert (pipe.num_fused_loras, pipe.fused_loras) == (1, {"a"})
    assert np.abs(draw(pipe) - unfused).max() < 1e-5
    assert fingerprint(pipe.transformer) != weights
    pipe.unfuse_lora()
    assert pipe.num_fused_loras == 0
    assert fingerprint(pipe.transformer) == weights
    pipe.unload_lora_weights()
    assert np.array_equal(draw(pipe), base)
    with pytest.warns(UserWarning, match="No adapter is fused"):
        pipe.unfuse_lora()


def test_saved_and_loaded(pipe: SanaPipeline, tmp_path: Path) -> None:
    pipe.load_lora_weights(tensors(pipe), "a", metadata={"r": 4, "lora_alpha": 8})
    drawn = draw(pipe)
    pipe.save_lora_weights(
        tmp_path,
        transformer_lora_layers=pipe.adapters.parameters("a"),
        transformer_lora_adapter_metadata={"r": 4, "lora_alpha": 8, "target_modules": {"to_q"}},
    )
    assert [entry.name for entry in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
    pipe.unload_lora_weights()
    pipe.load_lora_weights(tmp_path)
    assert np.array_equal(draw(pipe), drawn)
    state, told = SanaPipeline.lora_state_dict(tmp_path, return_lora_metadata=True)
    assert told == {"r": 4, "lora_alpha": 8, "target_modules": ["to_q"]}
    assert isinstance(state, dict)
    assert set(state) == set(tensors(pipe))
    pipe.unload_lora_weights()
    SanaPipeline.load_lora_into_transformer(state, pipe.transformer, "b", metadata=told)
    assert np.array_equal(draw(pipe), drawn)


def test_pickled_where_it_is_wanted(pipe: SanaPipeline, tmp_path: Path) -> None:
    layers = {name.removeprefix("transformer."): tensor for name, tensor in tensors(pipe).items()}
    SanaPipeline.save_lora_weights(tmp_path, layers, safe_serialization=False)
    name = "pytorch_lora_weights.bin"
    with pytest.raises(ValueError, match="pickles are not opened"):
        pipe.load_lora_weights(tmp_path, weight_name=name)
    pipe.load_lora_weights(tmp_path, weight_name=name, use_safetensors=False)
    written = {}
    SanaPipeline.save_lora_weights(tmp_path, layers, save_function=lambda state, file: written.update({file: state}))
    assert list(written) == [str(tmp_path / "pytorch_lora_weights.safetensors")]


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda p: p.set_adapters("z"), "not in the list of present adapters"),
        (lambda p: p.set_adapters(["a"], [1.0, 2.0]), "is not equal to the length of the weights"),
        (lambda p: p.set_adapters("a", {"transformer": {"nowhere": 1.0}}), "none of its layers"),
        (lambda p: p.delete_adapters(["a", "z"]), "not in the list"),
        (lambda p: p.fuse_lora(components=["text_encoder"]), "Only 'transformer' takes adapters"),
        (lambda p: p.fuse_lora(components=[]), "at least one name"),
        (lambda p: p.unfuse_lora(components="transformer"), "must be a list"),
        (lambda p: p.fuse_lora(scale=2), "fuse_lora has no argument 'scale'. Did you mean 'lora_scale'"),
        (lambda p: p.fuse_lora(adapter_names=["z"]), "not in the list"),
        (lambda p: p.load_lora_weights({}, weigth_name="x"), "Did you mean 'weight_name'"),
        (lambda p: p.load_lora_weights({"x.weight": torch.ones(1)}), "Make sure all LoRA param names contain"),
        (lambda p: p.load_lora_weights(tensors(p), "a"), "already in use"),
        (lambda p: p.load_lora_weights(tensors(p), "z", hotswap=True), "Trying to hotswap"),
        (lambda p: p.set_lora_device(["z"], "cpu"), "not in the list"),
        (lambda p: p.save_lora_weights("folder"), "nothing to save"),
        (lambda p: p.save_lora_weights(__file__, {"a": torch.ones(1)}), "is a file"),
        (
            lambda p: p.save_lora_weights(
                "x", {"a": torch.ones(1)}, safe_serialization=False, transformer_lora_adapter_metadata={"r": 1}
            ),
            "no place in a pickled file",
        ),
        (lambda p: p.enable_lora_hotswap(check_compiled="no"), "check_compiled should be one of"),
    ],
)
def test_faults_are_value_errors_in_one_sentence(pipe: SanaPipeline, call: Any, told: str) -> None:
    pipe.load_lora_weights(tensors(pipe), "a")
    before = draw(pipe)
    with pytest.raises(ValueError, match=told):
        call(pipe)
    assert np.array_equal(draw(pipe), before)


def test_weights_of_other_components_are_told(pipe: SanaPipeline) -> None:
    pipe.load_lora_weights(tensors(pipe), "a")
    with pytest.warns(UserWarning, match="name 'unet', which takes no adapters") as caught:
        pipe.set_adapters("a", {"unet": 0.3, "transformer": {"transformer_blocks.0": 0.5}})
    assert caught[0].filename == __file__
    assert pipe.adapters.active == {"a": {"transformer_blocks.0": 0.5}}


def test_room_for_hot_swapping_comes_first(pipe: SanaPipeline) -> None:
    pipe.enable_lora_hotswap(target_rank=8)
    pipe.load_lora_weights(tensors(pipe), "a")
    assert len(pipe.transformer.proj_out.lora_sides[0].down) == 8
    with pytest.raises(TooLate, match="before loading the first adapter"):
        pipe.enable_lora_hotswap(target_rank=8)
    assert issubclass(TooLate, RuntimeError)
    with pytest.warns(UserWarning, match="compiled anew"):
        pipe.enable_lora_hotswap(target_rank=16, check_compiled="warn")
    pipe.enable_lora_hotswap(target_rank=1, check_compiled="ignore")


def test_the_built_in_model_draws_with_an_adapter() -> None:
    pipe = SanaPipeline.from_pretrained("nano")
    pipe.set_progress_bar_config(disable=True)

    def picture() -> Any:
        generator = torch.Generator().manual_seed(2)
        return pipe("a fox", num_inference_steps=2, height=256, width=256, generator=generator, output_type="np").images

    base = picture()
    pipe.load_lora_weights(random_lora(pipe.transformer, rank=4, std=0.05))
    changed = picture()
    pipe.unload_lora_weights()
    assert np.abs(changed - base).max() > 0.02
    assert np.array_equal(picture(), base)


@pytest.mark.parametrize("kind", ["pag", "sprint"])
def test_other_pipelines_draw_with_an_adapter_as_with_merged_weights(kind: str) -> None:
    from sana import SanaPAGPipeline, SanaSprintPipeline, SCMScheduler

    options: dict[str, Any] = {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"} if kind == "sprint" else {}
    parts = make_tiny_parts(**options)
    given = {name: part for name, part in parts.components.items() if part is not None}
    pipe: Any
    if kind == "sprint":
        # The tiny model is made for 256 px, which the documented Sprint pipeline refuses to bin.
        pipe = SanaSprintPipeline(**{**given, "scheduler": SCMScheduler()})
    else:
        pipe = SanaPAGPipeline(**given, pag_applied_layers="transformer_blocks.1")
    pipe.set_progress_bar_config(disable=True)
    base = draw(pipe)
    pipe.load_lora_weights(random_lora(pipe.transformer, ends=EVERYWHERE))
    attached = draw(pipe)
    pipe.fuse_lora()
    assert np.abs(draw(pipe) - attached).max() < 1e-5
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert np.array_equal(draw(pipe), base)
    assert np.abs(attached - base).max() > 0.1


def test_pipelines_that_share_a_transformer_share_its_adapters(pipe: SanaPipeline) -> None:
    from sana import SanaPAGPipeline

    other = SanaPAGPipeline.from_pipe(pipe)
    pipe.load_lora_weights(tensors(pipe), "a")
    assert other.get_active_adapters() == ["a"]
    other.unload_lora_weights()
    assert pipe.get_active_adapters() == []
