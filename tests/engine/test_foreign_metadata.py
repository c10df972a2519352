"""Settings that other programs wrote, read from files built here."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from foreign_pictures import (
    A1111,
    ASCII,
    FOOOCUS,
    INVOKEAI,
    MFLUX,
    NEGATIVE,
    PICTURES,
    PROMPT,
    SETTINGS,
    USER_COMMENT,
    WORKFLOW,
    comment,
    exif,
    found,
    international,
    jpeg,
    png,
    said,
    text,
    webp,
    write,
)
from sana.engine.metadata import DIALECTS, RECORD_KEY, SOURCE_TYPE, Settings, nearest_sampler, read_metadata
from sana.engine.metadata.a1111 import pairs_of, settings_of
from sana.engine.metadata.settings import MAX_DEPTH, number, parse_json, parse_object, shortened, whole
from sana.engine.request import SAMPLER_NAMES
from sana.errors import InvalidInput

RECORD = {"version": 1, "request": {"prompt": "a fox"}, "seed": 7}


@pytest.mark.parametrize("case", PICTURES)
def test_every_dialect_in_every_container_says_the_same(tmp_path: Path, case: str) -> None:
    dialect, name, data = PICTURES[case]
    settings = said(tmp_path, data, name)
    assert settings.dialect == dialect
    assert settings.prompt == PROMPT
    assert settings.negative_prompt == ("" if "guider" in case else NEGATIVE)
    assert (settings.steps, settings.guidance, settings.seed) == (20, 7.5, 965400086)
    assert (settings.width, settings.height) == (512, 768)
    assert settings.model
    assert settings.program


def test_there_is_a_case_for_every_dialect() -> None:
    assert {dialect for dialect, _, _ in PICTURES.values()} == set(DIALECTS)


@pytest.mark.parametrize("case", PICTURES)
def test_what_pillow_reads_is_a_picture_too(tmp_path: Path, case: str) -> None:
    _, name, data = PICTURES[case]
    with Image.open(write(tmp_path, name, data)) as image:
        image.load()
        texts = {**image.info, **getattr(image, "text", {})}
        comments = [image.getexif().get(USER_COMMENT), image.getexif().get_ifd(0x8769).get(USER_COMMENT)]
    if "a1111 in PNG" in case:
        assert texts["parameters"].encode("latin-1" if "UTF-8" in case else "utf-8").decode() == A1111
    if case == "mflux in JPEG":
        assert comments[1] == (ASCII + json.dumps(MFLUX).encode()).decode("latin-1")


@pytest.mark.parametrize(
    ("last", "program"),
    [
        ("Version: v1.10.1", "AUTOMATIC1111 v1.10.1"),
        ("Version: f2.0.1v1.10.1-previous-659", "Forge f2.0.1v1.10.1-previous-659"),
        ("App: SD.Next, Version: cb0eb55", "SD.Next cb0eb55"),
        ("Version: stable-diffusion.cpp", "stable-diffusion.cpp"),
        ("Version: sanakit 0.1.0", "sanakit 0.1.0"),
        ("Clip skip: 2", "a program that writes AUTOMATIC1111's form"),
    ],
)
def test_the_program_is_told_by_its_version(last: str, program: str) -> None:
    assert settings_of(f"a cat\n{SETTINGS}, {last}", "a1111").program == program


def test_texts_of_the_common_form_in_their_variants() -> None:
    quoted = settings_of(A1111, "a1111")
    assert quoted.model == "a, b: c"
    assert quoted.extra == {"Schedule type": "Karras", "Lora hashes": "x: 1, y: 2"}
    lines = settings_of(f"one\ntwo\nNegative prompt: three\nfour\n{SETTINGS}\nTemplate: x", "a1111")
    assert (lines.prompt, lines.negative_prompt, lines.steps) == ("one\ntwo", "three\nfour", 20)
    only_negative = settings_of(f"Negative prompt: blur\n{SETTINGS}", "a1111")
    assert (only_negative.prompt, only_negative.negative_prompt) == ("", "blur")
    glued = settings_of(f"a cat Negative prompt: blur{SETTINGS}", "a1111")
    assert (glued.steps, glued.seed) == (20, 965400086)
    decoy = settings_of(f"Steps: 3, a prompt\n{SETTINGS}", "a1111")
    assert (decoy.prompt, decoy.steps) == ("Steps: 3, a prompt", 20)
    assert settings_of("just words", "a1111").prompt == "just words"
    tail = settings_of(f'a cat\n{SETTINGS}, SDCPP: {{"seed": 1, "prompt": "Seed: 999"}}', "a1111")
    assert (tail.seed, "SDCPP" in tail.extra) == (965400086, False)


def test_pairs_are_read_as_they_are_quoted() -> None:
    line = 'Steps: 20, None, Model:  "x: \\"y\\"", Odd: "a \\q, Even: "x", Open: "never, Other: too, Empty: , Last: 1'
    assert list(pairs_of(line)) == [
        ("Steps", "20"),
        ("Model", 'x: "y"'),
        ("Odd", '"a \\q'),
        ("Even", "x"),
        ("Open", '"never'),
        ("Other", "too"),
        ("Empty", ""),
        ("Last", "1"),
    ]


def test_a_text_without_steps_is_nobodys(tmp_path: Path) -> None:
    assert found(tmp_path, png(text("parameters", "a cat"))).settings is None
    assert found(tmp_path, png(text("parameters", '{"prompt": "Steps: 4"}'))).settings is None
    assert found(tmp_path, png(text("prompt", "a plain text"), text("workflow", "[]"))).settings is None
    assert found(tmp_path, png(text("invokeai_metadata", "damaged {"))).settings is None
    assert found(tmp_path, png(text("workflow", '{"nodes": {}}'))).settings is None
    assert found(tmp_path, png(text("parameters", '{"sui_image_params": 3}'))).settings is None


def test_invokeai_spellings(tmp_path: Path) -> None:
    old = {**INVOKEAI, "model": {"model_name": "amix"}, "cfg_scale": None, "guidance": 3.5}
    settings = said(tmp_path, png(text("invokeai_metadata", json.dumps(old))))
    assert (settings.model, settings.guidance, settings.program) == ("amix", 3.5, "InvokeAI 5.4.2")
    plain = said(tmp_path, png(text("invokeai_metadata", json.dumps({"model": "m"}))))
    assert (plain.model, plain.program, plain.prompt) == ("m", "InvokeAI", "")


def test_fooocus_is_known_without_its_mark(tmp_path: Path) -> None:
    settings = said(tmp_path, png(text("parameters", json.dumps(FOOOCUS))))
    assert (settings.dialect, settings.program) == ("fooocus", "Fooocus v2.5.5")
    labels = {"Prompt": "a cat", "Performance": "Speed", "Base Model": "m", "Resolution": [1, 2]}
    unmarked = said(tmp_path, png(text("parameters", json.dumps(labels))))
    assert (unmarked.dialect, unmarked.program, unmarked.prompt, unmarked.width) == (
        "fooocus",
        "Fooocus",
        "a cat",
        None,
    )
    software = jpeg((0xE1, exif({0x0131: b"Fooocus v2.5.5", **comment(bytes(8), A1111, "utf-8")})))
    assert said(tmp_path, software, "x.jpg").program == "Fooocus v2.5.5"


def test_mflux_beside_the_picture(tmp_path: Path) -> None:
    picture = write(tmp_path, "a.png", png())
    assert read_metadata(picture).settings is None
    sidecar = write(tmp_path, "a.metadata.json", json.dumps(MFLUX).encode())
    for path in (picture, sidecar):
        settings = read_metadata(path).settings
        assert settings is not None
        assert (settings.dialect, settings.program, settings.prompt) == ("mflux", "mflux 0.11.0", PROMPT)
    sidecar.write_text("null")
    assert read_metadata(picture).settings is None
    with pytest.raises(InvalidInput, match="no file"):
        read_metadata(tmp_path / "b.metadata.json")


def test_our_record_in_other_formats(tmp_path: Path) -> None:
    inside = json.dumps({RECORD_KEY: RECORD})
    for name, data in {
        "a.jpg": jpeg((0xE1, exif(comment(ASCII, inside, "utf-8")))),
        "a.webp": webp((b"EXIF", exif(comment(ASCII, inside, "utf-8")))),
        "a.png": png(international(RECORD_KEY, json.dumps(RECORD))),
    }.items():
        metadata = found(tmp_path, data, name)
        assert metadata.request().prompt == "a fox"
        assert metadata.settings is None
    assert found(tmp_path, jpeg((0xFE, b'{"sanakit": 3}')), "b.jpg").record is None


def test_the_label_is_found_in_every_format(tmp_path: Path) -> None:
    packet = f'<x Iptc4xmpExt:DigitalSourceType="{SOURCE_TYPE}"/>'.encode()
    assert found(tmp_path, jpeg((0xE1, b"http://ns.adobe.com/xap/1.0/\x00" + packet)), "a.jpg").generated
    assert found(tmp_path, webp((b"XMP ", packet)), "a.webp").generated
    assert found(tmp_path, png(international("XML:com.adobe.xmp", packet.decode()))).generated
    assert not found(tmp_path, png(international("XML:com.adobe.xmp", "<x/>"))).generated


def graph(**inputs: Any) -> dict[str, Any]:
    return {"1": {"class_type": "Any", "inputs": inputs}}


def comfyui(folder: Path, nodes: Any) -> Settings:
    return said(folder, png(text("prompt", json.dumps(nodes))))


def test_graphs_of_unknown_nodes_give_what_they_have(tmp_path: Path) -> None:
    settings = comfyui(tmp_path, graph(seed="12", text="a cat", cfg=None, steps=["none", 0]))
    assert (settings.seed, settings.prompt, settings.guidance, settings.steps) == (12, "a cat", None, None)
    assert comfyui(tmp_path, {**graph(other=1), "2": [], "3": {"class_type": 4, "inputs": {}}}).extra == {"nodes": "1"}
    linked = {"1": {"class_type": "K", "inputs": {"steps": ["2", 0], "positive": [2, 0]}}}
    both = {**linked, "2": {"class_type": "P", "inputs": {"nothing": 1, "again": ["1", 0]}}}
    assert comfyui(tmp_path, both).steps is None
    ring = {str(i): {"class_type": "R", "inputs": {"next": [str(i % 3 + 2), 0]}} for i in range(2, 5)}
    assert comfyui(tmp_path, {"1": {"class_type": "K", "inputs": {"steps": 4, "model": ["2", 0]}}, **ring}).steps == 4


def test_drawn_graphs_with_holes(tmp_path: Path) -> None:
    holes = {"nodes": [3, {"type": 4}, {"type": "KSampler", "inputs": [5]}, *WORKFLOW["nodes"]], "links": [3, [1]]}
    settings = said(tmp_path, png(text("workflow", json.dumps(holes))))
    assert settings.prompt == NEGATIVE  # without links the first text is taken
    assert said(tmp_path, png(text("workflow", json.dumps({"nodes": WORKFLOW["nodes"]})))).model is None


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("Euler", "flow-euler"),
        ("euler", "flow-euler"),
        ("DPM++ 2M", "flow-dpm"),
        ("DPM++ 2M Karras", "flow-dpm"),
        ("dpmpp_2m", "flow-dpm"),
        ("dpmpp_2m_k", "flow-dpm"),
        ("dpm++2m", "flow-dpm"),
        ("SCM", "scm"),
        ("Euler a", None),
        ("dpmpp_2m_sde_gpu", None),
        ("", None),
        (None, None),
        *((name, name) for name in SAMPLER_NAMES),
    ],
)
def test_samplers_of_the_same_family(theirs: str | None, ours: str | None) -> None:
    assert nearest_sampler(theirs) == ours


def test_the_nearest_request() -> None:
    full = Settings(
        dialect="x",
        program="X",
        prompt="a cat",
        negative_prompt="blur",
        steps=20,
        guidance=7.5,
        seed=3,
        width=512,
        height=768,
        sampler="Euler",
    )
    request, remarks = full.request()
    assert request is not None
    assert remarks == ()
    assert (request.prompt, request.negative_prompt, request.sampler) == ("a cat", "blur", "flow-euler")
    assert (request.steps, request.guidance, request.seed, request.width, request.height) == (20, 7.5, 3, 512, 768)


def test_what_is_not_possible_here_is_left_out_and_said() -> None:
    odd = Settings(
        dialect="x",
        program="X",
        prompt="a <lora:x:1> cat",
        negative_prompt="blur",
        steps=10**9,
        guidance=1.0,
        seed=2**60,
        width=-5,
        height=768,
        sampler="Euler a",
    )
    request, remarks = odd.request()
    assert request is not None
    assert (request.steps, request.seed, request.width, request.height, request.sampler) == (None,) * 5
    assert request.negative_prompt == ""
    words = " ".join(remarks)
    for part in ("steps 1000000000", "seed", "width -5", "negative prompt", "Euler a", "LoRA"):
        assert part in words
    assert Settings(dialect="x", program="X").request() == (None, ())
    extra = Settings(dialect="x", program="X", prompt="a", extra={"Lora hashes": "x"})
    assert "LoRA" in extra.request()[1][0]


def test_a_prompt_that_no_request_takes_is_refused_in_a_sentence() -> None:
    request, remarks = Settings(dialect="x", program="X", prompt="x" * 10_000_000).request()
    assert request is None
    assert len(remarks) == 1


@pytest.mark.parametrize(
    ("value", "result"),
    [
        (3, 3),
        (3.0, 3),
        (3.5, None),
        ("7", 7),
        (" 12345678901234567890 ", 12345678901234567890),
        ("1e2", 100),
        ("--5", None),
        ("x", None),
        (True, None),
        (None, None),
        ([1], None),
        ("9" * 50, None),
        ("nan", None),
    ],
)
def test_whole_numbers_in_all_their_spellings(value: object, result: int | None) -> None:
    assert whole(value) == result


def test_numbers_and_json_that_are_none() -> None:
    assert number("inf") is number(True) is number("1,5") is number({}) is None
    assert parse_json('{"a": NaN, "b": 1e999, "c": [-Infinity, "\\ud800x\\u0000"]}') == {
        "a": None,
        "b": None,
        "c": [None, "\ufffdx\ufffd"],
    }
    assert parse_json("{") is parse_json("9" * 5000) is parse_json("[" * 100_000) is None
    assert parse_json("[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1)) is not None
    assert parse_json("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1)) is None
    assert parse_object(" [1]") is parse_object("") is parse_object('{"a"') is None
    assert parse_object('{"\\udfff": 1}') == {"\ufffd": 1}
    assert shortened("x" * 100) == "x" * 57 + "..."
