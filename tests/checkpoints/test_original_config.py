"""The YAML files of the original code become configurations, cards and recipes; what is not understood is named."""

from pathlib import Path
from typing import Any

import pytest

from sana.cards import CARDS
from sana.checkpoints.original.settings import PUBLISHED, convert_original_config, read_original_config
from sana.errors import CheckpointError, ModelNotFound
from sana.text.instruction import COMPLEX_HUMAN_INSTRUCTION
from sana.training.config import OptimizerSettings, RunSettings, build

# Values of the published files, put together anew.
MODELS: dict[str, dict[str, Any]] = {
    "sana-0.6b-512": {"model": "SanaMS_600M_P1_D28", "image_size": 512, "mixed_precision": "fp16"},
    "sana-0.6b-1024": {"model": "SanaMS_600M_P1_D28", "image_size": 1024, "mixed_precision": "fp16"},
    "sana-1.6b-512": {"model": "SanaMS_1600M_P1_D20", "image_size": 512, "mixed_precision": "fp16"},
    "sana-1.6b-1024-fp16": {"model": "SanaMS_1600M_P1_D20", "image_size": 1024, "mixed_precision": "fp16"},
    "sana-1.6b-2k": {"model": "SanaMS_1600M_P1_D20", "image_size": 2048, "mixed_precision": "bf16", "use_pe": True},
    "sana-1.6b-4k": {
        "model": "SanaMS_1600M_P1_D20", "image_size": 4096, "mixed_precision": "bf16", "use_pe": True,
        "pe_interpolation": 2.0,
    },
    "sana1.5-1.6b-1024": {
        "model": "SanaMS_1600M_P1_D20", "image_size": 1024, "mixed_precision": "bf16", "qk_norm": True,
        "cross_norm": True,
    },
    "sana1.5-4.8b-1024": {
        "model": "SanaMS_4800M_P1_D60", "image_size": 1024, "mixed_precision": "bf16", "qk_norm": True,
        "cross_norm": True,
    },
    "sana-sprint-1.6b-1024": {
        "model": "SanaMSCM_1600M_P1_D20", "image_size": 1024, "mixed_precision": "bf16", "qk_norm": True,
        "cross_norm": True, "cfg_embed": True, "cfg_embed_scale": 0.1,
    },
    "sana-1.6b-1024-controlnet-hed": {
        "model": "SanaMSControlNet_1600M_P1_D20", "image_size": 1024, "mixed_precision": "bf16",
    },
}  # fmt: skip


def content(model: dict[str, Any], **scheduler: Any) -> dict[str, Any]:
    return {
        "model": model,
        "scheduler": {"predict_flow_v": True, "flow_shift": 3.0, "vis_sampler": "flow_dpm-solver", **scheduler},
    }


@pytest.mark.parametrize("name", MODELS)
def test_published_files_describe_their_cards(name: str) -> None:
    found = convert_original_config(content(MODELS[name]), "it")
    card = CARDS[name]
    assert found.remarks == ()
    assert found.transformer == card.transformer
    assert found.controlnet == card.controlnet
    assert found.card().name == name
    assert (found.dtype, found.image_size) == (card.dtypes["transformer"], card.base_size)
    assert found.sampler == card.sampler


def test_the_teacher_s_file_is_read_although_the_original_refuses_it() -> None:
    value = content(MODELS["sana1.5-1.6b-1024"], timestep_norm_scale_factor=1000, predict_v=True)
    del value["scheduler"]["predict_flow_v"]
    found = convert_original_config(value, "it")
    assert found.remarks == ("scheduler.predict_v is read as predict_flow_v.",)
    assert found.transformer == CARDS["sana-sprint-teacher-1.6b-1024"].transformer
    assert found.card().name == "sana-sprint-teacher-1.6b-1024"
    for key in ("predict_v", "predict_flow_v"):
        with pytest.raises(CheckpointError, match="predicts noise, not velocity"):
            convert_original_config({**value, "scheduler": {key: False}}, "it")


def test_what_the_file_says_goes_into_the_card() -> None:
    value = content({**MODELS["sana-0.6b-1024"], "pag_applied_layers": [3, 14]}, flow_shift=4.0)
    card = convert_original_config(value, "it").card()
    assert (card.flow_shift, card.pag_layers) == (4.0, ("transformer_blocks.3", "transformer_blocks.14"))
    assert convert_original_config(content(MODELS["sana-0.6b-512"], inference_flow_shift=2.0), "it").flow_shift == 2.0
    euler = convert_original_config(content(MODELS["sana-0.6b-512"], vis_sampler="flow_euler"), "it")
    assert euler.sampler == "flow-euler"


def test_training_settings_become_a_recipe_of_ours() -> None:
    value = content(MODELS["sana-1.6b-1024-fp16"])
    value["train"] = {
        "seed": 1, "train_batch_size": 64, "gradient_accumulation_steps": 2, "gradient_clip": 0.1,
        "log_interval": 20, "save_model_steps": 500, "eval_sampling_steps": 250, "ema_update": False,
        "optimizer": {"lr": 0.0001, "betas": [0.9, 0.999, 0.9999], "weight_decay": 0.0, "type": "CAMEWrapper"},
        "lr_schedule_args": {"num_warmup_steps": 2000},
    }  # fmt: skip
    recipe = convert_original_config(value, "it").recipe()
    run = build(RunSettings, {**recipe["run"], "steps": 1}, "run")
    optimizer = build(
        OptimizerSettings, {**recipe["optimizer"], "betas": list(recipe["optimizer"]["betas"])}, "optimizer"
    )
    assert (run.batch_size, run.accumulate, run.seed, run.precision, run.evaluate_every) == (64, 2, 1, "bf16", 250)
    assert (optimizer.lr, optimizer.betas, optimizer.warmup, optimizer.clip) == (1e-4, (0.9, 0.999), 2000, 0.1)
    assert recipe["flow_matching"]["shift"] == 3.0
    assert recipe["flow_matching"]["model"]["num_layers"] == 20


