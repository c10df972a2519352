"""Flags from dataclasses: names, types, choices and help come from the fields and the sentences under them."""

import argparse
import ast
import dataclasses
import functools
import inspect
import itertools
import re
import shutil
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple

from sana.apps.cli.joined import Words, join
from sana.errors import InvalidInput, did_you_mean

LONGEST_CHOICE = 44
"""Letters of choices that stand behind a flag in the help; more of them go into its sentence."""


@dataclass(frozen=True, kw_only=True)
class Spelling:
    """How a field is written on the command line, where its name and type do not say it."""

    short: str | None = None
    """One-letter flag."""
    also: tuple[str, ...] = ()
    """Other spellings that are understood."""
    value: str | None = None
    """What stands for the value in the help."""
    read: Callable[[str], Any] | None = None
    """Makes the value from the text, or raises InvalidInput with what follows the flag's name in the sentence."""
    hint: str | None = None
    """Help instead of the sentence under the field."""
    name: str | None = None
    """What the flag, and the key in a file of settings, is called instead of the field."""
    words: Words | None = None
    """Where not exactly one word follows the flag; `read` gets them joined."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """A dataclass whose fields are flags, and the title they stand under in the help."""

    title: str
    options: type[Any]
    spellings: Mapping[str, Spelling] = field(default_factory=dict)
    """By field name, for a dataclass that does not annotate its fields with them."""
    leave_out: frozenset[str] = frozenset()
    """Fields that are no flags."""
    defaults: bool = True
    """Whether the help shows them; not where something else, such as the record in a file, goes before them."""


@dataclass(frozen=True, kw_only=True)
class Common:
    """What every verb understands."""

    json: bool = False
    """Print one JSON document on stdout instead of lines."""
    events: bool = False
    """Print what happens on stdout as it happens, one JSON object a line."""
    thumbnail: bool | None = None
    """Show pictures small in the terminal; left out, where it can."""
    quiet: Annotated[bool, Spelling(short="-q")] = False
    """Say nothing but results and errors."""
    verbose: Annotated[bool, Spelling(short="-v")] = False
    """Say more, and show the traceback of an error."""


def read(
    words: Sequence[str],
    groups: Sequence[Group],
    *,
    usage: str,
    description: str,
    refused: Mapping[str, str] | None = None,
) -> tuple[list[str], dict[str, Any]]:
    """Return the words that are no flags, and field name -> value for the flags that were given.

    Args:
        words: the command line behind the verb; after `--` nothing is a flag.
        refused: flags that do not exist here, with the sentence that says why.

    Raises:
        InvalidInput: a flag is unknown, lacks its value or has an impossible one.
        SystemExit: the help was asked for, and printed.
    """
    cut = words.index("--") if "--" in words else len(words)
    takers = {name: found for group in groups for name, found in _takers(group)}
    wants_help = bool({"-h", "--help"} & set(words[:cut]))  # only then is it worth reading the sentences
    parser = _parser((*groups, COMMON), usage, description, _sentences if wants_help else lambda _: {})
    try:
        given, rest = parser.parse_known_args(join([_hyphened(word) for word in words[:cut]], takers))
    except argparse.ArgumentError as error:
        flag = str(error.argument_name).split("/")[-1]
        raise InvalidInput(f"{flag} {_LACKS.get(error.message, error.message)}") from None
    for word in rest:
        if _is_flag(word):
            raise InvalidInput(_refusal(word.partition("=")[0], groups, refused or {}))
    if vars(given).get("json") and vars(given).get("events"):
        raise InvalidInput("--json prints one document at the end, --events lines on the way. Give one of them.")
    return [*rest, *words[cut + 1 :]], vars(given)


class Option(NamedTuple):
    """A field that is a flag: its type, what makes its value, or one of its values, from text, and its default."""

    kind: Any
    reader: Callable[[str], Any]
    default: Any = None


def options_of(groups: Sequence[Group]) -> dict[str, Option]:
    """Return field name -> option for all the flags of the groups."""
    options: dict[str, Option] = {}
    for group in groups:
        for one, kind, spelling in _flags(group):
            options[name_of(one, spelling)] = Option(kind, spelling.read or _value(kind)[1], one.default)
    return options


class Flag(NamedTuple):
    """How a flag is written, for a shell that completes it."""

    names: tuple[str, ...]
    """Every spelling, the longest last."""
    summary: str
    takes_value: bool
    choices: tuple[str, ...]
    takes_file: bool


def flags_of(groups: Sequence[Group]) -> list[Flag]:
    """Return all the flags of the groups, and --help."""
    flags = []
    for group in groups:
        sentences = _sentences(group.options)
        for one, kind, spelling in _flags(group):
            shown = spelling.value or (_value(kind)[0] if kind is not bool else "")
            plain = re.sub(r"\[.*?\]", "", shown if isinstance(shown, str) else shown[0])
            name = name_of(one, spelling)
            names = [*([spelling.short] if spelling.short else []), *spelling.also, flag_of(name)]
            if kind is bool and one.default is not False:
                names.insert(0, flag_of(f"no_{name}"))
            flags.append(
                Flag(
                    names=tuple(names),
                    summary=(spelling.hint or sentences.get(one.name, "")).partition(";")[0].rstrip("."),
                    takes_value=kind is not bool and (spelling.words is None or spelling.words.needed > 0),
                    choices=_choices(plain, spelling),
                    takes_file=plain.startswith(("PATH", "FILE", "FOLDER", "MODEL")) or "." in plain,
                )
            )
    return [*flags, Flag(("-h", "--help"), "Show this help", False, (), False)]


def _choices(shown: str, spelling: Spelling) -> tuple[str, ...]:
    """Return what a value, or the first word of several, can be, where the help says all of it."""
    if spelling.words is not None:
        return spelling.words.choices
    return tuple(shown.split("|")) if "|" in shown and shown == shown.lower() else ()


def flag_of(name: str) -> str:
    """Return the flag of a field."""
    return "--" + name.replace("_", "-")


def name_of(one: "dataclasses.Field[Any]", spelling: Spelling) -> str:
    """Return what a field is called among the flags and in files of settings."""
    return spelling.name or one.name


def take(cls: type[Any], given: dict[str, Any]) -> dict[str, Any]:
    """Take the values of a dataclass's fields out of `given`."""
    return {f.name: given.pop(f.name) for f in dataclasses.fields(cls) if f.name in given}


