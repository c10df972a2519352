"""`sana models`: the table of known models, or everything about one; fetching, checking, removing, resizing it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from sana.apps.cli import arguments, cache
from sana.apps.cli.arguments import Group, Spelling, flag_of
from sana.apps.cli.known import TASKS, no_model
from sana.apps.cli.model_pages import facts, folder_facts, folder_page, page, table
from sana.apps.cli.output import Terminal
from sana.cards import CARDS
from sana.checkpoints import library
from sana.errors import InvalidInput, ModelNotFound, did_you_mean

USAGE = "sana models [[info|pull|verify|rm] NAME | grow|prune NAME OUT] [options]"
DESCRIPTION = """\
List the models that -m knows by name, or do something with one of them. NAME may also
be a hub id such as organisation/model, or a folder.

  sana models                       the table; it marks what is here
  sana models info sana-0.6b-512    parts, sizes, terms, limits
  sana models pull sana-0.6b-512    fetch it; size, licence, room are told first
  sana models verify sana-0.6b-512  check its files, and what it draws
  sana models rm sana-0.6b-512      remove it, and say what that frees
  sana models grow nano deep --layers 12    a deeper one that draws the same
  sana models prune deep thin --layers 8    without the blocks that do least

A download that was stopped goes on where it was. Only the files that are needed are
fetched, and each is held against its digest. `info`, `verify` and `rm` need no network."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The flags of the verb."""

    revision: Annotated[str | None, Spelling(value="NAME")] = None
    """Branch, tag or commit to pull or verify; left out, main."""
    variant: Annotated[str | None, Spelling(value="NAME")] = None
    """Precision of the files to pull, such as fp16; left out, what the model's card recommends."""
    yes: Annotated[bool, Spelling(short="-y")] = False
    """Remove without asking; where there is no terminal, nothing is asked anyway."""
    layers: Annotated[int | None, Spelling(value="N")] = None
    """Blocks of the new model (grow, prune)."""
    strategy: Literal["constant", "random", "cyclic", "block_expand", "progressive", "interpolation"] = "constant"
    """What new blocks are: the identity, drawn anew, copies in turn or in place, noisy or blended copies (grow)."""
    keep: Annotated[int | None, Spelling(value="N")] = None
    """First blocks that stay; left out, all. SANA-1.5 dropped the last two of 20 (grow; constant and random)."""
    gate: bool = True
    """Let copies begin as the identity (grow; cyclic and block_expand)."""
    add_qk_norm: bool = False
    """Give queries and keys the norms that depth needs; the model must then be trained before it draws well (grow)."""
    seed: int = 0
    """Start of the random numbers of new blocks (grow)."""
    prompts: Annotated[str | None, Spelling(value="FILE")] = None
    """Prompts to rank the blocks with, about 100, read as `sana batch` does (prune); built-in models have their own."""
    steps: int | None = None
    """Denoising steps to rank them over; left out, what the model's card recommends (prune)."""
    force: bool = False
    """Write over what is there (grow, prune)."""


def run(words: Sequence[str], terminal: Terminal) -> int:
    """Carry out the task, or print the table, or the page of the model that is named."""
    plain, given = arguments.read(words, GROUPS, usage=USAGE, description=DESCRIPTION)
    options = Options(**arguments.take(Options, given))
    task, names = (plain[0], plain[1:]) if plain and plain[0] in TASKS else ("", plain)
    _check(task, names, options)
    if task in ("", "info"):
        return _tell(names, terminal)
    if task in RESIZING:
        terminal.document({**_resize(task, names, options, terminal), "warnings": terminal.warnings})
        return 0
    from sana.apps.cli import model_tasks

    if task == "pull":
        report = model_tasks.pull(names[0], options.revision, options.variant, terminal)
    elif task == "verify":
        report = model_tasks.verify(names[0], options.revision, terminal)
    else:
        report = model_tasks.remove(names[0], options.yes, terminal)
    terminal.document({**report, "warnings": terminal.warnings})
    return 0


def _check(task: str, names: Sequence[str], options: Options) -> None:
    """Refuse what does not fit together.

    Raises:
        InvalidInput: naming it.
    """
    if task in RESIZING:
        if len(names) != 2 or options.layers is None:
            raise InvalidInput(f"Give a model, a target and a depth: sana models {task} NAME OUT --layers N")
    elif len(names) > 1:
        hint = did_you_mean(names[0][:20], TASKS) if not task and names[0] not in CARDS else ""
        raise InvalidInput(f"`sana models` is about one model at a time; name one, or none for the table.{hint}")
    if task and not names:
        raise InvalidInput(f"Which model? For example: sana models {task} sana-0.6b-512")
    for name, tasks in _BELONGS.items():
        if getattr(options, name) != getattr(Options, name) and task not in tasks:
            raise InvalidInput(f"{flag_of(name)} belongs to `sana models {tasks[0]}`. Drop it.")


def _resize(task: str, names: Sequence[str], options: Options, terminal: Terminal) -> dict[str, Any]:
    from sana.apps.cli import depth_tasks

    assert options.layers is not None
    model, target = names
    if task == "prune":
        wanted = (options.layers, options.prompts, options.steps)
        return depth_tasks.prune(model, target, *wanted, options.force, terminal)
    settings = {name: getattr(options, name) for name in ("layers", "strategy", "keep", "gate", "add_qk_norm", "seed")}
    return depth_tasks.grow(model, target, settings, options.force, terminal)


def _tell(names: Sequence[str], terminal: Terminal) -> int:
    if not names:
        terminal.document({"models": [facts(card) for card in CARDS.values()]})
        terminal.result(table(list(CARDS.values())))
        return 0
    (name,) = names
    card = CARDS.get(name)
    if card is not None:
        terminal.document({"models": [facts(card)]})
        terminal.result(page(card))
        return 0
    found = _folder_or_repository(name)
    terminal.document({"models": [found]})
    terminal.result(folder_page(found))
    return 0


def _folder_or_repository(name: str) -> dict[str, Any]:
    """Return the facts about a folder, or about what of a repository is in the cache.

    Raises:
        ModelNotFound: it is neither.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return folder_facts(name, path)
    if "/" not in name:
        raise no_model(name)
    held = library.find(library.hub_id(name), cache.folder())
    commits = held.commits if held is not None else {}
    if held is None or not commits:
        raise ModelNotFound(f"Nothing of {name} is on this computer. To fetch it: sana models pull {name}")
    commit = next((commit for commit, names in commits.items() if "main" in names), next(iter(commits)))
    return {**folder_facts(name, held.folder / "snapshots" / commit), "commit": commit}


GROUPS = (Group(title="what the tasks are told", options=Options),)
RESIZING = ("grow", "prune")
_BELONGS = {
    "revision": ("pull", "verify"),
    "variant": ("pull",),
    "yes": ("rm",),
    **dict.fromkeys(("layers", "force"), RESIZING),
    **dict.fromkeys(("strategy", "keep", "gate", "add_qk_norm", "seed"), ("grow",)),
    **dict.fromkeys(("prompts", "steps"), ("prune",)),
}
"""Option -> what it is for."""
