"""Pictures as other programs write them, built byte by byte: one file for each dialect and container."""

import json
import struct
import zlib
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from sana.engine.metadata import Metadata, Settings, read_metadata

USER_COMMENT, MAKER_NOTE, SOFTWARE, MAKE, MODEL, DESCRIPTION = 0x9286, 0x927C, 0x0131, 0x010F, 0x0110, 0x010E
UTF16 = b"UNICODE\x00"
ASCII = b"ASCII\x00\x00\x00"


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*chunks: bytes, late: bytes = b"", width: int = 2, height: int = 2) -> bytes:
    """A PNG with chunks before its pixels, and others behind them."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress((b"\x00" + bytes(3 * 2)) * 2))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + pixels + late + chunk(b"IEND", b"")


def text(key: str, value: str, encoding: str = "latin-1") -> bytes:
    return chunk(b"tEXt", key.encode() + b"\x00" + value.encode(encoding))


def packed(key: str, value: bytes) -> bytes:
    return chunk(b"zTXt", key.encode() + b"\x00\x00" + zlib.compress(value))


def international(key: str, value: str, *, compress: bool = False) -> bytes:
    data = zlib.compress(value.encode()) if compress else value.encode()
    return chunk(b"iTXt", key.encode() + bytes([0, compress, 0]) + b"en\x00Schl\xc3\xbcssel\x00" + data)


def exif(tags: Mapping[int, bytes], order: str = "<", inner: bool = True) -> bytes:
    """A TIFF block; user comment and maker note lie in the inner directory, or else beside the others."""
    nested = {tag: value for tag, value in tags.items() if inner and tag in (USER_COMMENT, MAKER_NOTE)}
    outer = {tag: value for tag, value in tags.items() if tag not in nested}
    count = len(outer) + bool(nested)
    place = 8 + 2 + 12 * count + 4
    body, values = b"", b""
    for tag, value in sorted(outer.items()):
        body += _entry(tag, value, place + len(values), order)
        values += value if len(value) > 4 else b""
    if nested:
        start = place + len(values)
        body += struct.pack(order + "HHII", 0x8769, 4, 1, start)
        within, data = b"", b""
        for tag, value in sorted(nested.items()):
            within += _entry(tag, value, start + 2 + 12 * len(nested) + 4 + len(data), order)
            data += value if len(value) > 4 else b""
        values += struct.pack(order + "H", len(nested)) + within + bytes(4) + data
    head = b"II*\x00" if order == "<" else b"MM\x00*"
    return head + struct.pack(order + "IH", 8, count) + body + bytes(4) + values


def _entry(tag: int, value: bytes, place: int, order: str) -> bytes:
    where = value.ljust(4, b"\x00") if len(value) <= 4 else struct.pack(order + "I", place)
    return struct.pack(order + "HHI", tag, 2, len(value)) + where


def jpeg(*segments: tuple[int, bytes]) -> bytes:
    """A JPEG with segments behind its start."""
    file = BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG")
    plain = file.getvalue()
    segments = tuple((k, b"Exif\x00\x00" + data if data[:2] in (b"II", b"MM") else data) for k, data in segments)
    extra = b"".join(bytes([0xFF, kind]) + struct.pack(">H", len(data) + 2) + data for kind, data in segments)
    return plain[:2] + extra + plain[2:]


def webp(*chunks: tuple[bytes, bytes]) -> bytes:
    """A WebP with chunks behind its pixels."""
    file = BytesIO()
    Image.new("RGB", (8, 8)).save(file, "WEBP")
    body = file.getvalue()[12:]
    for kind, data in chunks:
        body += kind + struct.pack("<I", len(data)) + data + b"\x00" * (len(data) % 2)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def write(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def found(folder: Path, data: bytes, name: str = "x.png") -> Metadata:
    return read_metadata(write(folder, name, data))


def said(folder: Path, data: bytes, name: str = "x.png") -> Settings:
    settings = found(folder, data, name).settings
    assert settings is not None
    return settings


PROMPT = "a cat, 你好 in a “garden”"
NEGATIVE = "blur, noise"
SETTINGS = "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, Seed: 965400086, Size: 512x768"
A1111 = (
    f'{PROMPT}\nNegative prompt: {NEGATIVE}\n{SETTINGS}, Model: "a, b: c", Lora hashes: "x: 1, y: 2", Version: v1.10.1'
)
SWARMUI: dict[str, Any] = {
    "sui_image_params": {
        "prompt": PROMPT,
        "negativeprompt": NEGATIVE,
        "model": "Official/sd_xl_base_1.0",
        "seed": 965400086,
        "steps": "20",
        "cfgscale": "7.5",
        "width": 512,
        "height": 768,
        "sampler": "euler",
        "swarm_version": "0.9.3.1",
    },
    "sui_extra_data": {"date": "2024-11-13"},
}
FOOOCUS: dict[str, Any] = {
    "prompt": PROMPT,
    "negative_prompt": NEGATIVE,
    "steps": 20,
    "guidance_scale": 7.5,
    "seed": "965400086",
    "resolution": "(512, 768)",
    "sampler": "dpmpp_2m_sde_gpu",
    "base_model": "juggernautXL",
    "performance": "Speed",
    "version": "Fooocus v2.5.5",
    "styles": "['Fooocus V2']",
}
INVOKEAI: dict[str, Any] = {
    "app_version": "5.4.2",
    "generation_mode": "txt2img",
    "positive_prompt": PROMPT,
    "negative_prompt": NEGATIVE,
    "width": 512,
    "height": 768,
    "seed": 965400086,
    "cfg_scale": 7.5,
    "steps": 20,
    "scheduler": "dpmpp_2m_k",
    "model": {"key": "8d", "name": "Juggernaut XL", "base": "sdxl", "type": "main"},
    "loras": [],
}
MFLUX: dict[str, Any] = {
    "mflux_version": "0.11.0",
    "model": "dev",
    "seed": 965400086,
    "steps": 20,
    "guidance": 7.5,
    "width": 512,
    "height": 768,
    "precision": "mlx.core.bfloat16",
    "quantize": None,
    "prompt": PROMPT,
    "negative_prompt": NEGATIVE,
}
COMFYUI: dict[str, Any] = {
    "3": {
        "class_type": "KSampler",
        "inputs": {
            "seed": ["9", 0],
            "steps": 20,
            "cfg": 7.5,
            "sampler_name": "euler",
            "scheduler": "normal",
            "model": ["4", 0],
            "positive": ["6", 0],
            "negative": ["7", 0],
            "latent_image": ["5", 0],
        },
    },
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "sd15.safetensors"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 768, "batch_size": 1}},
    "6": {"class_type": "ConditioningCombine", "inputs": {"conditioning_1": ["10", 0]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": NEGATIVE, "clip": ["4", 1]}},
    "8": {"class_type": "SaveImage", "inputs": {"images": ["3", 0]}, "is_changed": [float("nan")]},
    "9": {"class_type": "PrimitiveInt", "inputs": {"value": 965400086}},
    "10": {"class_type": "CLIPTextEncode", "inputs": {"text": PROMPT, "clip": ["4", 1]}},
}
COMFYUI_CUSTOM: dict[str, Any] = {
    "1": {"class_type": "RandomNoise", "inputs": {"noise_seed": 965400086}},
    "2": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}},
    "3": {"class_type": "BasicScheduler", "inputs": {"scheduler": "simple", "steps": 20, "model": ["8", 0]}},
    "4": {"class_type": "BasicGuider", "inputs": {"model": ["8", 0], "conditioning": ["5", 0]}},
    "5": {"class_type": "FluxGuidance", "inputs": {"guidance": 7.5, "conditioning": ["6", 0]}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": PROMPT}},
    "7": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 512, "height": 768}},
    "8": {"class_type": "UNETLoader", "inputs": {"unet_name": "flux1-dev.safetensors"}},
    "9": {
        "class_type": "SamplerCustomAdvanced",
        "inputs": {
            "noise": ["1", 0],
            "guider": ["4", 0],
            "sampler": ["2", 0],
            "sigmas": ["3", 0],
            "latent_image": ["7", 0],
        },
    },
}
WORKFLOW: dict[str, Any] = {
    "nodes": [
        {
            "id": 3,
            "type": "KSampler",
            "widgets_values": [965400086, "randomize", 20, 7.5, "euler", "normal", 1],
            "inputs": [
                {"name": "model", "link": 1},
                {"name": "positive", "link": 4},
                {"name": "negative", "link": 6},
                {"name": "latent_image", "link": 2},
            ],
        },
        {"id": 4, "type": "CheckpointLoaderSimple", "widgets_values": ["sd15.safetensors"]},
        {"id": 5, "type": "EmptyLatentImage", "widgets_values": [512, 768, 1], "inputs": []},
        {"id": 7, "type": "CLIPTextEncode", "widgets_values": [NEGATIVE], "inputs": [{"name": "clip", "link": None}]},
        {"id": 6, "type": "CLIPTextEncode", "widgets_values": [PROMPT]},
        {"id": 11, "type": "Note", "widgets_values": {"text": "by name"}},
    ],
    "links": [
        [1, 4, 0, 3, 0, "MODEL"],
        [2, 5, 0, 3, 3, "LATENT"],
        [4, 6, 0, 3, 1, "CONDITIONING"],
        [6, 7, 0, 3, 2, "CONDITIONING"],
    ],
}


def comment(code: bytes, value: str, encoding: str) -> dict[int, bytes]:
    return {USER_COMMENT: code + value.encode(encoding)}


PICTURES: dict[str, tuple[str, str, bytes]] = {
    "a1111 in PNG": ("a1111", "a.png", png(international("parameters", A1111))),
    "a1111 behind the pixels": ("a1111", "a.png", png(late=international("parameters", A1111, compress=True))),
    "a1111 in PNG as UTF-8": ("a1111", "a.png", png(text("parameters", A1111, "utf-8"))),
    "a1111 packed": ("a1111", "a.png", png(packed("parameters", A1111.encode()))),
    "a1111 in JPEG": ("a1111", "a.jpg", jpeg((0xE1, exif(comment(UTF16, A1111, "utf-16-be"))))),
    "a1111 in JPEG, little": ("a1111", "a.jpg", jpeg((0xE1, exif(comment(UTF16, A1111, "utf-16-le"), ">")))),
    "a1111 in JPEG, marked": ("a1111", "a.jpg", jpeg((0xE1, exif(comment(UTF16, A1111, "utf-16"))))),
    "a1111 in a JPEG comment": ("a1111", "a.jpg", jpeg((0xFE, A1111.encode()))),
    "a1111 in WebP": ("a1111", "a.webp", webp((b"EXIF", exif(comment(ASCII, A1111, "utf-8"))))),
    "a1111 in WebP, odd": ("a1111", "a.webp", webp((b"JUNK", b"x"), (b"EXIF", exif(comment(b"", A1111, "utf-8"))))),
    "swarmui in PNG": ("swarmui", "s.png", png(text("parameters", json.dumps(SWARMUI)))),
    "swarmui in JPEG": ("swarmui", "s.jpg", jpeg((0xE1, exif(comment(UTF16, json.dumps(SWARMUI), "utf-16-le"))))),
    "fooocus in PNG": (
        "fooocus",
        "f.png",
        png(text("parameters", json.dumps(FOOOCUS)), text("fooocus_scheme", "fooocus")),
    ),
    "fooocus as a1111": ("fooocus", "f.png", png(international("parameters", A1111), text("fooocus_scheme", "a1111"))),
    "fooocus in JPEG": (
        "fooocus",
        "f.jpg",
        jpeg(
            (
                0xE1,
                exif(
                    {
                        USER_COMMENT: json.dumps(FOOOCUS).encode(),
                        MAKER_NOTE: b"fooocus",
                        SOFTWARE: b"Fooocus v2.5.5\x00",
                    },
                    inner=False,
                ),
            )
        ),
    ),
    "invokeai": ("invokeai", "i.png", png(text("invokeai_metadata", json.dumps(INVOKEAI)))),
    "mflux in PNG": ("mflux", "m.png", png(chunk(b"eXIf", exif(comment(ASCII, json.dumps(MFLUX), "utf-8"), ">")))),
    "mflux in JPEG": ("mflux", "m.jpg", jpeg((0xE1, exif(comment(ASCII, json.dumps(MFLUX), "utf-8"))))),
    "comfyui": ("comfyui", "c.png", png(text("prompt", json.dumps(COMFYUI)), text("workflow", json.dumps(WORKFLOW)))),
    "comfyui with a guider": ("comfyui", "c.png", png(text("prompt", json.dumps(COMFYUI_CUSTOM)))),
    "comfyui, drawn graph only": ("comfyui", "c.png", png(text("workflow", json.dumps(WORKFLOW)))),
    "comfyui in WebP": (
        "comfyui",
        "c.webp",
        webp(
            (
                b"EXIF",
                exif(
                    {
                        MODEL: b"prompt:" + json.dumps(COMFYUI).encode() + b"\x00",
                        MAKE: b"workflow:" + json.dumps(WORKFLOW).encode() + b"\x00",
                    }
                ),
            )
        ),
    ),
    "comfyui of other nodes in WebP": (
        "comfyui",
        "c.webp",
        webp((b"EXIF", exif({DESCRIPTION: b"Workflow: " + json.dumps(WORKFLOW).encode()}))),
    ),
}
"""Name -> dialect, file name and bytes; all say the same of the prompt, 20 steps, guidance 7.5 and the seed."""
