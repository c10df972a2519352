"""Control networks in the loop: the reference's numbers, the original wiring, and what several of them add up to."""

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from sana.checkpoints.controlnet import SanaControlNetModel
from sana.engine.apart import Apart
from sana.engine.predictor import Captions, Control, Predictor
from sana.errors import InvalidInput
from sana.flow.guidance import guided_velocity, pag_scales
from sana.flow.schedules import flow_dpm_grid
from sana.nn.embeddings import position_table
from tiny_model import tiny_transformer

GRID = flow_dpm_grid(4, 3.0)
SIZE = (4, 6)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_network(base: Any, seed: int = 0, num_layers: int = 2) -> SanaControlNetModel:
    """A branch of the base that has been trained a little, so that it differs from its base and says something."""
    network = SanaControlNetModel.from_transformer(base, num_layers=num_layers)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network


@pytest.fixture(scope="module")
def base() -> Any:
    return tiny_transformer(num_layers=4)


@pytest.fixture(scope="module")
def network(base: Any) -> SanaControlNetModel:
    return make_network(base)


def captions(rows: int) -> Captions:
    mask = (torch.arange(6) < torch.arange(rows)[:, None] % 3 + 4).long()
    return Captions(embeds=random(rows, 6, 32, seed=rows), mask=mask, rows=tuple(range(rows)))


def rms_rel(value: Tensor, reference: Tensor) -> float:
    return float((value.double() - reference.double()).norm() / reference.double().norm())


def predicted(predict: Any, x: Tensor, i: int, **options: bool) -> Tensor:
    with torch.no_grad():
        out: Tensor = predict(x, i, **options)
        return out


def oracle_of(model: Any) -> Any:
    kind = getattr(diffusers, type(model).__name__)
    oracle = kind(**model.config.to_dict()).eval()
    oracle.load_state_dict(model.state_dict())
    return oracle


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("changes", [{}, {"interpolation_scale": 2.0}, {"timestep_scale": 0.001}])
@pytest.mark.parametrize("scale", [1.0, 0.6])
def test_a_step_is_the_references(changes: dict[str, Any], guided: bool, scale: float) -> None:
    base = tiny_transformer(num_layers=4, **changes)
    network = make_network(base)
    batch, groups = 2, 2 if guided else 1
    text, x, control = captions(groups * batch), random(batch, 4, *SIZE), random(1, 4, *SIZE, seed=3)
    predict = Predictor(base, GRID.timesteps, text, controls=[Control(network=network, latents=control, scale=scale)])
    theirs = oracle_of(network), oracle_of(base)
    for i in (0, 2):
        told = GRID.timesteps[i].expand(groups * batch)
        given = (torch.cat([x] * groups), text.embeds)
        mask = {"encoder_attention_mask": text.mask.float()}
        with torch.no_grad():
            samples = theirs[0](
                *given,
                told,
                controlnet_cond=control.expand(groups * batch, -1, -1, -1),
                conditioning_scale=scale,
                **mask,
            ).controlnet_block_samples
            told = told * base.config.timestep_scale
            expected = theirs[1](*given, told, controlnet_block_samples=tuple(samples), **mask).sample
            without = theirs[1](*given, told, **mask).sample
        found = predicted(predict, x, i, guided=guided)
        assert rms_rel(found, expected) < 2e-6
        assert rms_rel(without, expected) > 1e-2, "the control says something"


def native_step(base: Any, network: Any, x: Tensor, told: Tensor, control: Tensor, text: Captions) -> Tensor:
    """The original's step, written down block by block: its loop over base blocks with a copy beside each."""
    caption = base.caption_norm(base.caption_projection(text.embeds))
    modulation, embedded = base.time_embed(told, None, torch.float32)
    bias = ((1 - text.mask.float()) * -10000.0)[:, None, None]
    grid = (x.shape[2], x.shape[3])

    def run(block: Any, tokens: Tensor) -> Tensor:
        out: Tensor = block(tokens, grid, modulation, block.attn2.key_value(caption), bias)
        return out

    tokens = base.patch_embed.proj(x).flatten(2).transpose(1, 2)
    if base.config.interpolation_scale is not None:
        tokens = tokens + position_table(*grid, 32, base.config.sample_size, base.config.interpolation_scale)
    tokens = run(base.transformer_blocks[0], tokens)
    embedded_control = base.patch_embed.proj(control).flatten(2).transpose(1, 2)
    beside = tokens + network.input_block(embedded_control)
    for i, block in enumerate(base.transformer_blocks[1:]):
        if i < len(network.transformer_blocks):
            beside = run(network.transformer_blocks[i], beside)
            tokens = tokens + network.controlnet_blocks[i](beside)
        tokens = run(block, tokens)
    shift, scale = (base.scale_shift_table + embedded[:, None]).chunk(2, dim=1)
    tokens = torch.nn.functional.layer_norm(tokens, tokens.shape[-1:], eps=1e-6) * (1 + scale) + shift
    out: Tensor = base.proj_out(tokens).transpose(1, 2).unflatten(2, grid)
    return out


