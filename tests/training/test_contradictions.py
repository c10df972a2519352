"""Recipes whose settings contradict each other: refused before anything is loaded, in one sentence with file and line.

Each case is a recipe that is sound, and the line that makes it a contradiction.
"""

from pathlib import Path

import pytest

from sana.errors import InvalidInput
from sana.training.config import load_recipe, located
from sana.training.start import settings_of

RUN = "[run]\nsteps = 100\nbatch_size = 4\n"
FLOW = f'objective = "flow_matching"\n{RUN}[flow_matching]\nstart = "nano"\n'
PICTURES = (
    f'objective = "flow_matching"\n{RUN}[flow_matching.data]\npath = "pictures"\n[flow_matching]\nstart = "nano"\n'
)
DATA = f'objective = "flow_matching"\n{RUN}[flow_matching]\nstart = "nano"\n[flow_matching.data]\npath = "pictures"\n'
SCRATCH = (
    f'objective = "flow_matching"\n{RUN}[flow_matching]\nautoencoder = "a"\ntext = "t"\nfeatures = "f"\n'
)  # fmt: skip
CONTROL = (
    f'objective = "flow_matching"\n{RUN}[flow_matching]\nstart = "nano"\ntrain = "controlnet"\n'
    '[flow_matching.control]\nstart = "branch"\n'
)
MAPS = (
    f'objective = "flow_matching"\n{RUN}[flow_matching]\nstart = "nano"\ntrain = "controlnet"\n'
    '[flow_matching.data]\npath = "p"\nsquare = true\ncontrols = "c"\n[flow_matching.control]\nkind = "map"\n'
)
DISTIL = f'objective = "sprint"\n{RUN}[sprint]\nteacher = "t"\nfeatures = "f"\n'
DISTIL_DATA = f'objective = "sprint"\n{RUN}[sprint.data]\npath = "p"\n[sprint]\nteacher = "t"\n'
DISTIL_FEATURES = f'objective = "sprint"\n{RUN}[sprint]\nteacher = "t"\n[sprint.data]\npath = "p"\nfeatures = "f"\n'
LANGUAGE = f'objective = "language_model"\n{RUN}[language_model]\n'
CODER = f'objective = "autoencoder"\n{RUN}[autoencoder]\n'
REFINE = f'objective = "autoencoder"\n{RUN}[autoencoder]\nphase = "refine"\nstart = "a"\n'


def refused(file: Path, text: str) -> str:
    """Return what reading a recipe as `sana train` does ends with."""
    file.write_text(text)
    with pytest.raises(InvalidInput) as caught:
        read(file)
    return str(caught.value)


def read(file: Path) -> None:
    """Read a recipe as `sana train` does."""
    recipe = load_recipe(file)
    with located(file, file.read_text(), {}):
        settings_of(recipe)


@pytest.mark.parametrize(
    ("before", "line", "sentence"),
    [
        (CODER, "export = 'best'", "run.export = 'best' has only the start and the end to choose from"),
        (CODER, "seed = -1", "run.seed must lie between 0 and 4294967295, but is -1."),
        (CODER, "seed = 4294967296", "run.seed must lie between 0 and 4294967295, but is 4294967296."),
        (CODER, "max_non_finite = -1", "run.max_non_finite must not be negative, but is -1."),
        (CODER, 'device = "cuda"\nthreads = 2', "run.threads has no effect on the device cuda."),
        (LANGUAGE, "compile = true", "run.compile has no effect on 'language_model'."),
        (LANGUAGE, "checkpointing = true", "run.checkpointing has no effect on 'language_model'."),
        (LANGUAGE, "offload = true", "run.offload has no effect on 'language_model'."),
        (LANGUAGE, "shard = true", "run.shard does not go with 'language_model', which is small."),
        (CODER, "offload = true", "run.offload has no effect on 'autoencoder': nothing is encoded for it."),
        (SCRATCH, "offload = true", "run.offload has no effect without flow_matching.start"),
        (DATA + 'features = "f"\n', "offload = true", "run.offload has no effect beside flow_matching.data.features"),
        (DISTIL_FEATURES, "offload = true", "run.offload has no effect beside sprint.data.features"),
        (REFINE, "compile = true", "run.compile cannot take the two gradients of the phase refine apart."),
        (DISTIL + "gradient_penalty = 0.1\n", "shard = true", "run.shard does not go with sprint.gradient_penalty"),
        (DISTIL, "compile = true", "run.compile does not go with sprint"),
    ],
)
def test_in_run(tmp_path: Path, before: str, line: str, sentence: str) -> None:
    lines = before.splitlines()
    place = lines.index("batch_size = 4") + 1
    text = "\n".join([*lines[:place], line, *lines[place:]])
    number = place + 1 + line.count("\n")
    assert refused(tmp_path / "a.toml", text).startswith(f"{tmp_path / 'a.toml'}, line {number}: {sentence}")


