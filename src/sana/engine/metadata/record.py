"""What this program writes into its pictures: the AI label, our own JSON record, and the common text line."""

import json
from typing import TYPE_CHECKING, Any, Literal

from sana.engine.metadata.containers import XMP_KEY, clean
from sana.engine.request import Result
from sana.errors import InvalidInput

if TYPE_CHECKING:
    from PIL.PngImagePlugin import PngInfo

Level = Literal["full", "label", "none"]
LEVELS: tuple[Level, ...] = ("full", "label", "none")

RECORD_KEY = "sanakit"
RECORD_VERSION = 1
SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
COMPOSITE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"
"""What the label calls a picture of which a part is the user's own, as it was."""
XMP_PACKET = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"'
    f' Iptc4xmpExt:DigitalSourceType="{SOURCE_TYPE}"/>'
    '</rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
)


def record_of(result: Result, index: int) -> dict[str, Any]:
    """Return the JSON record of one picture: format version, resolved request, its own seed, the model, remarks.

    Where it was chosen among candidates, that is told as well; its own seed draws it again without them.
    """
    return {
        "version": RECORD_VERSION,
        "request": result.settings.to_dict(),
        "seed": result.seeds[index],
        "model": dict(result.model),
        **({"selection": dict(result.selection[index])} if result.selection else {}),
        **({"warnings": list(result.warnings)} if result.warnings else {}),
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
        "Denoising strength": "" if settings.strength is None else f"{settings.strength:g}",
        "Model": result.model.get("name", ""),
        "Version": f"sanakit {result.model.get('sanakit', '')}".strip(),
    }
    lines = [settings.prompt]
    if settings.negative_prompt:
        lines.append(f"Negative prompt: {settings.negative_prompt}")
    lines.append(", ".join(f"{name}: {_quoted(str(value))}" for name, value in pairs.items() if value != ""))
    return "\n".join(lines)


def _keeps(result: Result) -> bool:
    return result.settings.mask is not None or any(result.settings.outpaint)


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if any(mark in value for mark in ',:\n"') else value


def png_info(result: Result, index: int, level: Level = "full") -> "PngInfo":
    """Return the text chunks of one picture; what UTF-8 cannot say is replaced.

    Raises:
        InvalidInput: `level` is not one of `LEVELS`.
    """
    if level not in LEVELS:
        raise InvalidInput(f"`metadata` must be one of {', '.join(LEVELS)} but is {level!r}.")
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    if level == "none":
        return info
    if level == "full":
        info.add_text("parameters", clean(parameters_of(result, index)))
        info.add_itxt(RECORD_KEY, clean(json.dumps(record_of(result, index), ensure_ascii=False)))
    info.add_itxt(XMP_KEY, XMP_PACKET.replace(SOURCE_TYPE, COMPOSITE_TYPE) if _keeps(result) else XMP_PACKET)
    return info
