"""Files of prompts: what is read from each kind, what is refused and where, and the jobs and names that follow."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command import Sana

from sana.apps.cli import prompts
from sana.apps.cli.names import distinct
from sana.apps.cli.options import picture_keys
from sana.apps.cli.order import Order, parse
from sana.apps.cli.prompts import read_prompts
from sana.engine.metadata import read_metadata
from sana.errors import InvalidInput


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Work in an empty folder, without anybody's settings."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "no-settings"))


def entries(name: str, data: str | bytes) -> list[tuple[str, dict[str, Any]]]:
    Path(name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return [(entry.place, dict(entry.values)) for entry in read_prompts(name, picture_keys())]


def order(*words: str) -> Order:
    return parse(["--prompt-file", *words])


def test_lines_of_text_with_blanks_and_comments() -> None:
    text = "\ufeffa fox\r\n\n  # a remark\n  \n  一只猫  \r\n# end"
    assert entries("p.txt", text) == [("p.txt, line 1", {"prompt": "a fox"}), ("p.txt, line 5", {"prompt": "一只猫"})]


def test_records_with_settings() -> None:
    lines = ['{"prompt": "a", "steps": 3, "guidance": 2, "seed": [3, 4], "size": "16:9", "binning": null}', "", '"b"']
    read = entries("p.jsonl", "\n".join(lines))
    assert [place for place, _ in read] == ["p.jsonl, line 1", "p.jsonl, line 3"]
    assert {name: str(value) for name, value in read[0][1].items()} == {
        "prompt": "a", "steps": "3", "guidance": "2.0", "seed": "[3, 4]", "size": "16:9"
    }  # fmt: skip
    assert read[1][1] == {"prompt": "b"}
    assert entries("p.json", json.dumps(["a", {"prompt": "b", "seed": 7}])) == [
        ("p.json, entry 1", {"prompt": "a"}),
        ("p.json, entry 2", {"prompt": "b", "seed": [7]}),
    ]
    assert entries("p.csv", 'steps,prompt,instruction\n3,"a, b",no\n,c,\n\n') == [
        ("p.csv, line 2", {"prompt": "a, b", "steps": 3, "instruction": False}),
        ("p.csv, line 3", {"prompt": "c"}),
    ]


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("p.txt", "", "p.txt holds no prompt. Write one into each line."),
        ("p.txt", b"a\nb\xff", "p.txt, line 2: this is not UTF-8 text. Save the file as UTF-8."),
        ("p.md", "a", "Prompts are read from .txt, .jsonl, .json, .csv files or - for stdin, not from p.md."),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": }', "p.jsonl, line 2: this is no JSON (Expecting value"),
        ("p.jsonl", "[" * 100_000, "p.jsonl, line 1: this JSON is too deep"),
        ("p.jsonl", '{"prompt": "a", "steps": ' + "1" * 5000 + "}", "p.jsonl, line 1: this JSON is too deep or its"),
        ("p.jsonl", "3", "p.jsonl, line 1: an entry is a text or an object with a `prompt`, not 3."),
        ("p.jsonl", '{"steps": 3}', "p.jsonl, line 1: there is no `prompt`. Add one."),
        ("p.jsonl", '\n{"prompt": "a", "stesp": 3}', "line 2: there is no field 'stesp'. Did you mean 'steps'?"),
        ("p.jsonl", '{"prompt": "a", "model": "nano"}', "there is no field 'model'. Known: prompt, name, size,"),
        ("p.jsonl", '{"prompt": "a", "steps": "3"}', "p.jsonl, line 1: steps takes a whole number, not '3'."),
        ("p.jsonl", '{"prompt": ["a"]}', "p.jsonl, line 1: prompt takes text in quotes, not ['a']."),
        ("p.json", '{"prompt": "a"}', "p.json must hold a list of prompts"),
        ("p.csv", "a fox\n", "p.csv, line 1: the first row must name the columns, each once, with commas between"),
        ("p.csv", "prompt,prompt\na,b", "p.csv, line 1: the first row must name the columns"),
        ("p.csv", "prompt,steps\na,b,c", "p.csv, line 2: there are 3 cells but 2 columns. Quote commas."),
        ("p.csv", 'prompt\n"a', "p.csv, line 2: this is no CSV ("),
        ("p.csv", "prompt,steps\na,many", "p.csv, line 2: steps takes a whole number, not 'many'."),
    ],
)
def test_a_wrong_file_is_one_sentence_with_its_line(name: str, data: str | bytes, sentence: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        entries(name, data)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"prompt": " "}', "what the picture should show. (`prompt` is set by p.jsonl, line 1.)"),
        ('{"prompt": "a\\u0000"}', "a NUL character. Remove it. (`prompt` is set by p.jsonl, line 1.)"),
        ('{"prompt": "\\ud800"}', "not valid UTF-8"),
        ('{"prompt": "a", "steps": 0}', "is 0. (`steps` is set by p.jsonl, line 1.)"),
        ('{"prompt": "a", "seed": [1, 2], "count": 2}', "Drop `count`, or give one `seed`. (`count` is set by p.jsonl"),
        ('{"prompt": "a", "size": 99, "width": 9}', "`size` says the same"),
    ],
)
def test_a_wrong_entry_is_named_by_its_line(line: str, sentence: str) -> None:
    Path("p.jsonl").write_text(line)
    with pytest.raises(InvalidInput) as caught:
        order("p.jsonl")
    assert sentence in str(caught.value)


def test_files_that_are_too_big_or_too_long_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "MOST_PROMPTS", 3)
    with pytest.raises(InvalidInput, match=r"p\.txt has more than 3 prompts\. Split it"):
        entries("p.txt", "a\nb\nc\nd")
    monkeypatch.setattr(prompts, "MOST_BYTES", 10)
    with pytest.raises(InvalidInput, match=r"p\.txt is larger than 1e-05 MB\. Split it"):
        entries("p.txt", "a" * 11)
    monkeypatch.setattr("sana.apps.cli.order.MOST_PICTURES", 4)
    Path("q.txt").write_text("a\nb")
    with pytest.raises(InvalidInput, match="more than 4 pictures"):
        order("q.txt", "--seed", "1-3")


def test_every_prompt_is_drawn_with_every_seed_and_lines_win_over_flags() -> None:
    Path("p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "steps": 3, "seed": 9}\n{"prompt": "c", "size": 256}')
    jobs = order("p.jsonl", "--seed", "1-2", "--steps", "5", "-W", "64", "-H", "64").jobs
    assert [(job.request.prompt, job.seeds, job.request.steps, job.request.width) for job in jobs] == [
        ("a", [1, 2], 5, 64),
        ("b", [9], 3, 64),
        ("c", [1, 2], 5, 256),
    ]
    drawn = order("p.jsonl", "--count", "2").jobs
    assert drawn[0].seeds == drawn[2].seeds
    assert [len(job.seeds) for job in drawn] == [2, 2, 2]


def test_names_never_collide() -> None:
    Path("p.txt").write_text("A fox!\na fox\na  FOX\nsomething else")
    names = [file.name for file in order("p.txt", "--seed", "5-6").files]
    assert names[:4] == ["a-fox-5.png", "a-fox-6.png", "a-fox-5-2.png", "a-fox-6-2.png"]
    assert names[4:6] == ["a-fox-5-3.png", "a-fox-6-3.png"]
    assert len(set(names)) == 8
    assert [str(file) for file in order("p.txt", "--seed", "5", "-o", "x.png").files] == [
        "x-1.png", "x-2.png", "x-3.png", "x-4.png"
    ]  # fmt: skip
    a, a2, a3 = (Path(f"a{end}.png") for end in ("", "-2", "-3"))
    assert distinct([a, a2, a]) == [a, a2, a3]


def test_stdin_takes_lines_or_records(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, read in [
        ("a fox\n# no\n{odd}\n", [{"prompt": "a fox"}, {"prompt": "{odd}"}]),
        ('{"prompt": "a"}\n\n {"prompt": "b", "steps": 3}\n', [{"prompt": "a"}, {"prompt": "b", "steps": 3}]),
    ]:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        assert [entry.values for entry in read_prompts("-", picture_keys())] == read
        assert [values for _, values in entries("pipe", text)] == read
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))
    with pytest.raises(InvalidInput, match="stdin holds no prompt"):
        read_prompts("-", picture_keys())
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(InvalidInput, match="nothing to read on stdin"):
        read_prompts("-", picture_keys())


def test_a_lone_hyphen_is_told_how_to_read_stdin(sana: Sana, no_loading: None) -> None:
    assert "To read prompts from stdin, a line each: sana --prompt-file -" in sana("-").err
    said = sana("a", "--prompt-file", "p.txt")
    assert said.err == "sana: There is a prompt and a --prompt-file. Give the one or the other.\n"


def test_orders_are_read_without_torch_and_pillow(sana: Sana, tmp_path: Path) -> None:
    Path("p.txt").write_text("a fox\na cat")
    code = (
        "import sys; from sana.apps.cli import main;"
        "assert main(['--prompt-file', 'p.txt', '--sweep', 'steps=3,4', '--print-config']) == 0;"
        "assert main(['config']) == 0; assert main(['a fox', '--sweep', 'steps=0']) == 2;"
        "assert not {'torch', 'PIL', 'numpy'} & set(sys.modules), sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_several_prompts_are_drawn_and_reported(draw: Sana) -> None:
    Path("p.jsonl").write_text('{"prompt": "a fox", "steps": 1}\n{"prompt": "a cat", "steps": 2, "seed": 9}')
    said = draw("--prompt-file", "p.jsonl", "--seed", "3-4", "--json")
    assert said.code == 0, said.err
    document = json.loads(said.out)
    assert document["files"] == ["a-fox-3.png", "a-fox-4.png", "a-cat-9.png"]
    assert document["seeds"] == [3, 4, 9]
    assert [(job["settings"]["prompt"], job["settings"]["steps"], job["seeds"]) for job in document["jobs"]] == [
        ("a fox", 1, [3, 4]),
        ("a cat", 2, [9]),
    ]
    assert read_metadata("a-cat-9.png").request().steps == 2
