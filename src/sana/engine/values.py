"""Checks of single values that people hand over; each error names the field and shows the value shortly. Torch-free."""

import reprlib

from sana.errors import InvalidInput

MAX_CHARACTERS = 100_000
"""Longest prompt; the text encoder could not read more than about half of it."""
MAX_PATH = 4096
"""Longest path in characters."""


class _Short(reprlib.Repr):
    """Shows any value in at most about a line, also numbers whose digits Python refuses to print."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 60
        self.maxlevel = 2
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = self.maxfrozenset = self.maxdeque = 3

    def repr_int(self, x: int, level: int) -> str:
        """Show a whole number, or only its size."""
        return repr(x) if x.bit_length() <= 100 else f"a number of about {round(x.bit_length() * 0.30103)} digits"


def shown(value: object) -> str:
    """Return a wrong value for an error text: short, whatever it is."""
    return " ".join(_SHORT.repr(value).split())[:120]


_SHORT = _Short()


def check_text(name: str, value: object, longest: int = MAX_CHARACTERS) -> None:
    """Raise InvalidInput unless the value is text that any file and any screen can hold."""
    if not isinstance(value, str):
        raise InvalidInput(f"`{name}` must be text but is {type(value).__name__}.")
    if len(value) > longest:
        raise InvalidInput(f"`{name}` has {len(value)} characters, the most are {longest}. Shorten it.")
    if "\x00" in value:
        raise InvalidInput(f"`{name}` contains a NUL character. Remove it.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidInput(
            f"`{name}` is not valid Unicode: character {error.start + 1} is half of a surrogate pair. Remove it, or"
            " check the encoding that it comes in."
        ) from None


def check_integer(name: str, value: object, low: int, high: int) -> None:
    """Raise InvalidInput unless the value is a whole number of the range, both ends included."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidInput(f"`{name}` must be a whole number from {low} to {high} but is {shown(value)}.")


def check_number(name: str, value: object, low: float, high: float) -> None:
    """Raise InvalidInput unless the value is a number of the range, both ends included."""
    # No number is between NaN and anything; whole numbers of any length can be compared.
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidInput(f"`{name}` must be a number from {low:g} to {high:g} but is {shown(value)}.")


def check_interval(name: str, what: str, value: object) -> None:
    """Raise InvalidInput unless the value is two numbers from 0 to 1 that rise; `what` says what they are."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise InvalidInput(f"`{name}` must be {what} but is {shown(value)}.")
    for end in value:
        check_number(name, end, 0.0, 1.0)
    if value[0] >= value[1]:
        raise InvalidInput(f"`{name}` must rise from lowest to highest but is {shown(value)}. Swap its values.")
