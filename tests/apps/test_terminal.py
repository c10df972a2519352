"""The streams of the command under strain: closed, full, narrow, ASCII; and text that wants to give orders."""

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import shlex
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from command import Sana

import sana as package
from sana.apps.cli import main
from sana.apps.cli.output import Terminal, printable

ROOT = Path(package.__file__).parents[1]
HOSTILE = "\x1b[2J\x1b]0;title\x07\x9b31m\r\u202e"


def call(command: str, **settings: str) -> "subprocess.CompletedProcess[bytes]":
    """Run a line of bash, in which $SANA is the command."""
    command_line = f"{shlex.quote(sys.executable)} -m sana"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LC_ALL": "C.UTF-8", "SANA": command_line, **settings}
    return subprocess.run(["bash", "-c", command], capture_output=True, timeout=120, check=False, env=environment)


def on_a_terminal(columns: int, *words: str, **settings: str) -> tuple[int, str]:
    """Run the command on a terminal of its own and return its exit code and all that it showed."""
    inner, outer = pty.openpty()
    fcntl.ioctl(outer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", **settings}
    environment.pop("COLORTERM", None)
    process = subprocess.Popen(
        [sys.executable, "-m", "sana", *words], stdin=outer, stdout=outer, stderr=outer, env=environment
    )
    os.close(outer)
    shown, end = b"", time.monotonic() + 120
    while time.monotonic() < end:
        if select.select([inner], [], [], 0.2)[0]:
            with contextlib.suppress(OSError):  # Linux's way to say that the other end is closed
                if piece := os.read(inner, 65536):
                    shown += piece
                    continue
            break
    os.close(inner)
    return process.wait(timeout=30), shown.decode(errors="replace")


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("$SANA models > /dev/full", 1),
        ("$SANA models --json > /dev/full", 1),
        ("$SANA models --events > /dev/full", 1),
        ("$SANA > /dev/full", 1),
        ("$SANA models 2> /dev/full", 0),
        ("$SANA nothing-x --steps 0 2> /dev/full", 2),
        ("$SANA models >&-", 0),
        ("$SANA models 2>&-", 0),
        ("$SANA models >&- 2>&-", 0),
        ("$SANA x --steps 0 2>&- <&-", 2),
        ("set -o pipefail; $SANA x --steps 0 2> >(true)", 2),
        ("$SANA models | true; exit ${PIPESTATUS[0]}", None),
        ("$SANA models --json | head -c 1 > /dev/null; exit ${PIPESTATUS[0]}", None),
    ],
)
def test_streams_that_are_closed_or_full(command: str, code: int | None) -> None:
    done = call(command)
    assert done.returncode == code if code is not None else done.returncode in (0, 1)
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr
    assert len(done.stderr.splitlines()) <= 1


def test_a_file_never_gets_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    code = "from sana.apps.cli import main; main(['models']); import os; f = open('x', 'w'); os._exit(f.fileno())"
    done = call(f'cd {tmp_path}; {sys.executable} -c "{code}" <&- >&- 2>&-')
    assert done.returncode > 2


def test_a_broken_stderr_does_not_stop_the_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Broken:
        encoding = "utf-8"

        def write(self, text: str) -> int:
            raise BrokenPipeError

        def flush(self) -> None:
            raise BrokenPipeError

        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Broken())
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    terminal.say("nobody hears it")
    terminal.warn("nor this")
    with terminal.count(3) as progress:
        for _ in range(3):
            progress.advance("step")
    assert progress.done == 3
    assert terminal.warnings == ["nor this"]


def test_text_from_elsewhere_gives_a_terminal_no_orders(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal(verbose=True)
    terminal.say(HOSTILE)
    terminal.warn(HOSTILE)
    terminal.error(HOSTILE)
    try:
        raise ValueError(HOSTILE)
    except ValueError as error:
        terminal.explain(error)
    err = capsys.readouterr().err
    assert "[2J" in err
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", err)


def test_results_are_made_harmless_only_where_a_person_reads_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Terminal().result("a\x1b[2J.png")
    assert capsys.readouterr().out == "a\x1b[2J.png\n"  # a program needs the very name
    sys.stdout.isatty = lambda: True  # type: ignore[method-assign]
    Terminal().result("a\x1b[2J.png")
    assert capsys.readouterr().out == "a\ufffd[2J.png\n"


def test_json_has_no_control_characters_and_no_lone_surrogates(capsys: pytest.CaptureFixture[str]) -> None:
    value = {"prompt": f"猫{HOSTILE}\udcff"}
    for terminal in (Terminal(json=True), Terminal(events=True)):
        terminal.document(value)
        text = capsys.readouterr().out
        assert "猫" in text
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff]", text)
        assert json.loads(text)["prompt"] == value["prompt"]


def test_names_with_escapes_are_harmless_in_errors(sana: Sana) -> None:
    for words in (("x", "-m", f"./{HOSTILE}"), ("info", HOSTILE), (f"--{HOSTILE}",), ("models", HOSTILE)):
        said = sana(*words)
        assert said.code in (2, 3)
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", said.err)


def test_events_are_one_json_object_a_line(sana: Sana) -> None:
    said = sana("models", "nano", "--events")
    assert json.loads(said.out)["event"] == "done"
    wrong = sana("models", "nono", "--events")
    event = json.loads(wrong.out)
    assert (wrong.code, event["event"], event["exit_code"]) == (3, "error", 3)
    assert "Did you mean 'nano'?" in event["message"]


