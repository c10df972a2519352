"""One set of parts in all five pipelines: `from_pipe`, folders loaded by another class, swapped schedulers."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import sana
from sana import (
    AutoPipelineForText2Image,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SanaControlNetPipeline,
    SanaPAGPipeline,
    SanaPipeline,
    SanaSprintImg2ImgPipeline,
    SanaSprintPipeline,
    SCMScheduler,
)
from sana.errors import CheckpointError, InvalidInput
from tiny_model import make_tiny_parts, make_tiny_sprint, tiny_controlnet

SMALL: dict[str, Any] = {
    "height": 64,
    "width": 64,
    "use_resolution_binning": False,
    "num_inference_steps": 2,
    "output_type": "latent",
    "complex_human_instruction": None,
}
FIVE = (SanaPipeline, SanaPAGPipeline, SanaControlNetPipeline, SanaSprintPipeline, SanaSprintImg2ImgPipeline)
PICTURE = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
EXTRA: dict[type, dict[str, Any]] = {
    SanaControlNetPipeline: {"control_image": PICTURE},
    SanaSprintImg2ImgPipeline: {"image": PICTURE},
}


@pytest.fixture(scope="module")
def pipe() -> SanaPipeline:
    return SanaPipeline(**make_tiny_parts(num_layers=3).components)


@pytest.fixture(scope="module")
def branch(pipe: SanaPipeline) -> Any:
    return tiny_controlnet(pipe.transformer)


def draw(pipe: Any, **changes: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    call = {**SMALL, **EXTRA.get(type(pipe), {}), **changes}
    made: torch.Tensor = pipe("a fox", generator=torch.Generator().manual_seed(0), **call).images
    return made


# from_pipe


@pytest.mark.parametrize(("source", "target"), list(itertools.product(FIVE, FIVE)), ids=lambda cls: cls.__name__[4:])
def test_parts_are_shared_between_all_five(pipe: SanaPipeline, branch: Any, source: type, target: type) -> None:
    more = {"controlnet": branch} if source is SanaControlNetPipeline else {}
    first = source(**pipe.components, **more)
    needed = {"controlnet": branch} if target is SanaControlNetPipeline and not more else {}
    second = target.from_pipe(first, **needed)
    assert type(second) is target
    assert all(getattr(second, name) is part for name, part in pipe.components.items())
    assert ("controlnet" in second.components) == (target is SanaControlNetPipeline)
    if target is SanaControlNetPipeline:
        assert second.controlnet is branch
        assert list(second.components) == ["tokenizer", "text_encoder", "vae", "transformer", "controlnet", "scheduler"]
    assert second.parts.prompts is first.parts.prompts, "encoded instructions and negative prompts serve both"


def test_each_pipeline_draws_with_the_shared_parts(pipe: SanaPipeline, branch: Any) -> None:
    free = draw(pipe)
    pag = SanaPAGPipeline.from_pipe(pipe, pag_applied_layers="blocks.1")
    followed = SanaControlNetPipeline.from_pipe(pag, controlnet=branch)
    assert not torch.equal(draw(pag), free)
    assert not torch.equal(draw(followed), free)
    assert torch.equal(draw(SanaPipeline.from_pipe(followed)), free)
    sprint = SanaSprintPipeline(**make_tiny_sprint().components)
    assert not torch.equal(draw(SanaSprintImg2ImgPipeline.from_pipe(sprint)), draw(sprint))


def test_no_weight_is_copied(pipe: SanaPipeline, branch: Any) -> None:
    before = {id(weight): weight.data_ptr() for weight in pipe.transformer.parameters()}
    made = SanaControlNetPipeline.from_pipe(SanaPAGPipeline.from_pipe(pipe), controlnet=branch)
    assert {id(weight): weight.data_ptr() for weight in made.transformer.parameters()} == before


def test_an_assigned_part_concerns_one_pipeline(pipe: SanaPipeline) -> None:
    other = SanaPAGPipeline.from_pipe(pipe)
    other.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    other.vae = None
    assert isinstance(pipe.scheduler, DPMSolverMultistepScheduler)
    assert pipe.vae is not None


def test_the_control_network_stays_with_the_pipeline_that_uses_it(pipe: SanaPipeline, branch: Any) -> None:
    first = SanaControlNetPipeline(**pipe.components, controlnet=branch)
    plain = SanaPipeline.from_pipe(first)
    assert plain.parts.controlnet is None
    assert first.controlnet is branch
    with pytest.raises(InvalidInput, match=r"SanaControlNetPipeline needs a controlnet.*Pass controlnet="):
        SanaControlNetPipeline.from_pipe(plain)


def test_layers_and_parts_given_anew_replace_the_others(pipe: SanaPipeline) -> None:
    pag = SanaPAGPipeline.from_pipe(pipe, pag_applied_layers=["blocks.1", "blocks.2"])
    assert SanaPAGPipeline.from_pipe(pag).pag_applied_layers == ["blocks.1", "blocks.2"]
    assert SanaPAGPipeline.from_pipe(pag, pag_applied_layers="blocks.0").pag_applied_layers == ["blocks.0"]
    assert SanaPAGPipeline.from_pipe(SanaPipeline.from_pipe(pag)).pag_applied_layers == ["transformer_blocks.0"]
    euler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert SanaPipeline.from_pipe(pag, scheduler=euler).scheduler is euler


def test_a_dtype_casts_only_if_it_is_asked_for(branch: Any) -> None:
    pipe = SanaPipeline(**make_tiny_parts(num_layers=3).components)
    pipe.transformer.to(torch.bfloat16)
    assert SanaPAGPipeline.from_pipe(pipe).transformer.dtype == torch.bfloat16
    made = SanaControlNetPipeline.from_pipe(pipe, controlnet=branch, torch_dtype=torch.float32)
    assert made.transformer.dtype == made.controlnet.dtype == torch.float32


def test_adapters_go_with_the_transformer() -> None:
    pipe = SanaPipeline(**make_tiny_parts().components)
    names = [f"transformer.transformer_blocks.{i}.attn2.to_{k}" for i in range(2) for k in "qkv"]
    torch.manual_seed(5)
    shapes = {"A": (2, 32), "B": (32, 2)}
    state = {f"{name}.lora_{ab}.weight": torch.randn(*shape) for name in names for ab, shape in shapes.items()}
    free = draw(pipe)
    pipe.load_lora_weights(state, adapter_name="blob")
    for cls in (SanaPipeline, SanaPAGPipeline):
        made = cls.from_pipe(pipe)
        assert made.get_active_adapters() == ["blob"]
    assert not torch.equal(draw(pipe), free)
    assert torch.equal(draw(pipe, attention_kwargs={"scale": 0.0}), free)
    with pytest.raises(InvalidInput, match="scale"):
        draw(pipe, attention_kwargs={"scale": float("nan")})
    SanaPipeline.from_pipe(pipe).unload_lora_weights()
    assert torch.equal(draw(pipe), free)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (({"a": 1},), "needs a pipeline of sana, not a dict"),
        ((None,), "needs a pipeline of sana, not a NoneType"),
    ],
)
def test_what_is_no_pipeline_is_refused(arguments: Any, words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        SanaPipeline.from_pipe(*arguments)


def test_unknown_parts_are_refused_with_a_hint(pipe: SanaPipeline) -> None:
    with pytest.raises(InvalidInput, match=r"ControlNetPipeline.from_pipe has no argument 'control_net'.*'controlnet'"):
        SanaControlNetPipeline.from_pipe(pipe, control_net=None)
    with pytest.raises(InvalidInput, match=r"SanaPipeline.from_pipe has no argument 'controlnet'"):
        SanaPipeline.from_pipe(pipe, controlnet=None)


def test_latents_need_no_autoencoder() -> None:
    """Neither as picture, nor as control, nor as result."""
    parts, sprint = make_tiny_parts(), make_tiny_sprint()
    latents = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    control = SanaControlNetPipeline(**parts.components, controlnet=tiny_controlnet(parts.transformer))
    for pipe, name in ((control, "control_image"), (SanaSprintImg2ImgPipeline(**sprint.components), "image")):
        whole = draw(pipe, **{name: latents})
        bare = type(pipe).from_pipe(pipe, vae=None)
        assert torch.equal(draw(bare, **{name: latents}), whole)
        with pytest.raises(InvalidInput, match="no vae"):
            draw(bare, **{name: PICTURE})


def test_a_negative_prompt_to_be_read_needs_a_text_encoder(pipe: SanaPipeline) -> None:
    embeds, mask, negative, negative_mask = pipe.encode_prompt("a fox")
    bare = SanaPipeline.from_pipe(pipe, text_encoder=None, tokenizer=None)
    bare.set_progress_bar_config(disable=True)
    given = {"prompt_embeds": embeds, "prompt_attention_mask": mask, **SMALL}
    with pytest.raises(InvalidInput, match="no tokenizer"):
        bare(**given)
    more = {"negative_prompt_embeds": negative, "negative_prompt_attention_mask": negative_mask}
    assert bare(negative_prompt=None, **more, **given).images.shape == (1, 4, 2, 2)
    assert bare(guidance_scale=1.0, **given).images.shape == (1, 4, 2, 2)


# Swapped schedulers


@pytest.mark.parametrize("cls", FIVE, ids=lambda cls: cls.__name__[4:])
@pytest.mark.parametrize("scheduler", [DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, SCMScheduler])
def test_the_three_schedulers_drive_every_pipeline(cls: Any, scheduler: Any) -> None:
    sprint = cls in (SanaSprintPipeline, SanaSprintImg2ImgPipeline)
    parts = make_tiny_sprint() if sprint else make_tiny_parts()
    more = {"controlnet": tiny_controlnet(parts.transformer)} if cls is SanaControlNetPipeline else {}
    pipe = cls(**parts.components, **more)
    own = draw(pipe)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    swapped = draw(pipe)
    assert torch.isfinite(swapped).all()
    same = type(parts.scheduler) is scheduler
    assert torch.equal(swapped, own) == same
    assert swapped.std() < 5, "the network is told timesteps of its own kind, whatever the scheduler counts in"


def test_sana_with_the_scheduler_of_sprint_is_told_thousandths(pipe: SanaPipeline) -> None:
    """As with its own scheduler: 1000 at pure noise, and not the 1 that SANA-Sprint reads there."""
    told: list[float] = []
    other = SanaPipeline.from_pipe(pipe, scheduler=SCMScheduler())
    modulation = other.transformer.modulation

    def watched(timestep: torch.Tensor, *rest: Any) -> Any:
        told.extend(timestep.tolist())
        return modulation(timestep, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(other.transformer, "modulation", watched)
        draw(other, num_inference_steps=3)
    assert told == pytest.approx([1000, 634, 366], abs=1)


def test_any_object_with_the_interface_of_a_scheduler_will_do(pipe: SanaPipeline) -> None:
    class Halving:
        """Goes half of the way in each step."""

        def set_timesteps(self, count: int, device: Any = None) -> None:
            self.timesteps = torch.tensor([1000 * 0.5**i for i in range(count)])

        def step(self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor) -> Any:
            return type("Output", (), {"prev_sample": sample - model_output * timestep / 2000})

    made = SanaPipeline.from_pipe(pipe, scheduler=Halving())
    assert torch.isfinite(draw(made, num_inference_steps=3)).all()
    assert made.num_timesteps == 3
    with pytest.raises(InvalidInput, match="does not support custom sigmas schedules"):
        draw(made, sigmas=[0.9, 0.5])


def test_an_object_like_the_scheduler_of_sprint_will_do() -> None:
    class Plain:
        """Knows nothing of middle angles."""

        config = type("Config", (), {"prediction_type": "trigflow", "sigma_data": 0.5})

        def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
            self.timesteps = torch.linspace(1.5708, 0, num_inference_steps + 1)

        def step(
            self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, return_dict: bool = True
        ) -> Any:
            clean = timestep.cos() * sample - timestep.sin() * model_output
            after = self.timesteps[int((self.timesteps == timestep).nonzero()) + 1]
            return after.cos() * clean + after.sin() * 0.5 * torch.ones_like(clean), clean

    pipe = SanaSprintPipeline(**{**make_tiny_sprint().components, "scheduler": Plain()})
    assert torch.isfinite(draw(pipe)).all()
    assert torch.equal(draw(pipe), draw(pipe))
    for name, value in (("max_timesteps", 1.5), ("intermediate_timesteps", 1.0)):
        with pytest.raises(InvalidInput, match=f"Leave out `{name}` or use another scheduler"):
            draw(pipe, **{name: value})


def test_angles_are_refused_by_schedulers_without(pipe: SanaPipeline) -> None:
    sprint = SanaSprintPipeline(**make_tiny_sprint().components)
    sprint.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(InvalidInput, match="`max_timesteps` is an angle, but a FlowMatchEuler"):
        draw(sprint, max_timesteps=1.5)


def test_image_to_image_on_a_flow_scheduler_begins_between_two_levels() -> None:
    parts = make_tiny_sprint()
    pipe = SanaSprintImg2ImgPipeline(**{**parts.components, "scheduler": FlowMatchEulerDiscreteScheduler(shift=1.0)})
    draw(pipe, num_inference_steps=2, strength=0.6)
    first, second = FlowMatchEulerDiscreteScheduler(shift=1.0), pipe.scheduler.timesteps
    first.set_timesteps(2)
    between = first.timesteps[0] + 0.8 * (first.timesteps[1] - first.timesteps[0])
    assert second[0].item() == pytest.approx(between.item(), rel=1e-5)


# Folders


@pytest.fixture(scope="module")
def folder(pipe: SanaPipeline, branch: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = tmp_path_factory.mktemp("controlled") / "model"
    SanaControlNetPipeline(**pipe.components, controlnet=branch).save_pretrained(made)
    return made


def test_a_folder_with_a_control_network_comes_back(folder: Path, pipe: SanaPipeline, branch: Any) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    assert index["controlnet"] == ["diffusers", "SanaControlNetModel"]
    assert index["_class_name"] == "SanaControlNetPipeline"
    loaded = SanaControlNetPipeline.from_pretrained(folder)
    assert torch.equal(draw(loaded), draw(SanaControlNetPipeline(**pipe.components, controlnet=branch)))


def test_another_class_loads_the_folder_without_it(folder: Path, pipe: SanaPipeline) -> None:
    assert torch.equal(draw(SanaPipeline.from_pretrained(folder)), draw(pipe))
    pag = SanaPAGPipeline.from_pretrained(folder, pag_applied_layers="transformer_blocks.2")
    assert pag.pag_applied_layers == ["transformer_blocks.2"]
    assert pag.parts.controlnet is None


def test_a_folder_without_one_takes_it_by_keyword(tiny_folder: Path, tiny_parts: Any) -> None:
    with pytest.raises(CheckpointError, match="controlnet"):
        SanaControlNetPipeline.from_pretrained(tiny_folder)
    one = tiny_controlnet(tiny_parts.transformer)
    loaded = SanaControlNetPipeline.from_pretrained(tiny_folder, controlnet=one)
    assert loaded.controlnet is one
    assert SanaControlNetPipeline.from_pretrained(tiny_folder, controlnet=None).controlnet is None


def test_a_list_of_control_networks_cannot_be_saved_in_one_folder(
    pipe: SanaPipeline, branch: Any, tmp_path: Path
) -> None:
    with pytest.raises(InvalidInput, match="'controlnet' is a list"):
        SanaControlNetPipeline(**pipe.components, controlnet=[branch, branch]).save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_moving_and_casting_reach_the_control_networks(branch: Any) -> None:
    import copy

    parts = make_tiny_parts(num_layers=3)
    pipe = SanaControlNetPipeline(**parts.components, controlnet=[copy.deepcopy(branch), copy.deepcopy(branch)])
    pipe.to(torch.bfloat16)
    assert [one.dtype for one in pipe.controlnet] == [torch.bfloat16] * 2


# AutoPipelineForText2Image


def test_the_class_is_picked_from_the_folder(tiny_folder: Path, folder: Path, tmp_path: Path) -> None:
    pick = AutoPipelineForText2Image.from_pretrained
    assert type(pick(tiny_folder)) is SanaPipeline
    pag = pick(tiny_folder, enable_pag=True, pag_applied_layers="blocks.1")
    assert type(pag) is SanaPAGPipeline
    assert pag.pag_applied_layers == ["blocks.1"]
    assert type(pick(folder)) is SanaControlNetPipeline
    sprint = SanaSprintPipeline(**make_tiny_sprint().components)
    sprint.save_pretrained(tmp_path / "sprint")
    assert type(pick(tmp_path / "sprint")) is SanaSprintPipeline
    SanaSprintImg2ImgPipeline.from_pipe(sprint).save_pretrained(tmp_path / "pictures")
    assert type(pick(tmp_path / "pictures")) is SanaSprintPipeline, "it is asked for text to image"
    pag.save_pretrained(tmp_path / "pag")
    assert type(pick(tmp_path / "pag")) is SanaPAGPipeline
    with pytest.raises(InvalidInput, match="SanaSprintPipeline has no PAG"):
        pick(tmp_path / "sprint", enable_pag=True)


def test_a_control_network_by_keyword_picks_its_class(tiny_folder: Path, tiny_parts: Any) -> None:
    one = tiny_controlnet(tiny_parts.transformer)
    assert type(AutoPipelineForText2Image.from_pretrained(tiny_folder, controlnet=one)) is SanaControlNetPipeline


def test_an_unknown_class_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    index = json.loads((tiny_folder / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "_class_name": "FluxPipeline"}))
    with pytest.raises(CheckpointError, match=r"'FluxPipeline'.*SanaPipeline"):
        AutoPipelineForText2Image.from_pretrained(tmp_path)


def test_a_running_pipeline_is_changed_too(pipe: SanaPipeline) -> None:
    pag = AutoPipelineForText2Image.from_pipe(pipe, enable_pag=True)
    assert type(pag) is SanaPAGPipeline
    assert type(AutoPipelineForText2Image.from_pipe(pag)) is SanaPAGPipeline
    assert type(AutoPipelineForText2Image.from_pipe(pag, enable_pag=False)) is SanaPipeline


def test_all_public_names_of_the_pipelines_are_exported() -> None:
    for cls in FIVE:
        assert getattr(sana, cls.__name__) is cls
        assert cls.__name__ in sana.__all__