def native_network(base: Any, num_layers: int = 3) -> SanaControlNetModel:
    """Blocks and projections of their own, embedders copied from the base: what one file with both holds."""
    network = make_network(base, num_layers=num_layers)
    copied = SanaControlNetModel.from_transformer(base, num_layers=num_layers)
    for name in ("patch_embed", "time_embed", "caption_projection", "caption_norm"):
        getattr(network, name).load_state_dict(getattr(copied, name).state_dict())
    return network


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("changes", [{}, {"timestep_scale": 0.001}, {"interpolation_scale": 2.0}])
def test_the_native_wiring_is_the_originals(guided: bool, changes: dict[str, Any]) -> None:
    base = tiny_transformer(num_layers=4, **changes)
    network = native_network(base)
    groups = 2 if guided else 1
    text, x, control = captions(2 * groups), random(2, 4, *SIZE), random(2, 4, *SIZE, seed=3)
    network.wiring = "native"
    given = Control(network=network, latents=control)
    found = predicted(Predictor(base, GRID.timesteps, text, controls=[given]), x, 1, guided=guided)
    rows, told = torch.cat([x] * groups), GRID.timesteps[1].expand(2 * groups) * base.config.timestep_scale
    with torch.no_grad():
        expected = native_step(base, network, rows, told, torch.cat([control] * groups), text)
    assert rms_rel(found, expected) < 2e-6
    network.wiring = "diffusers"
    other = predicted(Predictor(base, GRID.timesteps, text, controls=[given]), x, 1, guided=guided)
    assert rms_rel(other, found) > 1e-3


def test_no_positions_reach_the_native_branch() -> None:
    """The original hands None to its branch; for the same weights only the base's own positions may matter."""
    base = tiny_transformer(num_layers=4, interpolation_scale=1.0)
    network = native_network(base)
    control = random(1, 4, *SIZE)
    with torch.no_grad():
        plain = network.input_block(network.patch_embed(control))
        assert torch.equal(network.condition(control, positions=False), plain)
        assert not torch.equal(network.condition(control), plain)


@pytest.mark.parametrize("wiring", ["diffusers", "native"])
@pytest.mark.parametrize("layers", [(0,), (1, 3), (3,)])
@pytest.mark.parametrize("guided", [False, True])
def test_with_pag_the_perturbed_rows_have_the_conditional_residuals(
    base: Any, network: Any, wiring: str, layers: tuple[int, ...], guided: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "wiring", wiring)
    text, x = captions(2 if guided else 1), random(1, 4, *SIZE)
    control = Control(network=network, latents=random(1, 4, *SIZE, seed=3))
    options = {"perturbed_layers": layers, "controls": [control]}
    both = [kind(base, GRID.timesteps, text, **options) for kind in (Predictor, Apart)]
    one, apart = (predicted(predict, x, 1, guided=guided, perturbed=True) for predict in both)
    assert rms_rel(apart, one) < 1e-6
    plain = predicted(both[0], x, 1, guided=guided)
    assert rms_rel(one[:-1], plain) < 1e-6
    without = Predictor(base, GRID.timesteps, text, perturbed_layers=layers)
    assert rms_rel(predicted(without, x, 1, guided=guided, perturbed=True)[-1:], one[-1:]) > 1e-3


def residuals(base: Any, x: Tensor, controls: list[Control], i: int = 1, batch: int = 1) -> Tensor:
    return predicted(Predictor(base, GRID.timesteps, captions(2 * batch), controls=controls), x, i, guided=True)


