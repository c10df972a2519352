"""The command `sana`: find the verb, run it, turn what goes wrong into one sentence and an exit code."""

import contextlib
import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NamedTuple

import sana
from sana.apps.cli.output import Terminal
from sana.errors import InvalidInput, SanaError

INTERRUPTED = 130


class Verb(NamedTuple):
    """A verb: the module whose `run(words, terminal)` carries it out, and what it does."""

    module: str
    summary: str


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; `argv` is everything behind the program's name."""
    words = list(sys.argv[1:] if argv is None else argv)
    flags = set(words[: words.index("--")] if "--" in words else words)
    terminal = Terminal(
        json="--json" in flags, quiet=bool(flags & {"-q", "--quiet"}), verbose=bool(flags & {"-v", "--verbose"})
    )
    try:
        with terminal.listening():
            return _run(words, terminal)
    except SystemExit as stop:  # the parser's own way to end after --help
        return int(stop.code or 0)
    except BrokenPipeError:
        _silence_stdout()
        return 1
    except KeyboardInterrupt as stop:
        return _fail(terminal, stop, f"Interrupted. {stop}".strip(), INTERRUPTED)
    except SanaError as error:
        return _fail(terminal, error, str(error), error.exit_code)
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        return _fail(terminal, error, f"{error.strerror or error}{where}.", 1)
    except Exception as error:
        text = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
        return _fail(terminal, error, f"Unexpected error ({text}). Run the command with -v for the traceback.", 1)


def _run(words: list[str], terminal: Terminal) -> int:
    if not words:
        terminal.result(FRONT_PAGE)
        return 0
    first, rest = words[0], words[1:]
    if first in ("-h", "--help", "help"):
        terminal.result(_help())
        return 0
    if first in ("-V", "--version"):
        terminal.result(f"sana {sana.__version__}")
        return 0
    if first not in VERBS:
        _check_typo(first)
        first, rest = "generate", words
    code: int = importlib.import_module(VERBS[first].module).run(rest, terminal)
    return code


def _check_typo(word: str) -> None:
    """Refuse a single word that looks like a mistyped verb; it would be drawn otherwise."""
    close = difflib.get_close_matches(word.lower(), VERBS, n=1, cutoff=0.8)
    if close:
        raise InvalidInput(f"There is no verb '{word}'. Did you mean '{close[0]}'? To draw it: sana generate {word}")


def _fail(terminal: Terminal, error: BaseException, text: str, code: int) -> int:
    """Tell the error, complete the JSON document, and return the exit code."""
    try:
        if terminal.verbose:
            traceback.print_exception(error)
        terminal.error(text)
        terminal.document({**terminal.draft, "error": {"message": text, "exit_code": code}})
    except BrokenPipeError:
        _silence_stdout()
    return code


def _silence_stdout() -> None:
    """Let the interpreter's last flush of a closed pipe go nowhere."""
    with contextlib.suppress(OSError, ValueError):  # stdout may be no real file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _help() -> str:
    verbs = "\n".join(f"  {name:<10} {verb.summary}" for name, verb in VERBS.items())
    return HELP.format(version=sana.__version__, verbs=verbs)


FRONT_PAGE = f"""\
sana {sana.__version__}: pictures from words, with SANA models, on this computer.

Try:
  sana "a red fish above a yellow boat"   draw a picture into this folder
  sana info PICTURE.png                   show how a picture was made
  sana models                             list the models

The built-in model is a toy: it shows that everything works, not SANA's quality.
Help: sana --help, and sana VERB --help for each verb."""

HELP = """\
sana {version}: pictures from words, with SANA models, on this computer.

usage: sana "PROMPT" [options]     the same as: sana generate "PROMPT" [options]
       sana VERB [arguments] [options]

verbs:
{verbs}

`sana VERB --help` lists the options of a verb; `sana generate --help` those of a picture.
With --json every verb prints one JSON document. Results go to stdout, all else to stderr.

exit codes: 0 done, 1 unexpected error, 2 bad input, 3 model or file not found or broken,
            4 out of memory, 6 only some of the pictures were made, 130 interrupted"""

VERBS = {
    "generate": Verb("sana.apps.cli.generate", "draw pictures; what happens when no verb is given"),
    "info": Verb("sana.apps.cli.info", "show how a picture was made, without loading a model"),
    "models": Verb("sana.apps.cli.models", "list the models, or tell all about one"),
    "train": Verb("sana.apps.cli.train", "train from recipes; goes on where it was stopped"),
    "evaluate": Verb("sana.apps.cli.evaluate", "measure a model and print the table"),
}
