"""From a picture file to what it says about itself: the AI label, our own record, or the settings of other programs."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sana.engine.metadata.containers import MAX_TEXT, XMP_KEY, Carried, clean, read_container
from sana.engine.metadata.dialects import read_settings
from sana.engine.metadata.record import RECORD_KEY, RECORD_VERSION
from sana.engine.metadata.settings import Settings, parse_json, parse_object
from sana.engine.request import Request
from sana.errors import InvalidInput

SIDECAR = ".metadata.json"
"""End of the name of the file that mflux writes beside a picture."""


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """What `read_metadata` found in a picture."""

    record: Mapping[str, Any] | None = None
    """Our own JSON record, or None."""

    parameters: str | None = None
    """The text line of AUTOMATIC1111's form, whoever wrote it, or None."""

    generated: bool = False
    """Whether the file is labelled as made by a trained model."""

    settings: Settings | None = None
    """What another program says, or a picture of ours whose record is gone; None where our record is."""

    remarks: tuple[str, ...] = field(default=())
    """What was left unread, and why."""

    def request(self) -> Request:
        """Return the request of this picture; the same model, dtypes and device draw the same, but for rounding.

        Raises:
            InvalidInput: the file has no record of ours, or one of a newer version.
        """
        if self.record is None:
            raise InvalidInput("The picture carries no sanakit record, so it cannot be repeated. Give the settings.")
        version = self.record.get("version")
        if version != RECORD_VERSION:
            known = f"this program reads {RECORD_VERSION}"
            raise InvalidInput(f"The picture's record has version {version!r}; {known}. Update sanakit.")
        request = self.record.get("request")
        if not isinstance(request, Mapping):
            raise InvalidInput("The picture's record has no request, so it cannot be repeated. Give the settings.")
        return Request.from_dict({**request, "seed": self.record.get("seed"), "count": 1})

    @property
    def model(self) -> dict[str, str]:
        """What the record says about the model and the machine; empty without one."""
        facts = (self.record or {}).get("model")
        return {name: str(value) for name, value in facts.items()} if isinstance(facts, Mapping) else {}


def read_metadata(path: str | Path) -> Metadata:
    """Read what a PNG, JPEG or WebP file says about itself, or mflux's JSON file; no pixel is decoded.

    Raises:
        InvalidInput: the file is missing, is no picture, or our record in it is damaged.
    """
    place = Path(path)
    carried = _sidecar(place) if place.name.endswith(SIDECAR) else read_container(place)
    record = _record(carried, path)
    settings = None if record is not None else read_settings(carried)
    if record is None and settings is None and not place.name.endswith(SIDECAR):
        beside = place.with_suffix(SIDECAR)
        settings = read_settings(_sidecar(beside)) if os.path.isfile(beside) else None
    return Metadata(
        record=record,
        parameters=carried.texts.get("parameters"),
        generated=_GENERATED.search(carried.texts.get(XMP_KEY, "")) is not None,
        settings=settings,
        remarks=tuple(dict.fromkeys(carried.remarks)),
    )


def _sidecar(path: Path) -> Carried:
    if not os.path.isfile(path):
        raise InvalidInput(f"There is no file {path}. Check the name.")
    with path.open("rb") as file:
        text = file.read(MAX_TEXT).decode("utf-8", "replace")
    return Carried(texts={"Comment": clean(text)})


def _record(carried: Carried, path: str | Path) -> dict[str, Any] | None:
    """Return our record: under its key in PNG, or under the same name in the JSON of a user comment."""
    if RECORD_KEY in carried.texts:
        record = parse_json(carried.texts[RECORD_KEY])
        if not isinstance(record, dict):
            raise InvalidInput(f"The sanakit record in {path} is damaged (no JSON object); the picture may be fine.")
        return record
    inside = (parse_object(carried.comment) or {}).get(RECORD_KEY)
    return inside if isinstance(inside, dict) else None


_GENERATED = re.compile(r"digitalsourcetype/(trained|compositeWithTrained)AlgorithmicMedia")