def test_drawing_tells_what_happens_as_events(sana: Sana, tiny_folder: Path) -> None:
    said = sana("a fox", "-m", str(tiny_folder), "--steps", "2", "--seed", "5-6", "--events", "-q")
    events = [json.loads(line) for line in said.out.splitlines()]
    names = [event["event"] for event in events]
    assert said.code == 0, said.err
    assert names[:2] == ["loading", "loaded"]
    assert names[-1] == "done"
    assert names.count("image") == 2
    assert names.count("done") == 1
    assert names.count("step") >= 2
    assert {"file", "seed", "seconds"} <= set(events[names.index("image")])
    assert events[-1]["files"] == ["a-fox-5.png", "a-fox-6.png"]


def test_warnings_are_events_and_nothing_follows_the_last_one(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal(events=True, quiet=True)
    terminal.warn("seams")
    terminal.warn("seams")
    terminal.document({"files": []})
    terminal.event("step", step=1)
    terminal.document({"files": []})
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert events == [{"event": "warning", "message": "seams"}, {"event": "done", "files": []}]


def test_json_and_events_are_one_too_many(sana: Sana) -> None:
    said = sana("models", "--json", "--events")
    assert said.code == 2
    assert json.loads(said.out)["error"]["exit_code"] == 2
    assert "Give one of them." in said.err


@pytest.mark.parametrize("columns", ["1", "20", "80", "500", "many", "-3"])
def test_help_in_any_width(sana: Sana, monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    for words in (("--help",), ("models", "--help"), ("train", "--help"), ("models", "nano")):
        assert sana(*words).code == 0


@pytest.mark.parametrize("verb", ["", "generate", "models", "doctor", "completion", "train", "evaluate"])
def test_help_fits_80_columns(sana: Sana, monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    said = sana(*([verb] if verb else []), "--help")
    assert [line for line in said.out.splitlines() if len(line) > 80] == []


def test_help_needs_no_torch() -> None:
    for verb in ("evaluate", "train", "generate", "doctor", "completion"):
        code = (
            f"import sys; from sana.apps.cli import main; main(['{verb}', '--help']);"
            "print('HEAVY', *({'torch', 'transformers'} & set(sys.modules)))"
        )
        assert call(f'{sys.executable} -c "{code}"').stdout.decode().splitlines()[-1] == "HEAVY", verb


def test_a_prompt_in_utf8_where_the_environment_says_ascii_is_told_what_to_set() -> None:
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = call("$SANA 'a 🐟' --steps 0", **plain)
    assert done.returncode == 2
    assert b"PYTHONUTF8=1" in done.stderr
    assert b"--steps" in call("$SANA 'a fish' --steps 0", **plain).stderr
    done = call("$SANA 'a 🐟' --steps 0", LC_ALL="C")  # Python takes UTF-8 by itself here
    assert b"--steps must be" in done.stderr


def test_colours_only_for_a_person_who_wants_them() -> None:
    words = ("-c", "from sana.apps.cli.output import Terminal; Terminal().result('✓ torch', colour='green')")

    def shown(**settings: str) -> str:
        inner, outer = pty.openpty()
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "NO_COLOR": "", **settings}
        subprocess.run([sys.executable, *words], stdout=outer, env=environment, check=True, timeout=60)
        os.close(outer)
        text = os.read(inner, 1000).decode()
        os.close(inner)
        return text.strip()

    assert shown() == "\x1b[32m✓\x1b[0m torch"
    assert shown(NO_COLOR="1") == "✓ torch"
    assert shown(TERM="dumb") == "✓ torch"
    assert shown(PYTHONIOENCODING="ascii") == "\x1b[32m+\x1b[0m torch"


@pytest.mark.slow
@pytest.mark.parametrize("columns", [30, 0])
def test_a_narrow_terminal_shows_a_bar_of_one_line(tmp_path: Path, columns: int) -> None:
    words = ("a red fish", "--steps", "6", "-o", str(tmp_path / "a.png"))
    code, shown = on_a_terminal(columns, *words, COLUMNS="30")
    assert code == 0
    bars = [part for part in re.split(r"[\r\n]", shown) if "% |" in part]
    assert bars
    assert max(map(len, bars)) <= 30


def test_printable_keeps_what_people_write() -> None:
    text = "a 猫, 👩‍👩‍👧 and\tcafé\n"
    assert printable(text) == text
    assert printable("a\u202eb") == "a\ufffdb"


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (("x", "--stepz", "3"), "--steps"),
        (("x", "--neg", "y"), "--negative-prompt"),
        (("x", "--dtype", "fp16"), "float16"),
        (("x", "--sampler", "euler"), "flow-euler"),
        (("x", "--metadata", "ful"), "full"),
        (("x", "-m", "nono"), "nano"),
        (("x", "-m", "SANA-0.6B-521"), "sana-0.6b-512"),
        (("evaluate", "genval"), "geneval"),
        (("doctr",), "doctor"),
        (("models", "--jsn"), "--json"),
    ],
)
def test_slips_of_the_fingers_are_understood(sana: Sana, words: tuple[str, ...], meant: str) -> None:
    said = sana(*words)
    assert said.code in (2, 3)
    assert f" Did you mean '{meant}'?" in said.err


def test_a_flag_behind_two_hyphens_is_no_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--", "--json"]) == 3
    assert "There is no model '--json'" in capsys.readouterr().err