def _sentences(options: type[Any]) -> dict[str, str]:
    """Return field name -> the sentence under it, bases included; empty where the source is not installed."""
    sentences: dict[str, str] = {}
    for cls in reversed([cls for cls in options.__mro__ if dataclasses.is_dataclass(cls)]):
        for named, after in itertools.pairwise(_bodies(cls.__module__).get(cls.__name__, [])):
            if isinstance(named, ast.AnnAssign) and isinstance(named.target, ast.Name) and isinstance(after, ast.Expr):
                sentences[named.target.id] = " ".join(str(ast.literal_eval(after.value)).split())
    return sentences


@functools.cache
def _bodies(module: str) -> dict[str, list[ast.stmt]]:
    """Return the bodies of a module's classes by name; none where its source is not installed.

    `inspect` would find and split the lines of each class anew, which is most of the time that a help takes.
    """
    try:
        whole = ast.parse(inspect.getsource(sys.modules[module]))
    except OSError:
        return {}
    return {part.name: part.body for part in whole.body if isinstance(part, ast.ClassDef)}


def _is_flag(word: str) -> bool:
    return len(word) > 1 and word.startswith("-") and not any(mark in word for mark in " \n")


def _hyphened(word: str) -> str:
    """Let `--num_inference_steps` be the same as `--num-inference-steps`."""
    name, mark, value = word.partition("=")
    return name.replace("_", "-") + mark + value if _is_flag(name) and name.startswith("--") else word


def _refusal(flag: str, groups: Sequence[Group], refused: Mapping[str, str]) -> str:
    if flag in refused:
        return refused[flag]
    known = [flag_of(name_of(one, spelling)) for g in (*groups, COMMON) for one, _, spelling in _flags(g)]
    hint = did_you_mean(flag[:80], known) or " All of them: --help."
    return f"There is no option {flag[:80]}.{hint}"


def _parser(
    groups: Sequence[Group], usage: str, description: str, sentences_of: Callable[[type[Any]], dict[str, str]]
) -> argparse.ArgumentParser:
    width = min(shutil.get_terminal_size().columns, 100) - 2
    parser = argparse.ArgumentParser(
        usage=usage,
        description=_filled(description, width),
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=26, width=width),
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        exit_on_error=False,
        add_help=False,
    )
    sections = {title: parser.add_argument_group(title) for title in dict.fromkeys(group.title for group in groups)}
    for group in groups:
        sentences = sentences_of(group.options)
        for one, kind, spelling in _flags(group):
            shown = _default(one.default) if group.defaults else ""
            _add(sections[group.title], one, kind, spelling, sentences.get(one.name, ""), shown)
    sections[COMMON.title].add_argument("-h", "--help", action="help", help="Show this help.")
    return parser


def _filled(text: str, width: int) -> str:
    """Return text with its paragraphs set anew, but for those with indented lines: these are tables and examples."""
    paragraphs = text.split("\n\n")
    width = max(width, 20)
    return "\n\n".join(part if "\n " in f"\n{part}" else textwrap.fill(part, width) for part in paragraphs)


