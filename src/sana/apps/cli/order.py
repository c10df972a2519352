"""What `sana generate` is asked to do: the settings of all layers, read into one order, checked before loading."""

import contextlib
import dataclasses
import importlib.util
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sana.apps.cli import arguments, settings
from sana.apps.cli.arguments import Group, options_of
from sana.apps.cli.choosing import CHOOSING
from sana.apps.cli.choosing import check as check_choosing
from sana.apps.cli.machine import Machine
from sana.apps.cli.names import STDOUT, distinct, is_folder, plan_files, slug
from sana.apps.cli.options import EDIT, EVERYTHING, FIELDS, Files, Manner, keys, picture_keys
from sana.apps.cli.output import printable
from sana.apps.cli.prompts import Entry, read_prompts
from sana.apps.cli.roads import GENERATE, Road
from sana.apps.cli.settings import FLAG, Settings
from sana.apps.cli.sweep import Axis, points, read_axes
from sana.apps.cli.values import MOST_SEEDS, Shape
from sana.cards import Card
from sana.engine.request import Request, ResolvedRequest
from sana.errors import InvalidInput, MissingDependency, ModelNotFound

RANDOM_SEEDS = 1_000_000
"""Seeds that are drawn for the user lie below this: short enough to type again."""
MOST_PICTURES = MOST_SEEDS
MOST_CELLS = 2_000
"""Pictures on the sheet of a sweep."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """Pictures that differ in nothing but the seed."""

    request: Request
    """Seed and count are those of the first picture; `seeds` has them all."""
    seeds: Sequence[int]
    files: Sequence[Path]
    """Where each picture goes."""
    settings: Settings
    point: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """What a sweep sets here, in words."""
    entry: Entry = dataclasses.field(default_factory=lambda: Entry(place="", values={}))
    """The line of a file of prompts that it comes from."""

    @property
    def shape(self) -> Shape | None:
        """The ratio of the sides, where only that was ordered."""
        shape: Shape | None = self.settings.values.get("size")
        return shape if shape is not None and shape.ratio else None

    @property
    def best_of(self) -> int | None:
        """How many candidates are drawn for the pictures that are kept; None: the pictures are all there are."""
        candidates: int | None = self.settings.values.get("best_of")
        return candidates

    @property
    def drawn(self) -> int:
        """How many pictures are drawn, kept or not."""
        return self.best_of or len(self.seeds)

    def place(self, seed: int) -> int:
        """Which of the files is for the picture of a seed; candidates are beside the first."""
        return self.seeds.index(seed) if seed in self.seeds else 0

    @property
    def given(self) -> frozenset[str]:
        """Fields of the request that somebody set."""
        return frozenset(FIELDS.get(name, name) for name in self.settings.values)

    def fitted(self, card: Card) -> Request:
        """Return the request with its size in pixels, checked against the model.

        Raises:
            InvalidInput: the model cannot do it, or an option would have no effect.
        """
        request, place = self.request, self.entry.place
        try:
            with self.settings.told():
                if self.shape is not None:
                    width, height = self.shape.pixels(card)
                    request = request.replace(width=width, height=height)
                check_effects(request.resolve(card), card, self.given)
        except InvalidInput as error:
            if not place or place in str(error):
                raise
            raise InvalidInput(f"{place}: {error}") from error
        return request


@dataclass(frozen=True, kw_only=True)
class Order:
    """A parsed command line, complete but for what only the model can tell."""

    jobs: Sequence[Job]
    machine: Machine
    writing: Files
    manner: Manner
    settings: Settings
    """What holds for all jobs."""
    axes: Sequence[Axis] = ()
    sheet: Path | None = None
    """Where the sheet of a sweep goes."""
    others: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Flags of the verb that are no settings."""

    @property
    def request(self) -> Request:
        """The first request."""
        return self.jobs[0].request

    @property
    def seeds(self) -> list[int]:
        """The seed of every picture."""
        return [seed for job in self.jobs for seed in job.seeds]

    @property
    def files(self) -> list[Path]:
        """Every file that will be written."""
        return [*(file for job in self.jobs for file in job.files), *((self.sheet,) if self.sheet else ())]

    @property
    def to_stdout(self) -> bool:
        """Whether the picture goes to the standard output."""
        return self.writing.output == STDOUT

    @property
    def drew_seed(self) -> bool:
        """Whether nobody said which seed to begin with."""
        return any(job.settings.values.get("seed") is None for job in self.jobs)

    def fitted(self, card: Card) -> list[Request]:
        """Return the requests of all jobs, checked against the model."""
        return [job.fitted(card) for job in self.jobs]