def test_several_controls_add_up(base: Any, network: Any) -> None:
    x, first, second = random(1, 4, *SIZE), random(1, 4, *SIZE, seed=3), random(1, 4, *SIZE, seed=4)
    third = make_network(base, seed=7, num_layers=1)
    controls = [
        Control(network=network, latents=first, scale=0.5),
        Control(network=network, latents=second, scale=0.25),
        Control(network=third, latents=first),
    ]
    found = residuals(base, x, controls)
    text = captions(2)
    told, rows = GRID.timesteps[1].expand(2), torch.cat([x, x])
    total: list[Tensor] = [torch.zeros(())] * 2
    with torch.no_grad():
        for control in controls:
            samples = control.network(
                rows, text.embeds, told, torch.cat([control.latents] * 2), control.scale, text.mask
            ).controlnet_block_samples
            total = [a + b for a, b in zip(total, [*samples, torch.zeros(())][:2], strict=True)]
        expected = base(rows, text.embeds, told, None, text.mask, controlnet_block_samples=total).sample
    assert rms_rel(found, expected) < 2e-6


def test_each_latent_may_have_its_own_scale_and_picture(base: Any, network: Any) -> None:
    x, pictures = random(2, 4, *SIZE), random(2, 4, *SIZE, seed=3)
    text = captions(4)
    whole = Control(network=network, latents=pictures, scale=[0.3, 1.5])
    found = predicted(Predictor(base, GRID.timesteps, text, controls=[whole]), x, 1, guided=True)
    for row, scale in enumerate((0.3, 1.5)):
        pick = [row, 2 + row]
        alone = Captions(embeds=text.embeds[pick], mask=text.mask[pick], rows=(0, 1))
        control = Control(network=network, latents=pictures[row : row + 1], scale=scale)
        one = predicted(Predictor(base, GRID.timesteps, alone, controls=[control]), x[row : row + 1], 1, guided=True)
        assert rms_rel(found[pick], one) < 1e-6


def test_it_acts_between_start_and_end_only(base: Any, network: Any) -> None:
    x, picture = random(1, 4, *SIZE), random(1, 4, *SIZE, seed=3)
    part = [Control(network=network, latents=picture, start=0.25, end=0.75)]
    always = [Control(network=network, latents=picture)]
    for i in range(4):
        expected = residuals(base, x, always if i in (1, 2) else [], i)
        assert torch.equal(residuals(base, x, part, i), expected)


def test_scale_zero_changes_nothing_and_costs_nothing(base: Any, network: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "residuals", lambda *_: pytest.fail("the branch need not run"))
    x, picture = random(1, 4, *SIZE), random(1, 4, *SIZE, seed=3)
    off = [Control(network=network, latents=picture, scale=0.0), Control(network=network, latents=picture, scale=[0.0])]
    assert torch.equal(residuals(base, x, off), residuals(base, x, []))


def test_the_network_can_be_told_other_times(base: Any, network: Any) -> None:
    x, picture = random(1, 4, *SIZE), random(1, 4, *SIZE, seed=3)
    other = Control(network=network, latents=picture, timesteps=torch.full((4,), 77))
    found = residuals(base, x, [other])
    text = captions(2)
    with torch.no_grad():
        rows = torch.cat([x, x])
        samples = network(
            rows, text.embeds, torch.tensor([77, 77]), torch.cat([picture] * 2), 1.0, text.mask
        ).controlnet_block_samples
        told = GRID.timesteps[1].expand(2)
        expected = base(rows, text.embeds, told, None, text.mask, controlnet_block_samples=samples).sample
    assert rms_rel(found, expected) < 2e-6


@pytest.mark.parametrize(("qk_norm", "factor"), [(None, 1000), ("rms_norm_across_heads", 1)])
def test_beside_sprint_a_network_is_told_the_times_it_was_trained_on(qk_norm: str | None, factor: int) -> None:
    sprint = tiny_transformer(num_layers=3, guidance_embeds=True, qk_norm="rms_norm_across_heads")
    network = make_network(tiny_transformer(num_layers=3, qk_norm=qk_norm))
    x, picture, text, times = random(1, 4, *SIZE), random(1, 4, *SIZE, seed=3), captions(1), torch.tensor([0.9, 0.5])
    found, expected = (
        predicted(Predictor(sprint, times, text, guidance=4.5, controls=[control]), x, 1, guided=False)
        for control in (
            Control(network=network, latents=picture),
            Control(network=network, latents=picture, timesteps=times * factor),
        )
    )
    assert torch.equal(found, expected)


