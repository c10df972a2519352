"""The command as a whole: pages, verbs, streams and start-up."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from command import Sana

import sana as package
from sana.apps.cli import VERBS
from sana.apps.cli.output import Progress, Terminal, duration, printable

DOCUMENTED = {0, 1, 2, 3, 4, 6, 130}


def call(*words: str, **settings: str) -> "subprocess.CompletedProcess[bytes]":
    environment = {**os.environ, "PYTHONPATH": str(Path(package.__file__).parents[1]), **settings}
    return subprocess.run(words, capture_output=True, timeout=120, check=False, env=environment)


def test_without_arguments_it_says_what_to_try(sana: Sana) -> None:
    said = sana()
    assert (said.code, said.err) == (0, "")
    assert len(said.out.splitlines()) <= 10
    assert "a toy" in said.out
    for example in re.findall(r"^  sana (\w+)", said.out, re.MULTILINE):
        assert example in VERBS


def test_help_lists_the_verbs_and_the_exit_codes(sana: Sana) -> None:
    for word in ("--help", "-h", "help"):
        said = sana(word)
        assert said.code == 0
        for verb in VERBS:
            assert f"\n  {verb} " in said.out
        for code in DOCUMENTED:
            assert re.search(rf"\b{code} [a-z]", said.out)


def test_every_verb_has_help(sana: Sana) -> None:
    for verb in VERBS:
        said = sana(verb, "--help")
        assert said.code == 0, verb
        assert said.out.startswith("usage: sana"), verb
        assert "--json" in said.out, verb


def test_version(sana: Sana) -> None:
    assert sana("--version").out == f"sana {package.__version__}\n"


@pytest.mark.parametrize(
    ("word", "verb"),
    [("trian", "train"), ("edti", "edit"), ("lroa", "lora"), ("modls", "models"), ("generat", "generate")],
)
def test_a_mistyped_verb_is_not_drawn(sana: Sana, word: str, verb: str) -> None:
    said = sana(word, "x")
    assert said.code == 2
    assert f"Did you mean '{verb}'?" in said.err


def test_help_costs_little_and_loads_nothing_heavy() -> None:
    code = (
        "import sys, resource; from sana.apps.cli import main; main(['--help']);"
        "used = resource.getrusage(resource.RUSAGE_SELF);"
        "print('CPU', used.ru_utime + used.ru_stime, *({'torch', 'transformers', 'numpy', 'tqdm'} & set(sys.modules)))"
    )
    report = call(sys.executable, "-c", code).stdout.decode().rsplit("CPU", 1)[1].split()
    assert report[1:] == []
    assert float(report[0]) < 0.25


@pytest.mark.parametrize("module", ["sana", "sana.apps.cli"])
def test_python_dash_m_is_the_command(module: str) -> None:
    done = call(sys.executable, "-m", module, "models", "--json")
    assert done.returncode == 0
    assert "nano" in [model["name"] for model in json.loads(done.stdout)["models"]]
    assert call(sys.executable, "-m", module, "models", "nothing").returncode == 3


def test_a_closed_pipe_is_quiet() -> None:
    command = f"{sys.executable} -m sana models | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = call("bash", "-c", f"for i in 1 2 3; do {command}; done")
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr


def test_streams_that_only_know_ascii() -> None:
    done = call(sys.executable, "-m", "sana", "一只猫", "🐟", PYTHONIOENCODING="ascii")
    assert done.returncode == 2
    assert done.stderr.startswith(b"sana: The prompt must be one argument.")
    assert len(done.stderr.splitlines()) == 1


def test_paths_on_an_ascii_stdout_keep_their_bytes() -> None:
    code = "from sana.apps.cli.output import Terminal; t = Terminal(); t.result('猫-1.png'); t.say('a · 猫')"
    done = call(sys.executable, "-c", code, PYTHONIOENCODING="ascii", PYTHONUTF8="1")
    assert done.stdout == "猫-1.png\n".encode()
    assert done.stderr.isascii()
    code = "from sana.apps.cli.output import Terminal; Terminal(json=True).document({'a': '猫'})"
    done = call(sys.executable, "-c", code, PYTHONIOENCODING="ascii")
    assert json.loads(done.stdout) == {"a": "猫"}


def test_progress_is_a_line_at_every_tenth_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Terminal().count(40) as progress:
        for i in range(40):
            progress.advance(f"step {i + 1}")
    assert capsys.readouterr().err == "", "what takes no time needs no lines"
    monkeypatch.setattr("sana.apps.cli.output.SHORTEST_SILENCE", 0.0)
    with Terminal().count(40) as progress:
        for i in range(40):
            progress.advance(f"step {i + 1}")
    lines = capsys.readouterr().err.splitlines()
    assert [int(line.split("%")[0]) for line in lines] == list(range(10, 101, 10))
    assert "left" in lines[0]
    assert "left" not in lines[-1]
    with Terminal(quiet=True).count(2) as progress:
        progress.advance("x")
    assert capsys.readouterr().err == ""


def test_slow_steps_are_told_one_by_one(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sana.apps.cli.output.LONGEST_SILENCE", -1.0)
    with Terminal().count(100) as progress:
        for i in range(3):
            progress.advance(f"step {i + 1}")
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_a_terminal_gets_a_bar_that_leaves_no_trace(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    terminal = Terminal()
    with terminal.count(2, text="loading") as progress:
        assert progress.bar is not None
        progress.advance("step 1/2")
        terminal.result("a.png")
        progress.advance("step 2/2")
    out, err = capsys.readouterr()
    assert out == "a.png\n"
    assert "loading" in err
    assert "%" in err
    assert "\n" not in err
    assert err.split("\r")[-1].strip() == ""


def test_warnings_of_the_package_are_said_once_and_kept(sana: Sana, monkeypatch: pytest.MonkeyPatch) -> None:
    import logging
    import warnings
    from types import SimpleNamespace

    def run(words: list[str], terminal: Terminal) -> int:
        warnings.simplefilter("always")
        for _ in range(2):
            warnings.warn("seams", stacklevel=1)
            logging.getLogger("sana.engine").warning("tiles of %d", 512)
        logging.getLogger("sana.engine").info("secret")
        assert terminal.warnings == ["seams", "tiles of 512"]
        return 0

    monkeypatch.setattr("importlib.import_module", lambda name: SimpleNamespace(run=run))
    assert sana("models").err == "warning: seams\nwarning: tiles of 512\n"
    assert sana("models", "-v").err.endswith("secret\n")
    assert sana("models", "-q").err == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (0.44, "0.4 s"), (59, "59 s"), (90, "1.5 min"), (7200, "2.0 h"), (2e5, "2.3 days")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_control_characters_from_elsewhere_do_not_reach_the_terminal() -> None:
    assert printable("a\x1b[2J\x07b\nc\t猫") == "a\ufffd[2J\ufffdb\nc\t猫"


def test_a_bar_is_only_for_terminals() -> None:
    assert Progress(Terminal(), 3).bar is None
