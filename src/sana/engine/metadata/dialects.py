"""What other programs write into pictures: one reader a program, and the order in which they are asked.

Forms: SwarmUI's own page on its metadata; the sources of Fooocus, InvokeAI and mflux for the names of their fields.
"""

import re
from collections.abc import Callable
from typing import Any

from sana.engine.metadata.a1111 import read_a1111, settings_of
from sana.engine.metadata.comfyui import read_comfyui
from sana.engine.metadata.containers import Carried
from sana.engine.metadata.settings import Settings, number, parse_object, rest_of, whole, words


def read_settings(carried: Carried) -> Settings | None:
    """Return what the first reader understands, or None."""
    return next((found for read in DIALECTS.values() if (found := read(carried)) is not None), None)


def read_swarmui(carried: Carried) -> Settings | None:
    """Read `sui_image_params`; its values are often texts where numbers are meant."""
    whole_text = parse_object(carried.texts.get("parameters") or carried.comment)
    values = (whole_text or {}).get("sui_image_params")
    return _settings("swarmui", "SwarmUI", values, _SWARMUI, "swarm_version") if isinstance(values, dict) else None


def read_fooocus(carried: Carried) -> Settings | None:
    """Read both schemes: a JSON object, or the text of AUTOMATIC1111's form with the mark of Fooocus beside it."""
    text = carried.texts.get("parameters") or carried.comment
    scheme = carried.texts.get("fooocus_scheme") or carried.exif.get("MakerNote", "")
    software = carried.exif.get("Software", "")
    found = parse_object(text)
    values = {name.lower().replace(" ", "_"): value for name, value in (found or {}).items()}
    version = words(values.get("version")) or software
    if values and (scheme == "fooocus" or "fooocus" in version.lower() or {"base_model", "performance"} <= set(values)):
        size = re.findall(r"\d{1,6}", words(values.pop("resolution", "")))
        if len(size) == 2:
            values |= {"width": size[0], "height": size[1]}
        return _settings("fooocus", version or "Fooocus", values, _FOOOCUS)
    if found is None and text and (scheme == "a1111" or software.startswith("Fooocus")):
        return settings_of(text, "fooocus", software or "Fooocus")
    return None


def read_invokeai(carried: Carried) -> Settings | None:
    """Read `invokeai_metadata`; the model is an object whose name has had two spellings."""
    values = parse_object(carried.texts.get("invokeai_metadata", ""))
    if values is None:
        return None
    model = values.get("model")
    if isinstance(model, dict):
        values["model"] = model.get("name") or model.get("model_name")
    if values.get("cfg_scale") is None:
        values["cfg_scale"] = values.get("guidance")
    return _settings("invokeai", "InvokeAI", values, _INVOKEAI, "app_version")


def read_mflux(carried: Carried) -> Settings | None:
    """Read the JSON of the user comment, or of the file beside the picture."""
    values = parse_object(carried.comment)
    if values is None or "mflux_version" not in values:
        return None
    return _settings("mflux", "mflux", values, _MFLUX, "mflux_version")


def _settings(
    dialect: str, program: str, values: dict[str, Any], names: dict[str, str], version: str | None = None
) -> Settings:
    """Return the settings of a flat object; `names` says what our fields are called in it."""
    found = {field: values.get(name) for field, name in names.items()}
    return Settings(
        dialect=dialect,
        program=f"{program} {words(values.get(version))}".strip() if version else program,
        prompt=words(found["prompt"]),
        negative_prompt=words(found["negative_prompt"]),
        steps=whole(found["steps"]),
        guidance=number(found["guidance"]),
        seed=whole(found["seed"]),
        width=whole(found["width"]),
        height=whole(found["height"]),
        sampler=words(found["sampler"]) or None,
        model=words(found["model"]) or None,
        extra=rest_of(values, frozenset({*names.values(), version or "version"})),
    )


_COMMON = {name: name for name in ("prompt", "steps", "seed", "width", "height", "model", "sampler")}
_SWARMUI = _COMMON | {"negative_prompt": "negativeprompt", "guidance": "cfgscale"}
_FOOOCUS = _COMMON | {"negative_prompt": "negative_prompt", "guidance": "guidance_scale", "model": "base_model"}
_INVOKEAI = _COMMON | {
    "prompt": "positive_prompt",
    "negative_prompt": "negative_prompt",
    "guidance": "cfg_scale",
    "sampler": "scheduler",
}
_MFLUX = _COMMON | {"negative_prompt": "negative_prompt", "guidance": "guidance", "sampler": "scheduler"}

Reader = Callable[[Carried], Settings | None]
DIALECTS: dict[str, Reader] = {
    "swarmui": read_swarmui,
    "fooocus": read_fooocus,
    "invokeai": read_invokeai,
    "mflux": read_mflux,
    "a1111": read_a1111,
    "comfyui": read_comfyui,
}
