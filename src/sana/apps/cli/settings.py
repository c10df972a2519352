"""Settings in layers: the user's file, `--config`, environment variables, flags; each knows where it comes from."""

import contextlib
import difflib
import math
import os
import re
import shlex
import sys
import tomllib
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sana.apps.cli.arguments import Option
from sana.apps.cli.notation import TEXTS, read_outpaint
from sana.apps.cli.output import printable
from sana.apps.cli.values import Shape
from sana.errors import InvalidInput, did_you_mean

MOST_BYTES = 1_000_000
PREFIX = "SANA_"
FLAG = "flag"
"""Origin of what the command line says."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Values by field name, as the flags' readers return them, and where each comes from."""

    values: Mapping[str, Any] = field(default_factory=dict)
    origins: Mapping[str, str] = field(default_factory=dict)

    def under(self, values: Mapping[str, Any], origins: Mapping[str, str] | str) -> "Settings":
        """Return these settings with others laid over them; what contradicts an upper one is dropped.

        Raises:
            InvalidInput: the upper ones contradict each other.
        """
        told = dict.fromkeys(values, origins) if isinstance(origins, str) else dict(origins)
        upper = Settings(values=values, origins=told)
        with upper.told():
            _check(values)
        dropped = {loser for winner, losers in _REPLACES.items() if winner in values for loser in losers}
        if "count" in values and _several(self.values.get("seed")):
            dropped.add("seed")
        if _several(values.get("seed")):
            dropped.add("count")
        kept = {name: value for name, value in self.values.items() if name not in dropped}
        both = {**{name: self.origins[name] for name in kept}, **told}
        return Settings(values={**kept, **values}, origins=both)

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Let an error about a field that no flag set say where it was set."""
        try:
            yield
        except InvalidInput as error:
            named = dict.fromkeys(re.findall(r"`(\w+)`", str(error)))
            places = {name: self.origins[name] for name in named if self.origins.get(name, FLAG) != FLAG}
            if not places or "is set by" in str(error):
                raise
            where = "; ".join(f"`{name}` is set by {place}" for name, place in places.items())
            raise InvalidInput(f"{error} ({where}.)") from error


def gather(flags: Mapping[str, Any], config: str | None, keys: Mapping[str, Option]) -> Settings:
    """Return the settings of all layers, the flags on top.

    Raises:
        InvalidInput: a file or variable cannot be read, or sets something unknown or impossible.
    """
    settings = Settings()
    for path in files(config):
        values, origins = read_toml(path, keys)
        settings = settings.under(values, origins)
    values = read_environment(os.environ, keys)
    settings = settings.under(values, {name: f"the variable {PREFIX}{name.upper()}" for name in values})
    return settings.under(flags, FLAG)


def files(config: str | None) -> list[Path]:
    """Return the configuration files that are read, the lowest first: the user's if there is one, then `config`."""
    users = [path for path in (user_file(),) if path is not None and path.is_file()]
    return users if config is None else [*users, Path(config).expanduser()]


def user_file() -> Path | None:
    """Return where the user's own configuration file is looked for; None without a home folder."""
    if sys.platform == "win32":
        base = os.environ.get("APPDATA")
    else:
        base = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return Path(base) / "sana" / "config.toml" if base and os.path.isabs(base) else None