def test_what_is_constant_is_computed_once(base: Any, network: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("encode_caption", "cross_attention_kv", "modulation", "condition", "residuals"):
        piece = getattr(network, name)
        note = lambda *a, name=name, piece=piece, **k: calls.append(name) or piece(*a, **k)  # noqa: E731
        monkeypatch.setattr(network, name, note)
    text, x = captions(2), random(1, 4, *SIZE)
    control = Control(network=network, latents=random(1, 4, *SIZE, seed=3))
    predict = Predictor(base, GRID.timesteps, text, controls=[control], perturbed_layers=(3,))
    velocity = guided_velocity(predict, 4.5, (False, True, True, False), pag_scales(GRID, 3.0))
    with torch.no_grad():
        for i in range(4):
            velocity(x, i)
    assert {name: calls.count(name) for name in set(calls)} == {
        "encode_caption": 1,
        "cross_attention_kv": 1,
        "modulation": 1,
        "condition": 1,
        "residuals": 4,
    }


def test_outside_the_guidance_interval_only_the_control_is_left(base: Any, network: Any) -> None:
    text, x = captions(2), random(1, 4, *SIZE)
    control = Control(network=network, latents=random(1, 4, *SIZE, seed=3))
    predict = Predictor(base, GRID.timesteps, text, controls=[control], perturbed_layers=(2,))
    velocity = guided_velocity(predict, 4.5, (False, True, True, True), pag_scales(GRID, 3.0))
    with torch.no_grad():
        assert torch.equal(velocity(x, 0), predict(x, 0, guided=False))
        u, c, p = predict(x, 1, guided=True, perturbed=True).chunk(3)
        assert torch.allclose(velocity(x, 1), u + 4.5 * (c - u) + 3 * (c - p), atol=1e-5)


def test_a_network_of_another_dtype(base: Any, network: Any) -> None:
    import copy

    half = copy.deepcopy(network).to(torch.bfloat16)
    x, picture = random(1, 4, *SIZE), random(1, 4, *SIZE, seed=3)
    exact = residuals(base, x, [Control(network=network, latents=picture)])
    found = residuals(base, x, [Control(network=half, latents=picture)])
    assert found.dtype == torch.float32
    assert rms_rel(found, exact) < 2e-2


def test_misfits_are_refused(base: Any, network: Any) -> None:
    picture = random(1, 4, *SIZE)
    for wrong, message in (
        ({"start": 0.5, "end": 0.5}, "0 <= start < end <= 1"),
        ({"end": 1.5}, "0 <= start < end <= 1"),
        ({"scale": float("nan")}, "finite number"),
        ({"scale": []}, "finite number"),
        ({"latents": random(1, 5, *SIZE)}, "its network reads"),
        ({"network": base}, "use a SanaControlNetModel"),
    ):
        with pytest.raises(InvalidInput, match=message):
            Control(**{"network": network, "latents": picture, **wrong})
    crossed = make_network(base)
    crossed.wiring = "crossed"
    with pytest.raises(InvalidInput, match="`wiring` is 'crossed'; choose 'diffusers' or 'native'"):
        Control(network=crossed, latents=picture)
    for given, message in (
        (Control(network=network, latents=picture, start=0.3, end=0.45), "None of the 4 steps"),
        (Control(network=network, latents=picture, timesteps=torch.ones(3)), "told 3 timesteps"),
        (Control(network=make_network(tiny_transformer(num_layers=3, patch_size=2)), latents=picture), "patch_size 2"),
    ):
        with pytest.raises(InvalidInput, match=message):
            residuals(base, random(1, 4, *SIZE), [given])
    for given in (random(1, 4, 6, 4), random(3, 4, *SIZE)):
        with pytest.raises(InvalidInput, match="does not fit latents"):
            residuals(base, random(1, 4, *SIZE), [Control(network=network, latents=given)])
    with pytest.raises(InvalidInput, match="3 scales for 1 latents"):
        residuals(base, random(1, 4, *SIZE), [Control(network=network, latents=picture, scale=[1, 2, 3])])
