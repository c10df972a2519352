"""References to one file of a hub repository: `hf://organisation/repository/path` and the web addresses of files."""

import re
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from sana.cards import CARDS, Card
from sana.errors import InvalidInput

_SCHEME = "hf://"
_WORD = r"[A-Za-z0-9][\w.-]*"
_REFERENCE = re.compile(rf"({_WORD}/{_WORD})(?:@([\w.-]+))?/(.+)")
_ADDRESS = re.compile(rf"/({_WORD}/{_WORD})/(?:blob|resolve)/([^/]+)/(.+)")
_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")


@dataclass(frozen=True, kw_only=True)
class Reference:
    """One file of a repository."""

    repo: str
    file: str
    revision: str | None = None

    @property
    def name(self) -> str:
        """The reference without its revision, as cards have it."""
        return f"{_SCHEME}{self.repo}/{self.file}"


def is_reference(name: str) -> bool:
    """Tell whether a name is meant as a reference, right or wrong."""
    return name.startswith((_SCHEME, "https://", "http://"))


def parse_reference(name: str) -> Reference:
    """Read `hf://organisation/repository[@revision]/path`, or the address of a file on the hub's web site.

    Errors: InvalidInput for another site, a path that leads elsewhere, or no file at all.
    """
    if name.startswith(_SCHEME):
        match = _REFERENCE.fullmatch(name.removeprefix(_SCHEME))
        found = (match[1], match[2], match[3]) if match else None
    else:
        match = _ADDRESS.fullmatch(_path_on_the_hub(name))
        found = (match[1], None if match[2] == "main" else match[2], match[3]) if match else None
    if found is None or any(part in ("", ".", "..") for part in found[2].split("/")) or "\\" in found[2]:
        text = f"'{name[:120]}' is no reference to a file on the hub"
        raise InvalidInput(
            f"{text}; write hf://organisation/repository/path/file.pth, or a https://huggingface.co one."
        )
    return Reference(repo=found[0], revision=found[1], file=found[2])


def card_of_file(name: str) -> Card | None:
    """Return the card whose original file has this name, or None; folders before the name may decide."""
    short = name.removeprefix("hf://")
    cards = [card for card in CARDS.values() if card.original]
    exact = next((card for card in cards if str(card.original).removeprefix("hf://") == short), None)
    stem = _stem(short)
    return exact or next((card for card in cards if _stem(str(card.original)) == stem), None)


def _path_on_the_hub(address: str) -> str:
    try:
        parts = urlsplit(address)
    except ValueError:
        return ""
    return unquote(parts.path) if parts.hostname in _HOSTS else ""


def _stem(name: str) -> str:
    return name.rpartition("/")[2].rpartition(".")[0].lower()
