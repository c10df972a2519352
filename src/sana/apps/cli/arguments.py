"""Flags from dataclasses: names, types and help come from the fields and the sentences under them."""

import argparse
import ast
import dataclasses
import functools
import inspect
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from sana.errors import InvalidInput, did_you_mean


@dataclass(frozen=True, kw_only=True)
class Spelling:
    """How a field is written on the command line where its name and type do not say it."""

    short: str | None = None
    """One-letter flag."""
    also: tuple[str, ...] = ()
    """Other spellings that are understood."""
    value: str | None = None
    """What stands for the value in the help."""
    read: Callable[[str], Any] | None = None
    """Makes the value of the text, or raises InvalidInput with the second half of a sentence that the flag begins."""
    hint: str | None = None
    """Help instead of the sentence under the field."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """A dataclass whose fields are flags, and the title they stand under in the help."""

    title: str
    options: type[Any]
    spellings: Mapping[str, Spelling] = field(default_factory=dict)
    """By field name; for fields that carry no `Annotated` spelling of their own."""
    leave_out: frozenset[str] = frozenset()
    """Fields that are no flags."""


@dataclass(frozen=True, kw_only=True)
class Common:
    """What every verb understands."""

    json: bool = False
    """Print one JSON document instead of plain lines."""
    quiet: Annotated[bool, Spelling(short="-q")] = False
    """Say nothing but results and errors."""
    verbose: Annotated[bool, Spelling(short="-v")] = False
    """Say more, and show the traceback of an error."""


COMMON = Group(title="in general", options=Common)


@functools.cache
def field_help(options: type[Any]) -> dict[str, str]:
    """Return field name -> the sentence under it, of a dataclass and its bases; empty where the source is not there."""
    sentences: dict[str, str] = {}
    for owner in reversed([cls for cls in options.__mro__ if dataclasses.is_dataclass(cls)]):
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
        except (OSError, TypeError):
            continue
        statements = body.body if isinstance(body, ast.ClassDef) else []
        for named, after in zip(statements, statements[1:], strict=False):
            if isinstance(named, ast.AnnAssign) and isinstance(named.target, ast.Name) and isinstance(after, ast.Expr):
                sentences[named.target.id] = " ".join(str(ast.literal_eval(after.value)).split())
    return sentences


def read(
    words: Sequence[str],
    groups: Sequence[Group],
    *,
    usage: str,
    description: str,
    refused: Mapping[str, str] | None = None,
) -> tuple[list[str], dict[str, Any]]:
    """Return what is not a flag, and field name -> value of the flags that were given.

    Args:
        words: the command line behind the verb; everything after `--` is no flag.
        refused: flags with the sentence that refuses them.

    Raises:
        InvalidInput: a flag is unknown, lacks its value or has an impossible one.
        SystemExit: the help was asked for and printed.
    """
    parser = argparse.ArgumentParser(
        usage=usage,
        description=description,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        exit_on_error=False,
        add_help=False,
        formatter_class=_HelpFormatter,
    )
    for group in groups:
        _add_group(parser, group)
    parser.add_argument_group(groups[-1].title if not groups else COMMON.title)
    cut = words.index("--") if "--" in words else len(words)
    try:
        given, rest = parser.parse_known_args(list(words[:cut]))
    except argparse.ArgumentError as error:
        raise InvalidInput(_sentence(error)) from None
    plain = [word for word in rest if not _is_flag(word)]
    if unknown := [word for word in rest if _is_flag(word)]:
        raise InvalidInput(_unknown(unknown[0].partition("=")[0], groups, refused or {}))
    return [*plain, *words[cut + 1 :]], vars(given)