def parse(words: Sequence[str], road: Road = GENERATE, name: "Naming | None" = None) -> Order:
    """Return what the command line of a verb orders, together with files and variables.

    Args:
        name: gives the jobs their files, and seeds where they have none.

    Raises:
        InvalidInput, MissingDependency: no model could carry it out.
    """
    plain, given = arguments.read(
        words, road.groups, usage=road.usage, description=road.description, refused=road.refused
    )
    manner, known = Manner(**arguments.take(Manner, given)), keys()
    flags = {name: value for name, value in given.items() if name in known}
    base = settings.gather({**flags, **road.words(plain, flags)}, manner.config, known)
    if not {"prompt", "prompt_file"} & set(base.values):
        raise InvalidInput(road.nothing)
    with base.told():
        machine = Machine(**arguments.take(Machine, dict(base.values)))
        writing = Files(**arguments.take(Files, dict(base.values)))
        axes = read_axes(base.values.get("sweep", ()), known)
    jobs = (name or _named)(_jobs(base, axes, road), writing, base)
    others = {name: value for name, value in given.items() if name not in known}
    order = Order(jobs=jobs, machine=machine, writing=writing, manner=manner, settings=base, axes=axes, others=others)
    if order.to_stdout and len(order.files) > 1:
        raise InvalidInput(f"`output` - writes one picture, not {len(order.files)}. Name a folder instead.")
    return dataclasses.replace(order, sheet=distinct([*order.files, _sheet(order)])[-1]) if axes else order


def check_effects(settings: ResolvedRequest, card: Card, given: frozenset[str]) -> None:
    """Refuse options that were given and would change nothing.

    Raises:
        InvalidInput: naming the option.
    """
    if "guidance" in given and settings.guidance < 1 and card.product != "sprint":
        raise InvalidInput("`guidance` below 1 draws the same picture as 1, which is without guidance. Give 1 or more.")
    if "outpaint" in given and not any(settings.outpaint):
        raise InvalidInput("`outpaint` of 0 pixels on every side adds nothing. Give more, or drop it.")
    if "guidance_interval" not in given:
        return
    if card.product == "sprint":
        raise InvalidInput(f"{card.name} is a SANA-Sprint model, where `guidance_interval` has no effect. Drop it.")
    if settings.guidance <= 1:
        raise InvalidInput("`guidance_interval` has no effect with `guidance` 1 or less. Drop one of them.")


@contextlib.contextmanager
def named_as_flags(groups: Sequence[Group] = ()) -> Iterator[None]:
    """Let errors about fields of the request, or of other groups, speak of flags: `steps` becomes --steps."""
    try:
        yield
    except InvalidInput as error:
        raise InvalidInput(told_as_flags(str(error), groups)) from error


def told_as_flags(text: str, groups: Sequence[Group] = ()) -> str:
    """Return an error's text with flags in the place of fields."""
    return re.sub(r"`(\w+)`", lambda found: _as_flag(found, (*EVERYTHING, *groups)), text)


def _as_flag(found: re.Match[str], groups: Sequence[Group]) -> str:
    if found[1] == "prompt":
        return "The prompt" if found.start() == 0 else "the prompt"
    known = {f.name for group in groups for f in dataclasses.fields(group.options)}
    names = {field: name for name, field in FIELDS.items()}
    return arguments.flag_of(names.get(found[1], found[1])) if found[1] in known else found[0]


def _jobs(base: Settings, axes: Sequence[Axis], road: Road) -> list[Job]:
    """Return a job for every prompt and point of a sweep, without files; seeds that are to be drawn are missing."""
    source = base.values.get("prompt_file")
    with base.told():
        entries = read_prompts(source, picture_keys()) if source is not None else [Entry(place="", values={})]
    jobs: list[Job] = []
    pictures = 0
    for entry in entries:
        own = base.under(entry.values, entry.place) if entry.place else base
        own = _without_unused(own, entry.place, road)
        if road.needs_image and "image" not in own.values:
            raise InvalidInput(
                f"{entry.place + ': which' if entry.place else 'Which'} picture? For example: {road.usage}"
            )
        for name in (axis.field for axis in axes):
            if name in own.values and own.origins[name] in (FLAG, entry.place):
                place = arguments.flag_of(name) if own.origins[name] == FLAG else entry.place
                raise InvalidInput(f"`sweep` varies {name}, which is also set by {place}. Drop one of them.")
        for point in points(axes):
            swept = own.under({name: value for name, (value, _) in point.items()}, "--sweep")
            job = _job(swept, {name: label for name, (_, label) in point.items()}, entry)
            pictures += len(job.seeds) or job.request.count
            if pictures > (road.most or MOST_PICTURES):
                raise InvalidInput(f"These are more than {road.most or MOST_PICTURES} pictures. Order fewer at once.")
            jobs.append(job)
    return jobs


def _without_unused(own: Settings, place: str, road: Road) -> Settings:
    """Return settings without those of a file or a variable, which are for all verbs, that have no effect here."""
    elsewhere = set() if CHOOSING in road.groups else set(options_of((CHOOSING,)))
    if "image" not in own.values:
        names = set(options_of((EDIT,)))
    else:
        names = set() if {"mask", "outpaint"} & set(own.values) else {"feather"}
    unused = {name for name in names | elsewhere if own.origins.get(name, FLAG) not in (FLAG, place)}
    return Settings(
        values={name: value for name, value in own.values.items() if name not in unused}, origins=own.origins
    )


