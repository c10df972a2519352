"""The command `sana`: find the verb, run it, turn what goes wrong into one sentence and an exit code."""

import contextlib
import difflib
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import NamedTuple

import sana
from sana.apps.cli.output import Terminal, silence_stdout
from sana.errors import InvalidInput, SanaError

INTERRUPTED = 130
LONGEST_ERROR = 600
"""Characters; what the user typed is repeated in some errors, and may be a whole book."""


class Verb(NamedTuple):
    """A verb: the module whose `run(words, terminal)` carries it out, and what it does."""

    module: str
    summary: str


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; `argv` is everything behind the program's name."""
    words = list(sys.argv[1:] if argv is None else argv)
    _fill_gaps()
    terminal = _terminal(words)
    try:
        with terminal.listening():
            return _run(words, terminal)
    except SystemExit as stop:  # the parser's own way to end after --help
        return int(stop.code or 0)
    except BrokenPipeError:
        silence_stdout()
        return 1
    except KeyboardInterrupt as stop:
        if argv is None:  # a process of its own, which a second one ends at once, without a word
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        return _fail(terminal, stop, f"Interrupted. {stop}".strip(), getattr(stop, "exit_code", INTERRUPTED))
    except SanaError as error:
        return _fail(terminal, error, str(error), error.exit_code)
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        return _fail(terminal, error, f"{error.strerror or error}{where}.", 1)
    except Exception as error:
        text = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
        return _fail(terminal, error, f"Unexpected error ({text}). Run the command with -v for the traceback.", 1)


def _terminal(words: Sequence[str]) -> Terminal:
    """Return the streams as the flags want them, which must be known before anything can go wrong."""
    flags = set(words[: words.index("--")] if "--" in words else words)
    return Terminal(
        json="--json" in flags,
        events="--events" in flags and "--json" not in flags,
        quiet=bool(flags & {"-q", "--quiet"}),
        verbose=bool(flags & {"-v", "--verbose"}),
        thumbnail=False if "--no-thumbnail" in flags else True if "--thumbnail" in flags else None,
    )


def _fill_gaps() -> None:
    """Open the standard streams that the caller closed, so that no file gets their number, and their output."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


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
        if not first.startswith("-"):
            _check_typo(first)
        first, rest = "generate", words
    if first == "generate":
        _check_encoding(rest)
    code: int = importlib.import_module(VERBS[first].module).run(rest, terminal)
    return code


def _check_typo(word: str) -> None:
    """Refuse a single word that looks like a mistyped verb; it would be drawn otherwise."""
    close = difflib.get_close_matches(word.lower(), VERBS, n=1, cutoff=0.8)
    close = close or [verb for verb in VERBS if word.lower() in _swapped(verb)]
    if close:
        raise InvalidInput(f"There is no verb '{word}'. Did you mean '{close[0]}'? To draw it: sana generate {word}")


def _swapped(word: str) -> set[str]:
    """Return what becomes of a word when two neighbours among its letters change places."""
    return {word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in range(len(word) - 1)}


def _check_encoding(words: Sequence[str]) -> None:
    """Refuse a prompt in UTF-8 where Python was told that nothing is: its files could not be named.

    Raises:
        InvalidInput: saying how to tell it otherwise.
    """
    encoding = sys.getfilesystemencoding()
    for word in words:
        with contextlib.suppress(UnicodeError):
            if encoding.startswith("utf") or os.fsencode(word).decode() == word:
                continue
            raise InvalidInput(
                f"The words are in UTF-8, but the environment says {encoding}. Run it again with PYTHONUTF8=1 set."
            )


def _fail(terminal: Terminal, error: BaseException, text: str, code: int) -> int:
    """Tell the error, complete the JSON document, and return the exit code."""
    text = text if len(text) <= LONGEST_ERROR else f"{text[:400]} ... {text[-150:]}"
    try:
        terminal.explain(error)
        terminal.error(text, code)
    except OSError:  # stdout is closed, or full
        silence_stdout()
    return code


def _help() -> str:
    verbs = "\n".join(f"  {name:<11} {verb.summary}" for name, verb in VERBS.items())
    return HELP.format(version=sana.__version__, verbs=verbs)


FRONT_PAGE = f"""\
sana {sana.__version__}: pictures from words, with SANA models, on this computer.

  sana "a red fish above a yellow boat"    draw a picture into this folder
  sana info PICTURE.png                    show how a picture was made
  sana models                              list the models: sizes, terms, limits

The built-in model needs no network. It is a toy: it shows that everything works,
not SANA's quality. For that: sana -m sana-0.6b-512 "PROMPT" (says what it loads).
Is something amiss? sana doctor    All else: sana --help, sana VERB --help"""

HELP = """\
sana {version}: pictures from words, with SANA models, on this computer.

usage: sana "PROMPT" [options]     the same as: sana generate "PROMPT" [options]
       sana VERB [arguments] [options]

verbs:
{verbs}

`sana VERB --help` lists the options of a verb, `sana generate --help` those of
a picture. Results go to stdout, all else to stderr; with --json every verb
prints one JSON document, with --events what happens as JSON, line by line.

exit codes: 0 done, 1 unexpected error, 2 bad input, 3 model or file not found
            or broken, 4 out of memory, 6 only some of the pictures were made,
            75 training ended early, saved: run it again, 130 interrupted"""

VERBS = {
    "generate": Verb("sana.apps.cli.verbs.generate", "draw pictures; what happens when no verb is given"),
    "edit": Verb("sana.apps.cli.verbs.edit", "change a picture, a part of it, or draw more around it"),
    "batch": Verb("sana.apps.cli.verbs.batch", "draw a file of prompts; goes on where it was stopped"),
    "info": Verb("sana.apps.cli.verbs.info", "show how a picture was made, without loading a model"),
    "replay": Verb("sana.apps.cli.verbs.replay", "draw a picture again and compare every pixel"),
    "decode": Verb("sana.apps.cli.verbs.decode", "make pictures from latents that were saved"),
    "models": Verb("sana.apps.cli.verbs.models", "list the models; fetch, check, remove, grow or prune one"),
    "convert": Verb("sana.apps.cli.verbs.convert", "turn a checkpoint into another form"),
    "lora": Verb("sana.apps.cli.verbs.lora", "tell about an adapter, convert it, or merge it into a model"),
    "dataset": Verb("sana.apps.cli.verbs.dataset", "check, pack, caption, score and encode a data set, look at it"),
    "config": Verb("sana.apps.cli.verbs.config", "show every setting and where it comes from"),
    "doctor": Verb("sana.apps.cli.verbs.doctor", "check this computer, and say how to mend what is amiss"),
    "completion": Verb("sana.apps.cli.verbs.completion", "print a script that completes words in a shell"),
    "train": Verb("sana.apps.cli.verbs.train", "train from recipes; goes on where it was stopped"),
    "evaluate": Verb("sana.apps.cli.verbs.evaluate", "measure a model and print the table"),
    "angles": Verb("sana.apps.cli.verbs.angles", "search the angles of a distilled model, and keep them with it"),
}