def test_unknown_keys_are_reported() -> None:
    value = {
        **content({**MODELS["sana-0.6b-512"], "image_sise": 3}),
        "modle": {},
        "vae": {"weight_typ": 1},
        "train": [],
    }
    remarks = convert_original_config({**value, "data": 3}, "it").remarks
    named = [remark.split()[0] for remark in remarks]
    assert named == ["modle", "data", "model.image_sise", "vae.weight_typ"]
    assert "Did you mean 'model'?" in remarks[0]
    assert remarks[1] == "data should be a section and is left out."
    assert "Did you mean 'image_size'?" in remarks[2]


def test_the_instruction_and_its_quotes() -> None:
    value = content(MODELS["sana-0.6b-512"])
    lines = [line.replace("'", '"') for line in COMPLEX_HUMAN_INSTRUCTION]
    found = convert_original_config({**value, "text_encoder": {"chi_prompt": lines, "model_max_length": 200}}, "it")
    assert (found.instruction, found.max_length) == (tuple(lines), 200)
    assert convert_original_config(value, "it").instruction is None


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_names_will_do_without_the_file(name: str) -> None:
    found = read_original_config(f"configs/sana_config/1024ms/{name}.yaml")
    card, shift = PUBLISHED[name]
    assert (found.card().name, found.flow_shift) == (card, shift)
    assert "file is not here" in found.remarks[0]


def test_hostile_files_are_refused_in_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    canary = tmp_path / "canary"
    bomb = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
    refused = {
        f"model: !!python/object/apply:os.mkdir ['{canary}']": "not valid YAML",
        f"!!python/object/new:os.mkdir ['{canary}']": "not valid YAML",
        bomb: "uses YAML aliases",
        "model: [": "not valid YAML",
        "[1, 2]": "no configuration of the original code",
        "model: 3": "no configuration of the original code",
        "model: {model: __import__('os').mkdir}": "no SANA image model",
        "model: {model: SanaMS_1600M_P1_D20, image_size: big}": "cannot be converted",
        "model: {model: SanaMS_1600M_P1_D20, image_size: -5}": "cannot be converted",
        "model: {model: SanaVideo_2000M_P1_D20}": "no SANA image model",
        "model: {model: SanaMS_1600M_P1_D20, qk_norm: true, cross_norm: false}": "qk_norm and cross_norm differ",
        "\x00": "not valid YAML",
    }
    for text, expected in refused.items():
        file.write_text(text)
        with pytest.raises(CheckpointError, match=expected) as error:
            read_original_config(file)
        assert "\n" not in str(error.value)
    file.write_bytes(b"a: " + b"x" * (1 << 20))
    with pytest.raises(CheckpointError, match="more than 1 MB"):
        read_original_config(file)
    with pytest.raises(ModelNotFound, match=r"no published one of that name. Did you mean 'Sana_1600M_img1024'"):
        read_original_config(tmp_path / "Sana_1600M_img102.yaml")
    assert not canary.exists()


def test_values_that_no_model_has_are_refused_and_others_are_told() -> None:
    def read(**sections: Any) -> Any:
        model = {"model": "SanaMS_1600M_P1_D20", **sections.pop("model", {})}
        return convert_original_config({"model": model, **sections}, "it")

    refused: dict[str, dict[str, Any]] = {
        "image_size is 99999999999": {"model": {"image_size": 99999999999}},
        "flow_shift is -3": {"scheduler": {"flow_shift": -3}},
        "flow_shift is inf": {"scheduler": {"flow_shift": float("inf")}},
        "model_max_length is 0": {"text_encoder": {"model_max_length": 0}},
        "pag_applied_layers is 20": {"model": {"pag_applied_layers": [20]}},
        "pag_applied_layers is -1": {"model": {"pag_applied_layers": [-1]}},
        "whose size no SANA model has": {"model": {"model": "SanaMS_999M_P1_D20"}},
        "'SanaMS_1600M_P1_D99999', whose size": {"model": {"model": "SanaMS_1600M_P1_D99999"}},
    }
    for text, sections in refused.items():
        with pytest.raises(CheckpointError, match=text):
            read(**sections)
    assert read(text_encoder={"chi_prompt": "one\ntwo"}).instruction == ("one", "two")
    solver = read(scheduler={"vis_sampler": "sa-solver"})
    assert (solver.sampler, solver.remarks) == (
        "flow-dpm", ("scheduler.vis_sampler sa-solver is not here; flow-dpm takes its place.",)
    )  # fmt: skip
    assert read(scheduler=3, train=["a"]).remarks == (
        "scheduler should be a section and is left out.", "train should be a section and is left out.",
    )  # fmt: skip


def test_nesting_takes_no_time(tmp_path: Path) -> None:
    (tmp_path / "deep.yaml").write_text("model: " + "[" * 200_000)
    with pytest.raises(CheckpointError, match="nests its values too deep"):
        read_original_config(tmp_path / "deep.yaml")
