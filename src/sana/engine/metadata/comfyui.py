"""ComfyUI: a graph of nodes, as it was executed (`prompt`) or as it was drawn (`workflow`).

The settings are found by walking from the sampler against the direction of the links, nearest nodes first.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from sana.engine.metadata.containers import Carried
from sana.engine.metadata.settings import Settings, number, parse_object, whole, words

Graph = Mapping[str, Mapping[str, Any]]
"""Node id -> {"class_type": name, "inputs": {name: value, or [node id, output] for a link}}."""
MAX_NODES = 10_000


def read_comfyui(carried: Carried) -> Settings | None:
    """Read the executed graph, or else the drawn one."""
    graph = _nodes(parse_object(_carried_graph(carried, "prompt")))
    if not graph:
        graph = _executed(parse_object(_carried_graph(carried, "workflow")))
    if not graph:
        return None
    sampler = _sampler(graph)
    near = list(_upstream(graph, sampler))
    inputs = _inputs(graph, sampler)
    positive, negative = _prompts(graph, inputs)
    return Settings(
        dialect="comfyui",
        program="ComfyUI",
        prompt=positive,
        negative_prompt=negative,
        steps=whole(_first(graph, near, "steps")),
        guidance=number(_first(graph, near, "cfg", "guidance", "cfg_scale")),
        seed=whole(_first(graph, near, "seed", "noise_seed")),
        width=whole(_first(graph, near, "width")),
        height=whole(_first(graph, near, "height")),
        sampler=words(_first(graph, near, "sampler_name")) or None,
        model=words(_first(graph, near, *_MODEL_NAMES)) or None,
        extra=_extra(graph, near),
    )


def _carried_graph(carried: Carried, name: str) -> str:
    """Return the text of a graph: by its key in PNG, behind its name in an EXIF tag of WebP."""
    if name in carried.texts:
        return carried.texts[name]
    for tag in ("Model", "Make", "ImageDescription"):
        head, _, text = carried.exif.get(tag, "").partition(":")
        if head.strip().lower() == name:
            return text
    return ""


def _nodes(found: Mapping[str, Any] | None) -> Graph:
    """Return the well-formed nodes of an executed graph."""
    return {
        name: node
        for name, node in list((found or {}).items())[:MAX_NODES]
        if isinstance(node, dict) and isinstance(node.get("class_type"), str) and isinstance(node.get("inputs"), dict)
    }


def _executed(drawn: Mapping[str, Any] | None) -> Graph:
    """Return a drawn graph in the form of an executed one; values of unknown nodes have no names and are left out."""
    if drawn is None or not isinstance(drawn.get("nodes"), list):
        return {}
    links = drawn.get("links")
    sources = {
        str(link[0]): [str(link[1]), link[2]]
        for link in (links if isinstance(links, list) else [])
        if isinstance(link, list) and len(link) >= 5
    }
    graph: dict[str, dict[str, Any]] = {}
    for node in drawn["nodes"][:MAX_NODES]:
        if not isinstance(node, dict) or not isinstance(node.get("type"), str):
            continue
        values, slots = node.get("widgets_values"), node.get("inputs")
        names = _WIDGETS.get(node["type"], ())
        inputs: dict[str, Any] = dict(zip(names, values, strict=False)) if isinstance(values, list) else {}
        for slot in slots if isinstance(slots, list) else []:
            if isinstance(slot, dict) and str(slot.get("link")) in sources:
                inputs[str(slot.get("name"))] = sources[str(slot["link"])]
        graph[str(node.get("id"))] = {"class_type": node["type"], "inputs": inputs}
    return graph


def _inputs(graph: Graph, name: str | None) -> Mapping[str, Any]:
    return graph[name]["inputs"] if name is not None else {}


def _link(graph: Graph, value: object) -> str | None:
    """Return the node that a value comes from, or None if it is a plain value."""
    linked = isinstance(value, list) and len(value) == 2 and isinstance(value[0], str | int) and str(value[0]) in graph
    return str(value[0]) if linked else None  # type: ignore[index]


def _sampler(graph: Graph) -> str | None:
    """Return the node that denoises: one with a positive and a negative prompt or a guider, and a seed or noise."""
    ranked = [
        name
        for wanted in ({"positive", "negative", "steps"}, {"guider", "sigmas"}, {"steps"}, {"positive"}, {"text"})
        for name, node in graph.items()
        if wanted <= set(node["inputs"])
    ]
    return ranked[0] if ranked else next(iter(graph), None)


def _upstream(graph: Graph, start: str | None) -> Iterator[str]:
    """Yield the node and those it depends on, nearest first, each once."""
    queue = deque([start] if start is not None else [])
    seen = set(queue)
    while queue:
        name = queue.popleft()
        yield name
        for value in graph[name]["inputs"].values():
            source = _link(graph, value)
            if source is not None and source not in seen:
                seen.add(source)
                queue.append(source)


def _first(graph: Graph, nodes: list[str], *keys: str) -> Any:
    """Return the first plain value under any of the keys; a link is followed to the nearest number or text."""
    for node in nodes:
        for key in keys:
            value = graph[node]["inputs"].get(key)
            source = _link(graph, value)
            if source is not None:
                inputs = graph[source]["inputs"]
                value = next((inputs[name] for name in (*keys, *_VALUE_NAMES) if name in inputs), None)
            if isinstance(value, str | int | float):
                return value
    return None


def _prompts(graph: Graph, inputs: Mapping[str, Any]) -> tuple[str, str]:
    """Return the texts that the sampler's positive and negative conditioning come from."""
    guider = _inputs(graph, _link(graph, inputs.get("guider")))
    ends = {**guider, **inputs}
    positive = ends.get("positive", ends.get("conditioning"))
    found = [_text(graph, end) for end in (positive, ends.get("negative"))]
    if not found[0] and not found[1]:
        found[0] = next((text for name in graph if (text := _own_text(graph[name]["inputs"]))), "")
    return found[0], found[1]


