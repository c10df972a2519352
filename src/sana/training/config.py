"""Recipes: a TOML file says what is trained, on what, for how long; every key can be overridden on the command
line.

A recipe has the tables `[run]` (one per process: steps, seed, precision), `[optimizer]`, where two players take turns
`[discriminator_optimizer]`, and one named after its objective, whose keys are the fields of that objective's settings.
"""

import contextlib
import dataclasses
import itertools
import math
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from sana.errors import BadData, CheckpointError, InvalidInput, ModelNotFound, did_you_mean

T = TypeVar("T")

ADAM = {"betas": (0.9, 0.99), "eps": (1e-8,)}
NUMBERS = {
    "adamw": ADAM,
    "muon": ADAM,
    "came": {"betas": (0.9, 0.999, 0.9999), "eps": (1e-30, 1e-16)},
    "adamw8bit": ADAM,
}
"""Optimiser -> its own betas and epsilons, where a recipe has none."""
TRACKERS = ("tensorboard", "wandb")
MAX_SEED = 2**32 - 1
SCHEDULES = ("constant", "cosine", "linear")


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """How long, how often, and in which precision."""

    steps: int
    batch_size: int
    seed: int = 0
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    precision: str = "auto"
    """bf16 (autocast), float32, or auto: bf16 where the device computes it natively."""
    threads: int = 1
    """CPU threads of this process. One is the fastest per core when anything else runs on the machine."""
    compile: bool = False
    accumulate: int = 1
    checkpointing: bool = False
    """Compute the inside of each block again on the way back instead of keeping it: less memory, a third slower."""
    offload: bool = False
    """Have autoencoder and text encoder on the device only while they encode, where no features are computed before."""
    shard: bool = False
    """Split weights, gradients and optimiser states over the processes (FSDP2) instead of copying them (DDP)."""
    timeout: float = 600.0
    """Seconds that a process waits for the others before it stops."""
    ema: float = 0.999
    """Decay of the averaged weights (warmed up as (1 + k) / (10 + k)); 0 switches averaging off."""
    log_every: int = 20
    save_every: int = 200
    evaluate_every: int = 500
    max_non_finite: int = 20
    """Steps with a non-finite loss or gradient that are skipped before the run stops."""
    export: str = "last"
    """What is exported: the last (averaged) weights, or the best by the watched figure."""
    report: tuple[str, ...] = ()
    """Where the log goes beside `metrics.jsonl` and `report.html`: tensorboard, wandb."""

    def __post_init__(self) -> None:
        """Refuse counts that cannot be."""
        for name in ("steps", "batch_size", "threads", "accumulate", "log_every", "save_every", "evaluate_every"):
            if getattr(self, name) < 1:
                raise InvalidInput(f"run.{name} must be at least 1, but is {getattr(self, name)}.")
        if not 0 <= self.seed <= MAX_SEED:
            raise InvalidInput(f"run.seed must lie between 0 and {MAX_SEED}, but is {self.seed}.")
        if not 0 <= self.ema < 1:
            raise InvalidInput(f"run.ema must lie in [0, 1), but is {self.ema}.")
        if self.export not in ("last", "best"):
            raise InvalidInput(f"run.export must be last or best, but is '{self.export}'.")
        if self.export == "best" and self.evaluate_every >= self.steps:
            raise InvalidInput(
                f"run.export = 'best' has only the start and the end to choose from: run.evaluate_every is"
                f" {self.evaluate_every}, so set it below the {self.steps} steps."
            )
        if self.max_non_finite < 0:
            raise InvalidInput(f"run.max_non_finite must not be negative, but is {self.max_non_finite}.")
        if self.threads != 1 and self.device not in ("auto", "cpu"):
            raise InvalidInput(f"run.threads has no effect on the device {self.device}. Remove it.")
        if not 0 < self.timeout < math.inf:
            raise InvalidInput(f"run.timeout must be positive, but is {self.timeout}.")
        for name in self.report:
            if name not in TRACKERS:
                raise InvalidInput(f"run.report may name {' and '.join(TRACKERS)}, but not '{name}'.")
        if self.precision not in ("auto", "bf16", "float32"):
            raise InvalidInput(f"run.precision must be auto, bf16 or float32, but is '{self.precision}'.")


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """Which optimiser, and how fast."""

    name: str = "adamw"
    """adamw, muon (for inner matrices; AdamW for the rest), came, or adamw8bit."""
    lr: float = 1e-3
    scale_lr: bool = False
    """Multiply `lr` by sqrt(samples in a step / 256), samples of all processes and micro-batches counted."""
    betas: tuple[float, ...] = ()
    """Two numbers, three for came; empty takes the optimiser's own: 0.9, 0.99 or 0.9, 0.999, 0.9999."""
    eps: tuple[float, ...] = ()
    """One number, two for came; empty takes the optimiser's own: 1e-8 or 1e-30, 1e-16."""
    weight_decay: float = 0.0
    warmup: int = 100
    schedule: str = "linear"
    """What follows the warm-up: constant, or constant and then a linear or cosine tail to a hundredth."""
    decay_share: float = 0.4
    """The last share of the steps over which the rate falls; 1 is a tail from the first step to the last."""
    clip: float = 1.0

    def __post_init__(self) -> None:
        """Refuse unknown optimisers and rates that cannot train."""
        for field_name, choices in (("name", tuple(NUMBERS)), ("schedule", SCHEDULES)):
            value = getattr(self, field_name)
            if value not in choices:
                raise InvalidInput(
                    f"optimizer.{field_name} must be {', '.join(choices[:-1])} or {choices[-1]}, but is '{value}'."
                )
        for field_name in ("lr", "clip"):
            if not 0 < getattr(self, field_name) < math.inf:
                raise InvalidInput(f"optimizer.{field_name} must be positive, but is {getattr(self, field_name)}.")
        if not 0 <= self.decay_share <= 1:
            raise InvalidInput(f"optimizer.decay_share must lie in [0, 1], but is {self.decay_share}.")
        if self.schedule == "constant" and self.decay_share not in (0, OptimizerSettings.decay_share):
            raise InvalidInput(
                "optimizer.decay_share has no effect with schedule = 'constant'; remove it, or choose linear or cosine."
            )
        for field_name in ("weight_decay", "warmup"):
            if not 0 <= getattr(self, field_name) < math.inf:
                raise InvalidInput(f"optimizer.{field_name} must not be negative, but is {getattr(self, field_name)}.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise InvalidInput(f"optimizer.betas must lie in [0, 1), but are {list(self.betas)}.")
        if not all(eps > 0 for eps in self.eps):
            raise InvalidInput(f"optimizer.eps must be positive, but is {list(self.eps)}.")
        for field_name, own in NUMBERS[self.name].items():
            given = getattr(self, field_name)
            if given and len(given) != len(own):
                raise InvalidInput(
                    f"optimizer.{field_name} of {self.name} takes {len(own)} numbers, for example {list(own)}, but is"
                    f" {list(given)}."
                )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A parsed recipe: which objective, its own table, and the shared settings."""

    objective: str
    run: RunSettings
    optimizer: OptimizerSettings
    settings: Mapping[str, Any] = field(default_factory=dict)
    discriminator_optimizer: OptimizerSettings | None = None
    """For the second player of an objective that has two; without it both have the settings of `optimizer`."""


def changed(settings: object, *names: str) -> list[str]:
    """Return those of the named settings that are not as they are by default."""
    return [name for name in names if getattr(settings, name) != getattr(type(settings), name)]


@contextlib.contextmanager
def restated(how: Callable[[str], str]) -> Iterator[None]:
    """Let `how` make another sentence of one that refuses a setting, or the data or model that one names."""
    try:
        yield
    except _RESTATED as error:
        text = how(str(error))
        if type(error) not in _RESTATED or text == str(error):
            raise
        raise type(error)(text) from error


def about(setting: str) -> contextlib.AbstractContextManager[None]:
    """Begin the sentence with the setting that brought it about, whose line in the recipe is then found."""
    return restated(lambda words: words if setting in words else f"{setting}: {words}")


def named(table: str, as_: str) -> contextlib.AbstractContextManager[None]:
    """Call the settings of `table` by the table `as_` that they stand in."""
    return restated(lambda words: re.sub(rf"(?<![\w.]){re.escape(table)}(?=[.\]])", as_, words))


def called(model: str, as_: str) -> contextlib.AbstractContextManager[None]:
    """Call the fields of the configuration of a `model` by the table `as_` that they stand in."""
    return restated(lambda words: re.sub(rf"\b{model}(Config|Settings)\.", f"{as_}.", words))


def build(cls: type[T], table: Mapping[str, Any], where: str) -> T:
    """Make the dataclass `cls` from a TOML table; lists become tuples, unknown keys and wrong types are errors."""
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    check_fields(cls, table, where)
    for key, value in table.items():
        expected = hints[key]
        if expected is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        plain = get_origin(expected) or expected
        wanted = (list,) if plain is tuple else (dict,) if plain is Mapping else (plain,)
        if not isinstance(value, wanted) or (isinstance(value, bool) and plain is not bool):
            told = {tuple: "list", Mapping: "table"}.get(plain, plain.__name__)
            raise InvalidInput(f"{where}.{key} must be of type {told}, but is {value!r}.")
        if isinstance(value, float) and not math.isfinite(value):
            raise InvalidInput(f"{where}.{key} must be a finite number, but is {value!r}.")
        if plain is tuple:
            element = get_args(expected)[0]
            kinds = (int, float) if element is float else (element,)
            if any(not isinstance(one, kinds) or (isinstance(one, bool) and element is not bool) for one in value):
                raise InvalidInput(f"{where}.{key} must be a list of {element.__name__}, but is {value!r}.")
        values[key] = tuple(value) if isinstance(value, list) else value
    missing = [
        name
        for name, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and name not in values
    ]
    if missing:
        raise InvalidInput(f"{where} lacks {', '.join(missing)}; add it to the recipe.")
    return cls(**values)


def check_fields(cls: type[Any], table: Mapping[str, Any], where: str) -> None:
    """Refuse keys of a table that are no fields of the dataclass `cls`.

    Raises:
        InvalidInput: naming the key.
    """
    fields = [f.name for f in dataclasses.fields(cls)]
    for key in table:
        if key not in fields:
            raise InvalidInput(
                f"{where} has no setting '{key}'.{did_you_mean(key, fields)} It has: {', '.join(fields)}."
            )


def _override(tables: dict[str, Any], key: str, text: str) -> None:
    """Set `table.key`, or a key of a table inside, from its TOML spelling; a bare word counts as a string."""
    *path, name = key.split(".")
    if not path or not all((*path, name)):
        raise InvalidInput(f"An override is named table.key, for example run.steps; '{key}' is not.")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    for part in path:
        tables = tables.setdefault(part, {})
        if not isinstance(tables, dict):
            raise InvalidInput(f"The override {key} goes into '{part}', which is no table.")
    tables[name] = value


def load_recipe(path: str | Path, overrides: Mapping[str, str] | None = None) -> Recipe:
    """Read a recipe file and lay `overrides` (such as `{"run.steps": "100"}`) over it.

    Errors: ModelNotFound when there is none; InvalidInput with file and line, or with the override, for what is wrong.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        tables = tomllib.loads(text)
    except FileNotFoundError as error:
        raise ModelNotFound(f"There is no recipe at '{path}'. The repository's are in recipes/.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidInput(f"'{path}' is not valid TOML: {error}.") from error
    given = dict(overrides or {})
    for key, value in given.items():
        _override(tables, key, value)
    with located(path, text, given):
        recipe = _recipe(path, tables)
        if "run.steps" not in given:  # a trial of a few steps keeps its warm-up
            _check_warmup(recipe, tables)
        return recipe


def _check_warmup(recipe: Recipe, tables: Mapping[str, Any]) -> None:
    """Refuse a warm-up, where the recipe tells it, that outlasts the run: the rate would never be reached."""
    for name, settings in (
        ("optimizer", recipe.optimizer),
        ("discriminator_optimizer", recipe.discriminator_optimizer),
    ):
        if settings is not None and "warmup" in tables.get(name, {}) and settings.warmup > recipe.run.steps:
            raise InvalidInput(
                f"{name}.warmup is {settings.warmup}, but the run ends after {recipe.run.steps} steps, before the rate"
                " is reached. Shorten it, or raise the steps."
            )


def _recipe(path: str | Path, tables: Mapping[str, Any]) -> Recipe:
    objective = tables.get("objective")
    if not isinstance(objective, str):
        raise InvalidInput(f"'{path}' does not say what to train: add objective = \"...\" as its first line.")
    known = {"objective", "run", "optimizer", "discriminator_optimizer", objective}
    for name in tables:
        if name not in known:
            raise InvalidInput(f"'{path}' has an unknown table [{name}].{did_you_mean(name, known)}")
    second = None
    if (table := tables.get("discriminator_optimizer")) is not None:
        with named("optimizer", "discriminator_optimizer"):
            second = build(OptimizerSettings, table, "discriminator_optimizer")
    return Recipe(
        objective=objective,
        run=build(RunSettings, tables.get("run", {}), "run"),
        optimizer=build(OptimizerSettings, tables.get("optimizer", {}), "optimizer"),
        settings=tables.get(objective, {}),
        discriminator_optimizer=second,
    )


def located(path: str | Path, text: str, overrides: Mapping[str, str]) -> contextlib.AbstractContextManager[None]:
    """Begin the sentence about a setting, named `table.key` or `[table]` in it, with where that was given."""

    def how(words: str) -> str:
        names = _settings_in(words)
        places = (f"--{name}" if name in overrides else _line_of(path, text, name) for name in names)
        # What stands in braces on one line has no line of its own.
        tables = [*_TABLE.findall(words), *names, *(name.rpartition(".")[0] for name in names)]
        heads = (_line_of(path, text, t, is_table=True) or _line_of(path, text, t) for t in tables)
        below = (f"--{key}" for t in tables for key in overrides if key.startswith(f"{t}."))
        place = next(filter(None, itertools.chain(places, below, heads)), None)
        if place is None or words.startswith(f"{place}:"):
            return words
        # Of an override the name alone would stand there twice.
        own = words.removeprefix(f"{place[2:]}: ") if place.startswith("--") else words
        return f"{place}: {own}"

    return restated(how)


def _settings_in(words: str) -> list[str]:
    """Return what in a sentence may be the name of a setting, in the order of the sentence: advice comes last."""
    quoted = [(match.start(), f"{match[1]}.{match[2]}") for match in _QUOTED.finditer(words)]
    dotted = [(match.start(), match[0]) for match in _DOTTED.finditer(words)]
    return [name for _, name in sorted([*quoted, *dotted], key=lambda found: found[0])]


def _line_of(path: str | Path, text: str, name: str, *, is_table: bool = False) -> str | None:
    """Return `file, line n` of a setting `table.key`, or of the head of a table."""
    table, _, key = (name, "", "") if is_table or "." not in name else name.rpartition(".")
    here = ""
    for number, line in enumerate(text.splitlines(), 1):
        if head := re.match(r"\s*\[([^\[\]]+)\]", line):
            here = head[1].strip()
            if not key and here == table:
                return f"{path}, line {number}"
        elif key and here == table and re.match(rf"\s*[\"']?{re.escape(key)}[\"']?\s*=", line):
            return f"{path}, line {number}"
    return None


_RESTATED = (InvalidInput, BadData, ModelNotFound, CheckpointError)
_DOTTED = re.compile(r"\b([a-z_]\w*(?:\.[a-z_]\w*)+)\b")
_QUOTED = re.compile(r"\b([a-z_][\w.]*) has no setting '(\w+)'")
_TABLE = re.compile(r"\[([\w.]+)\]")