def read_toml(path: Path, keys: Mapping[str, Option]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return what a configuration file sets, and the place of each setting.

    Raises:
        InvalidInput: naming file, line and key.
    """
    text = read_text(path, MOST_BYTES)
    try:
        content = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise InvalidInput(f"{path} is no TOML file ({error}). Mend it.") from None
    values: dict[str, Any] = {}
    origins = {name: _place(path, text, name) for name in content}
    for name, value in content.items():
        if name not in keys:
            raise InvalidInput(f"{origins[name]}: there is no setting '{name[:40]}'.{_meant(name, keys)}")
        values[name] = _told(origins[name], name, from_value, keys[name], value)
    return values, origins


def read_environment(variables: Mapping[str, str], keys: Mapping[str, Option]) -> dict[str, Any]:
    """Return what variables such as SANA_STEPS set; names that resemble no setting belong to others.

    Raises:
        InvalidInput: naming the variable.
    """
    values: dict[str, Any] = {}
    for variable, text in variables.items():
        name = variable.removeprefix(PREFIX).lower()
        if not variable.startswith(PREFIX) or not text.strip():  # an empty one is unset
            continue
        if name in keys:
            values[name] = _told(f"the variable {variable}", name, from_text, keys[name], text)
        elif close := difflib.get_close_matches(name, keys, n=1, cutoff=0.8):
            raise InvalidInput(f"The variable {variable} sets nothing. Did you mean {PREFIX}{close[0].upper()}?")
    return values


def read_text(path: Path, most: int) -> str:
    """Return the text of a file.

    Raises:
        InvalidInput: it is missing, too big or no text.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(most + 1)
    except (OSError, ValueError) as error:  # the latter for a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise InvalidInput(f"{printable(str(path))[:80]} cannot be read ({reason}). Check the name.") from None
    return decoded(data, str(path), most)


def decoded(data: bytes, name: str, most: int) -> str:
    """Return bytes as text, without a byte order mark.

    Raises:
        InvalidInput: they are too many, or no UTF-8.
    """
    if len(data) > most:
        raise InvalidInput(f"{name} is larger than {most / 1e6:g} MB. Split it.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InvalidInput(f"{name}, line {line}: this is not UTF-8 text. Save the file as UTF-8.") from None


def from_text(option: Option, text: str) -> Any:
    """Return the value that a text stands for, as a flag would read it.

    Raises:
        InvalidInput: with what follows the name of the option in the sentence.
    """
    kind = option.kind
    if kind is bool:
        if text.strip().lower() not in _TRUTH:
            raise InvalidInput(f"takes true or false, not '{text[:40]}'.")
        return _TRUTH[text.strip().lower()]
    if typing.get_origin(kind) is not tuple or _reads_whole(option):
        return option.reader(text)
    parts = text.split(";") if typing.get_args(kind)[-1] is Ellipsis else text.replace(",", " ").split()
    return _as_list(option, [option.reader(part) for part in parts])


def from_value(option: Option, value: Any) -> Any:
    """Return the value that a number, text, truth value or list of TOML or JSON stands for.

    Raises:
        InvalidInput: with what follows the name of the option in the sentence.
    """
    kind, shown = option.kind, repr(value)[:40]
    if typing.get_origin(kind) is tuple:
        return _list_from_value(option, value)
    if kind in TEXTS:
        return _from_parts(option, value)
    if kind is bool or isinstance(value, bool):
        if kind is bool and isinstance(value, bool):
            return value
        raise InvalidInput(f"takes true or false, not {shown}." if kind is bool else f"does not take {shown}.")
    numbers = isinstance(value, list) and value and all(type(v) is int for v in value)
    if kind in (list, Shape) and (isinstance(value, int | str) or numbers):
        return option.reader(",".join(map(str, value)) if isinstance(value, list) else str(value))
    if kind is str or typing.get_origin(kind) is Literal:
        if isinstance(value, str):
            return option.reader(value)
        raise InvalidInput(f"takes text in quotes, not {shown}.")
    if kind is int and isinstance(value, int):
        return value
    if kind is float and isinstance(value, int | float):
        return _float(value)
    raise InvalidInput(f"takes {_NAMES.get(kind, 'another kind of value')}, not {shown}.")


def _list_from_value(option: Option, value: Any) -> Any:
    """Return a list, or what has a notation for all its values, such as `"right=256"`, or for its only one."""
    first = Option(typing.get_args(option.kind)[0], option.reader)
    if isinstance(value, list):
        return _as_list(option, [from_value(first, item) for item in value])
    if _reads_whole(option) and isinstance(value, int | str) and not isinstance(value, bool):
        return option.reader(str(value))
    if first.kind in TEXTS:
        return [from_value(first, value)]
    raise InvalidInput(f"takes another kind of value, not {repr(value)[:40]}.")


def _from_parts(option: Option, value: Any) -> Any:
    """Return a control or an adapter from its text, from a list of its words, or from a table of its fields."""
    if isinstance(value, dict):
        try:
            return option.kind.from_dict(value)
        except InvalidInput as error:
            raise InvalidInput(f"is wrong: {str(error).replace('`', '')}") from None
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, list) or not all(type(word) in (str, int, float) for word in words):
        raise InvalidInput(f"takes text in quotes or a table, not {repr(value)[:40]}.")
    return option.reader(value if isinstance(value, str) else shlex.join(map(str, words)))


def _reads_whole(option: Option) -> bool:
    """Tell whether the reader of a list of fixed length takes all of it as one text."""
    return option.reader is read_outpaint


def _float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        raise InvalidInput("takes a number, not one as large as that.") from None


def _as_list(option: Option, values: list[Any]) -> list[Any]:
    parts = typing.get_args(option.kind)
    if parts[-1] is not Ellipsis and len(values) != len(parts):
        raise InvalidInput(f"takes {len(parts)} values, not {len(values)}.")
    return values


def to_toml(values: Mapping[str, Any]) -> str:
    """Return settings as lines of TOML that `read_toml` reads to the same values."""
    return "".join(f"{name} = {_toml(value)}\n" for name, value in values.items())


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:  # the only such value is a seed that is to be drawn
        return '"random"'
    if isinstance(value, Shape):
        return _toml(str(value))
    if type(value) in TEXTS:
        return _toml(TEXTS[type(value)](value))
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else f"{value}"
    if isinstance(value, str):
        return '"' + "".join(_ESCAPES.get(mark) or _escaped(mark) for mark in value) + '"'
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return str(value)


def _escaped(mark: str) -> str:
    return f"\\u{ord(mark):04x}" if ord(mark) < 0x20 or ord(mark) == 0x7F else mark


def _told(place: str, name: str, read: Any, option: Option, value: Any) -> Any:
    try:
        return read(option, value)
    except InvalidInput as error:
        raise InvalidInput(f"{place}: {name} {error}") from None


def _place(path: Path, text: str, name: str) -> str:
    """Return file and line of a key of the top level, for messages."""
    written = re.compile(rf"""\s*\[*\s*["']?{re.escape(name)}["']?\s*[=.\]]""")
    for number, line in enumerate(text.splitlines(), start=1):
        if written.match(line):
            return f"{path}, line {number}"
    return str(path)


def _meant(name: str, keys: Mapping[str, Option]) -> str:
    return did_you_mean(name.replace("-", "_"), keys) or " All of them: sana config"


def _several(seeds: Any) -> bool:
    return isinstance(seeds, list) and len(seeds) > 1


def _check(values: Mapping[str, Any]) -> None:
    """Refuse values that say the same thing twice.

    Raises:
        InvalidInput: naming both.
    """
    if "size" in values and {"width", "height"} & set(values):
        raise InvalidInput("`size` says the same as `width` and `height`. Give the one or the others.")
    if _several(values.get("seed")) and "count" in values:
        raise InvalidInput("Several seeds already say how many pictures to draw. Drop `count`, or give one `seed`.")
    if "prompt" in values and "prompt_file" in values:
        raise InvalidInput("There is a prompt and a `prompt_file`. Give the one or the other.")


_REPLACES = {
    "size": ("width", "height"),
    "width": ("size",),
    "height": ("size",),
    "prompt": ("prompt_file",),
    "prompt_file": ("prompt",),
}
"""A setting, and those of lower layers that say the same in another way."""
_NAMES = {int: "a whole number", float: "a number", list: "seeds such as 7 or [3, 17]", Shape: 'a size such as "16:9"'}
_TRUTH = dict.fromkeys(("true", "1", "yes", "on"), True) | dict.fromkeys(("false", "0", "no", "off"), False)
_ESCAPES = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