def _flags(group: Group) -> Iterator[tuple["dataclasses.Field[Any]", Any, Spelling]]:
    """Yield each field of a group that is a flag, with its type and its spelling."""
    hints = typing.get_type_hints(group.options, include_extras=True)
    for one in dataclasses.fields(group.options):
        if one.name not in group.leave_out:
            hint = hints[one.name]
            annotated = [part for part in getattr(hint, "__metadata__", ()) if isinstance(part, Spelling)]
            spelling = group.spellings.get(one.name) or next(iter(annotated), Spelling())
            yield one, _plain_type(hint), spelling


def _takers(group: Group) -> Iterator[tuple[str, Words]]:
    """Yield every spelling of the flags behind which not exactly one word stands."""
    for one, _, spelling in _flags(group):
        if spelling.words is not None:
            for name in (flag_of(name_of(one, spelling)), *spelling.also):
                yield name, spelling.words


def _plain_type(hint: Any) -> Any:
    """Return a type without its annotations and without the None of an optional field."""
    while typing.get_origin(hint) is Annotated:
        hint = typing.get_args(hint)[0]
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return next(_plain_type(part) for part in typing.get_args(hint) if part is not type(None))
    return hint


def _add(
    section: Any, one: "dataclasses.Field[Any]", kind: Any, spelling: Spelling, sentence: str, default: str
) -> None:
    """Add the flag of one field, and its other spellings unseen."""
    name = name_of(one, spelling)
    flags = [spelling.short, flag_of(name)] if spelling.short else [flag_of(name)]
    settings: dict[str, Any] = {"dest": name}
    if kind is bool:
        settings["action"] = argparse.BooleanOptionalAction if one.default is not False else "store_true"
    else:
        shown, reader, count = _value(kind)
        count = None if spelling.read is not None else count
        if isinstance(shown, str) and len(shown) > LONGEST_CHOICE:
            sentence, shown = f"{sentence} One of {shown.replace('|', ', ')}.", "NAME"
        settings |= {"type": _converter(spelling.read or reader), "metavar": spelling.value or shown, "nargs": count}
        if _is_list(kind):  # given once for each value
            settings["action"] = "append"
    text = (spelling.hint or sentence) + default
    if spelling.also:
        text += f" Also {', '.join(spelling.also)}."
    section.add_argument(*flags, help=text.replace("%", "%%"), **settings)
    if spelling.also:
        section.add_argument(*spelling.also, help=argparse.SUPPRESS, **settings)
    if settings.get("action") == "store_true":  # undoes what a configuration file says
        section.add_argument(flag_of(f"no_{name}"), dest=name, action="store_false", help=argparse.SUPPRESS)


def _default(value: object) -> str:
    if value is None or value in ("", (), 0, (0, 0, 0, 0)) or value is dataclasses.MISSING:  # off, or none
        return ""
    shown = "on" if value is True else " ".join(f"{v:g}" for v in value) if isinstance(value, tuple) else str(value)
    return f" (default: {shown})"


def _value(kind: Any) -> tuple[Any, Callable[[str], Any], int | None]:
    """Return the stand-in, the reader and the number of values of a type."""
    if typing.get_origin(kind) is Literal:
        choices = tuple(str(choice) for choice in typing.get_args(kind))
        return "|".join(choices), functools.partial(_choice, choices), None
    if typing.get_origin(kind) is tuple:
        parts = typing.get_args(kind)
        name, reader, _ = _value(parts[0])
        return (name, reader, None) if _is_list(kind) else ((name,) * len(parts), reader, len(parts))
    name, reader = _READERS.get(kind, _READERS[str])
    return name, reader, None


def _is_list(kind: Any) -> bool:
    return typing.get_origin(kind) is tuple and typing.get_args(kind)[-1] is Ellipsis


def _converter(reader: Callable[[str], Any]) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        try:
            return reader(text)
        except InvalidInput as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def _choice(choices: tuple[str, ...], text: str) -> str:
    if text not in choices:
        meant = did_you_mean(_SYNONYMS.get(text.lower(), text), choices)
        raise InvalidInput(f"must be one of {', '.join(choices)}, not '{text[:40]}'.{meant}")
    return text


def _whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise InvalidInput(f"takes a whole number, not '{text[:40]}'.") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InvalidInput(f"takes a number, not '{text[:40]}'.") from None


_SYNONYMS = {"fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32"}
"""What other programs call a choice, for the suggestion only."""
COMMON = Group(title="everywhere", options=Common)
_LACKS = {"expected one argument": "needs a value.", "expected 2 arguments": "needs two values."}
_READERS: dict[Any, tuple[str, Callable[[str], Any]]] = {
    int: ("N", _whole_number),
    float: ("X", _number),
    str: ("TEXT", str),
}