def _job(own: Settings, point: Mapping[str, str], entry: Entry) -> Job:
    values = {FIELDS.get(name, name): value for name, value in own.values.items()}
    shape, wished = values.pop("size", None), values.pop("seed", None)
    with own.told():
        picture = arguments.take(Request, values)
        if shape is not None and not shape.ratio:
            picture |= {"width": shape.width, "height": shape.height}
        _check_prompt(picture["prompt"])
        request = Request(**picture)
        _check_cleaning(request)
        _check_attached(request, entry.place)
        check_choosing(own, request, wished or ())
        many = wished is not None and len(wished) > 1
        count = 1 if many or wished is None else request.replace(seed=wished[0]).count
    seeds = wished if many else list(range(wished[0], wished[0] + count)) if wished else []
    return Job(request=request, seeds=seeds, files=(), settings=own, point=point, entry=entry)


def _named(jobs: Sequence[Job], writing: Files, base: Settings) -> list[Job]:
    """Return the jobs with their files, and one start for all seeds to be drawn that gives names not taken yet."""
    prompts = dict.fromkeys(job.request.prompt for job in jobs)
    numbers = {prompt: f"{i}" for i, prompt in enumerate(prompts, start=1)} if len(prompts) > 1 else {}
    for _ in range(100):
        start = secrets.randbelow(RANDOM_SEEDS)
        named = [_planned(job, start, writing.output, numbers.get(job.request.prompt, "")) for job in jobs]
        files = [file for job in named for file in job.files]
        free = not any(file.exists() for job in named if not job.settings.values.get("seed") for file in job.files)
        if free or writing.force or writing.skip_existing:
            break
    if len(jobs) > 1:
        rest = iter(distinct(files))
        named = [dataclasses.replace(job, files=[next(rest) for _ in job.files]) for job in named]
    return named


def _planned(job: Job, start: int, output: str | None, number: str) -> Job:
    seeds = job.seeds or list(range(start, start + job.request.count))
    values = [word for name, label in job.point.items() if name != "seed" for word in (name, label)]
    if job.best_of is not None and (output is None or is_folder(output)):
        values += [f"best of {job.best_of}"]
    prompt, name = job.request.prompt, job.entry.name
    files = plan_files(prompt, seeds, output, name=name, values=values, number=number)
    return dataclasses.replace(job, request=job.request.replace(seed=seeds[0], count=1), seeds=seeds, files=files)


def _sheet(order: Order) -> Path:
    if len(order.seeds) > MOST_CELLS:
        raise InvalidInput(f"`sweep` makes at most {MOST_CELLS} pictures, not {len(order.seeds)}. Take fewer values.")
    first = order.jobs[0]
    output = order.writing.output
    if output is not None and not is_folder(output):
        return first.files[0].with_name(f"{Path(output).stem}-sweep.png")
    source = order.settings.values.get("prompt_file")
    name = slug(Path(source).stem) if source else slug(first.request.prompt)
    return first.files[0].with_name(f"{name}-sweep-{first.seeds[0]}.png")


_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(?<!\.safetensors)")
Naming = Callable[[Sequence[Job], Files, Settings], list[Job]]


def _check_prompt(prompt: Any) -> None:
    if not prompt.strip():
        raise InvalidInput("`prompt` is empty. Say what the picture should show.")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise InvalidInput("`prompt` is not valid UTF-8. Check the encoding of the terminal.") from None


def _check_attached(request: Request, place: str) -> None:
    """Refuse adapters that are not there, and pictures that cannot be read, by their headers, before loading anything.

    Raises:
        ModelNotFound, InvalidInput: naming the file.
    """
    for lora in request.loras:
        name = str(lora.source)
        if "://" not in name and not Path(name).expanduser().exists() and not _HUB_ID.fullmatch(name):
            where = f"{place}: " if place else ""
            raise ModelNotFound(f"{where}There is no file {printable(name[:80])} for --lora. Check the name.")
    named = {"image": request.image, "mask": request.mask}
    sources = {name: source for name, source in named.items() if source is not None}
    if not sources and not request.controls:
        return
    from sana.engine.pictures import picture_size

    for name, source in (*sources.items(), *(("control image", control.image) for control in request.controls)):
        try:
            picture_size(source, name)
        except (ModelNotFound, InvalidInput) as error:
            raise type(error)(f"{place}: {error}" if place else str(error)) from error


def _check_cleaning(request: Request) -> None:
    missing = [name for name in ("bs4", "ftfy") if importlib.util.find_spec(name) is None]
    if request.clean_caption and missing:
        raise MissingDependency(
            "--clean-caption needs the packages beautifulsoup4 and ftfy. Install `sanakit[clean]`, or drop it."
        )
