"""`sana doctor`: what this computer has for drawing, and for each thing amiss the command that mends it."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import sana
from sana.apps.cli import arguments
from sana.apps.cli.checks import CHECKS, Answers, Check, hub_answer
from sana.apps.cli.output import Terminal
from sana.errors import InvalidInput

USAGE = "sana doctor [options]"
DESCRIPTION = """\
Check this computer: packages, processor, memory, disk, hub and cache. The
built-in model draws a picture, which is not kept. Each line that is not good
comes with a command that mends it. The exit code is 0 if pictures can be drawn."""

STAGES = (("torch", "transformers", "drawing"), ("torchvision",))
"""What is tried in programs of their own, next to each other; a broken torchvision must not spoil the others."""
LONGEST_PROBE = 180.0
HUB_TIMEOUT = 3.0


def run(words: Sequence[str], terminal: Terminal) -> int:
    """Check everything, print the list, and tell by the exit code whether pictures can be drawn."""
    extra, _ = arguments.read(words, (), usage=USAGE, description=DESCRIPTION)
    if extra:
        raise InvalidInput(f"`sana doctor` checks everything at once and takes no '{extra[0]}'.")
    with terminal.count(1, text="trying the packages, the hub and a picture"):
        answers = ask()
    found = [check for look in CHECKS for check in look(answers)]
    can_draw = "facts" in answers.get("drawing", {})
    for check in found:
        for line, colour in _lines(check):
            terminal.result(line, colour=colour)
    amiss = sum(check.state != "good" for check in found)
    verdict = "Pictures can be drawn." if can_draw else "No picture can be drawn: begin with the lines marked ✗."
    terminal.result(f"\n{verdict} {len(found) - amiss} of {len(found)} checks are good.")
    terminal.document({"can_draw": can_draw, "checks": [check._asdict() for check in found], "probes": answers})
    return 0 if can_draw else 1


def ask() -> Answers:
    """Return stage -> what it said, having tried all heavy packages and the hub at the same time."""
    answers: Answers = {}
    threads = [threading.Thread(target=_ask_program, args=(names, answers), daemon=True) for names in STAGES]
    hub = threading.Thread(target=lambda: answers.update(hub=hub_answer(HUB_TIMEOUT)), daemon=True)
    for thread in (*threads, hub):
        thread.start()
    for thread in threads:
        thread.join()
    hub.join(HUB_TIMEOUT)  # a name server may take longer than any time-out of a connection
    answers.setdefault("hub", {"error": f"no answer within {HUB_TIMEOUT:g} seconds"})
    return dict(answers)


def _ask_program(names: Sequence[str], answers: Answers) -> None:
    """Run the probe in a program of its own and collect its lines; a stage without one ended the program."""
    package = str(Path(sana.__file__).parents[1])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-P", "-m", "sana.apps.cli.probe", *names]
    out, end = "", "it could not be started"
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=LONGEST_PROBE,
            env={**os.environ, "PYTHONPATH": path},
            check=False,
        )
        out, end = done.stdout.decode(errors="replace"), f"its program ended with code {done.returncode}"
    except subprocess.TimeoutExpired as late:
        out, end = (late.stdout or b"").decode(errors="replace"), f"no answer within {LONGEST_PROBE:g} seconds"
    except OSError as error:
        end = f"no program could be started ({error.strerror})"
    for line in out.splitlines():
        try:
            answer = json.loads(line)
            answers[str(answer.pop("stage"))] = answer
        except (ValueError, KeyError, AttributeError):
            continue  # a package's own chatter
    for name in names:
        answers.setdefault(name, {"error": end})


def _lines(check: Check) -> list[tuple[str, str]]:
    """Return the lines of a check and their colours."""
    mark, colour = {"good": ("✓", "green"), "amiss": ("!", "yellow"), "broken": ("✗", "red")}[check.state]
    lines = [(f"{mark} {check.name:<13} {check.fact}", colour)]
    return [*lines, (f"  {'':<13} to mend it: {check.mend}", "")] if check.mend else lines
