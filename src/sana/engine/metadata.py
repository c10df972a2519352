"""What a picture file says about itself, written into PNG text chunks and read back without torch.

Three records, in the order of the level that writes them: the label that the picture was generated (IPTC digital source
type, in XMP), our own JSON with the exact request, and the text line that AUTOMATIC1111 made common and viewers show.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from sana.engine.request import Request, Result
from sana.errors import InvalidInput

Level = Literal["full", "label", "none"]
LEVELS: tuple[Level, ...] = ("full", "label", "none")

RECORD_KEY = "sanakit"
RECORD_VERSION = 1
XMP_KEY = "XML:com.adobe.xmp"
SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
XMP_PACKET = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"'
    f' Iptc4xmpExt:DigitalSourceType="{SOURCE_TYPE}"/>'
    '</rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
)


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """What `read_metadata` found in a picture."""

    record: Mapping[str, Any] | None = None
    """Our own JSON record, or None."""

    parameters: str | None = None
    """The text line of AUTOMATIC1111's form, whoever wrote it, or None."""

    generated: bool = False
    """Whether the file is labelled as made by a trained model."""

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


def record_of(result: Result, index: int) -> dict[str, Any]:
    """Return the JSON record of one picture of a result: format version, resolved request, its own seed, the model."""
    return {
        "version": RECORD_VERSION,
        "request": result.settings.to_dict(),
        "seed": result.seeds[index],
        "model": dict(result.model),
    }


def parameters_of(result: Result, index: int) -> str:
    """Return the text line that AUTOMATIC1111 writes: prompt, negative prompt, then `Name: value` pairs."""
    settings, image = result.settings, result.images[index]
    pairs = {
        "Steps": settings.steps,
        "Sampler": settings.sampler,
        "CFG scale": f"{settings.guidance:g}",
        "Seed": result.seeds[index],
        "Size": f"{image.width}x{image.height}",
        "Model": result.model.get("name", ""),
        "Version": f"sanakit {result.model.get('sanakit', '')}".strip(),
    }
    lines = [settings.prompt]
    if settings.negative_prompt:
        lines.append(f"Negative prompt: {settings.negative_prompt}")
    lines.append(", ".join(f"{name}: {_quoted(str(value))}" for name, value in pairs.items() if value != ""))
    return "\n".join(lines)


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if any(mark in value for mark in ",:\n") else value


def png_info(result: Result, index: int, level: Level = "full") -> PngInfo:
    """Return the text chunks of one picture.

    Raises:
        InvalidInput: `level` is not one of `LEVELS`.
    """
    if level not in LEVELS:
        raise InvalidInput(f"`metadata` must be one of {', '.join(LEVELS)} but is {level!r}.")
    info = PngInfo()
    if level == "none":
        return info
    if level == "full":
        info.add_text("parameters", parameters_of(result, index))
        info.add_itxt(RECORD_KEY, json.dumps(record_of(result, index), ensure_ascii=False))
    info.add_itxt(XMP_KEY, XMP_PACKET)
    return info


def read_metadata(path: str | Path) -> Metadata:
    """Read the records of a picture file; a file without any gives an empty `Metadata`.

    Raises:
        InvalidInput: the file is missing, is no picture, or its record is damaged.
    """
    try:
        with Image.open(path) as image:
            texts = {str(key): str(value) for key, value in getattr(image, "text", {}).items()}
    except FileNotFoundError:
        raise InvalidInput(f"There is no file {path}. Check the name.") from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise InvalidInput(f"{path} cannot be read as a picture ({error}). Give a PNG file.") from error
    record = _parsed(texts[RECORD_KEY], path) if RECORD_KEY in texts else None
    generated = SOURCE_TYPE in texts.get(XMP_KEY, "")
    return Metadata(record=record, parameters=texts.get("parameters"), generated=generated)


def _parsed(text: str, path: str | Path) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InvalidInput(f"The sanakit record in {path} is damaged ({error}); the picture may be fine.") from error
    if not isinstance(record, dict):
        raise InvalidInput(f"The sanakit record in {path} is damaged (no JSON object); the picture may be fine.")
    return record