@pytest.mark.parametrize(
    ("before", "line", "sentence"),
    [
        (CODER + "[optimizer]\n", "betas = [0.9]", "optimizer.betas of adamw takes 2 numbers, for example [0.9, 0.99]"),
        (CODER + '[optimizer]\nname = "came"\n', "eps = [1e-8]", "optimizer.eps of came takes 2 numbers"),
        (CODER + "[optimizer]\n", "warmup = 101", "optimizer.warmup is 101, but the run ends after 100 steps"),
        (REFINE + "[discriminator_optimizer]\n", "warmup = 500", "discriminator_optimizer.warmup is 500"),
        (REFINE + "[optimizer]\nlr = 1.0\n[discriminator_optimizer]\n", "lr = -1.0",
         "discriminator_optimizer.lr must be positive"),
        (CODER, "[discriminator_optimizer]", "[discriminator_optimizer] has no effect on this 'autoencoder'"),
        (FLOW, "[discriminator_optimizer]", "[discriminator_optimizer] has no effect on this 'flow_matching'"),
        (DISTIL + "adversarial_weight = 0.0\n", "[discriminator_optimizer]", "[discriminator_optimizer] has no effect"),
        (FLOW, "label_weight = 0.2", "flow_matching.label_weight has no effect beside start."),
        (FLOW, "label_block = 2", "flow_matching.label_block has no effect beside start."),
        (FLOW, "caption_gain = 1.0", "flow_matching.caption_gain has no effect beside start."),
        (FLOW + 'density = "uniform"\n', "logit_mean = 1.0", 'flow_matching.logit_mean acts only with density'),
        (FLOW + 'density = "uniform"\n', "logit_std = 2.0", 'flow_matching.logit_std acts only with density'),
        (FLOW, "logit_std = 0.0", "flow_matching.logit_std must be positive, but is 0.0."),
        (FLOW + 'train = "lora"\n', 'card = "nano"', 'flow_matching.card is of a whole model, but train = "lora"'),
        (FLOW, 'card = "nanno"', "flow_matching.card names no model that is known: 'nanno'. Did you mean 'nano'?"),
        (DISTIL, 'card = "nano-sprimt"', "sprint.card names no model that is known: 'nano-sprimt'. Did you mean"),
        (FLOW + 'weighting = "min-snr"\n', "snr_gamma = -5.0", "flow_matching.snr_gamma must be positive"),
        (FLOW, "logit_std = nan", "flow_matching.logit_std must be a finite number, but is nan."),
        (FLOW, "prompts = [1]", "flow_matching.prompts must be a list of str, but is [1]."),
        (FLOW, 'prompts = "a fish"', "flow_matching.prompts must be of type list, but is 'a fish'."),
        (FLOW, "model = 5", "flow_matching.model must be of type table, but is 5."),
        (CODER + "[optimizer]\n", 'betas = ["a", "b"]', "optimizer.betas must be a list of float"),
        (REFINE, "gan_weight = -1.0", "autoencoder.gan_weight must not be negative, but is -1.0."),
        (PICTURES, "scenes = 5", "flow_matching.scenes is of the drawn world"),
        (PICTURES, "captions = 5", "flow_matching.captions is of the drawn world"),
        (PICTURES, "terse = 0.5", "flow_matching.terse is of the drawn world"),
        (DATA + 'mode = "first"\n', "threshold = 20.0",
         "flow_matching.data.threshold is of the choice by score and has no effect with mode = 'first'"),
        (DATA + 'mode = "weight"\n', "temperature = 1.0", "flow_matching.data.temperature is of the choice by score"),
        (DATA, 'mode = "scores"', "flow_matching.data.mode must be one of auto, score, weight, first, not 'scores'."),
        (DATA, "least_best = 101.0", "flow_matching.data.least_best must lie from 0 to 100 but is 101.0."),
        (SCRATCH, 'base_dtype = "bfloat16"', "flow_matching.base_dtype is of a frozen transformer"),
        (SCRATCH + "label_weight = 0.0\n", "label_block = 2", "flow_matching.label_block has no effect with label"),
        (CONTROL, "blocks = 2", "flow_matching.control.blocks has no effect beside start"),
        (MAPS, '[flow_matching.prior]\nprompt = "a"\nfolder = "f"', "[flow_matching.prior] has no control pictures"),
        (DISTIL_DATA, 'features = "f"', "sprint.features is of the drawn world; write [sprint.data] features."),
        (DISTIL_DATA, "scenes = 5", "sprint.scenes is of the drawn world and has no effect on [sprint.data]."),
        (DISTIL_DATA, "captions = 5", "sprint.captions is of the drawn world"),
        (DISTIL_DATA, "terse = 0.5", "sprint.terse is of the drawn world"),
        (f'objective = "sprint"\n{RUN}[sprint]\nteacher = "t"\n[sprint.data]\npath = "p"\n', "held_out = -1",
         "sprint.data.held_out and .size must not be negative."),
        (f'objective = "sprint"\n{RUN}[sprint]\nteacher = "t"\n[sprint.data]\npath = "p"\n', "pth = 1",
         "sprint.data has no setting 'pth'."),
        (DISTIL + "adversarial_weight = 0.0\n", "consistency_weight = 0.0",
         "sprint.consistency_weight, adversarial_weight and matching_weight are all 0"),
        (DISTIL + "consistency_weight = 0.0\n", "warmup_steps = 5", "sprint.warmup_steps has no effect with cons"),
        (DISTIL + "consistency_weight = 0.0\n", 'limit = "clip"', "sprint.limit has no effect with consistency_weight"),
        (DISTIL + "adversarial_weight = 0.0\n", "taps = [1]", "sprint.taps has no effect with adversarial_weight = 0."),
        (LANGUAGE, "num_heads = 5", "language_model.num_heads must divide hidden_size, 192, but is 5."),
        (LANGUAGE, "num_kv_heads = 3", "language_model.num_kv_heads must divide num_heads, 4, but is 3."),
        (LANGUAGE, "num_layers = 0", "language_model.num_layers must be at least 1, but is 0."),
        (LANGUAGE, "question_weight = -1.0", "language_model.question_weight must not be negative, but is -1.0."),
        (LANGUAGE, "instruction_share = 1.5", "language_model.instruction_share must lie in [0, 1], but is 1.5."),
        (CODER, "gan_weight = 1.0", "autoencoder.gan_weight has no effect in the phase full."),
        (REFINE, "latent_penalty = 1.0", "autoencoder.latent_penalty has no effect in the phase refine."),
        (CODER + 'data = "p"\n', "thing_weight = 1.0", "autoencoder.thing_weight is about the drawn world"),
    ],
)  # fmt: skip
def test_in_the_other_tables(tmp_path: Path, before: str, line: str, sentence: str) -> None:
    number = before.count("\n") + 1
    assert refused(tmp_path / "a.toml", before + line).startswith(f"{tmp_path / 'a.toml'}, line {number}: {sentence}")


def test_a_trial_of_a_few_steps_keeps_the_warm_up_of_its_recipe(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text(CODER + "[optimizer]\nwarmup = 50\n")
    assert load_recipe(file, {"run.steps": "2"}).optimizer.warmup == 50
    with pytest.raises(InvalidInput, match=r"^--optimizer\.warmup: optimizer\.warmup is 200"):
        load_recipe(file, {"optimizer.warmup": "200"})


SOUND = (FLOW, PICTURES, DATA, SCRATCH, CONTROL, MAPS, DISTIL, DISTIL_DATA, LANGUAGE, CODER, REFINE)


@pytest.mark.parametrize(
    "text", [*SOUND, REFINE + "[discriminator_optimizer]\n", DISTIL + "adversarial_weight = 0.0\n"]
)
def test_without_that_line_they_are_sound(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.toml").write_text(text)
    read(tmp_path / "a.toml")