def _text(graph: Graph, end: object) -> str:
    """Return the first text upstream of a link."""
    source = _link(graph, end)
    return next((text for name in _upstream(graph, source) if (text := _own_text(graph[name]["inputs"]))), "")


def _own_text(inputs: Mapping[str, Any]) -> str:
    return next((words(inputs[key]) for key in _TEXT_NAMES if words(inputs.get(key)).strip()), "")


def _extra(graph: Graph, near: list[str]) -> dict[str, str]:
    found = {key: words(_first(graph, near, key)) for key in ("scheduler", "vae_name", "clip_name", "lora_name")}
    return {key: value for key, value in found.items() if value} | {"nodes": str(len(graph))}


_MODEL_NAMES = ("ckpt_name", "unet_name", "model_name", "model_path", "model")
_TEXT_NAMES = ("text", "prompt", "text_g", "t5xxl", "clip_l", "positive", "value", "string")
_VALUE_NAMES = ("value", "int", "float", "number", "seed", "string", "text")
_WIDGETS = {
    "KSampler": ("seed", "after", "steps", "cfg", "sampler_name", "scheduler", "denoise"),
    "KSamplerAdvanced": ("add_noise", "noise_seed", "after", "steps", "cfg", "sampler_name", "scheduler"),
    "KSamplerSelect": ("sampler_name",),
    "BasicScheduler": ("scheduler", "steps", "denoise"),
    "RandomNoise": ("noise_seed",),
    "CFGGuider": ("cfg",),
    "FluxGuidance": ("guidance",),
    "CLIPTextEncode": ("text",),
    "EmptyLatentImage": ("width", "height", "batch_size"),
    "EmptySD3LatentImage": ("width", "height", "batch_size"),
    "EmptySanaLatentImage": ("width", "height", "batch_size"),
    "CheckpointLoaderSimple": ("ckpt_name",),
    "UNETLoader": ("unet_name", "weight_dtype"),
    "LoraLoader": ("lora_name", "strength_model", "strength_clip"),
    "VAELoader": ("vae_name",),
    "SanaTextEncode": ("text",),
}
