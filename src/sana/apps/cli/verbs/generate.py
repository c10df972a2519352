"""`sana generate`, the verb that needs not be named: parse, load, draw, save."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sana.apps.cli.drawing import Drawing, Report
from sana.apps.cli.machine import introduce
from sana.apps.cli.names import check_files, open_to_all
from sana.apps.cli.order import Order, named_as_flags, parse
from sana.apps.cli.output import Terminal
from sana.errors import InvalidInput

if TYPE_CHECKING:
    from sana.cards import Card


def run(words: Sequence[str], terminal: Terminal) -> int:
    """Carry out the verb."""
    with named_as_flags():
        order = parse(words)
        card = order.machine.card
        if card is not None:
            order.fitted(card)
        if order.manner.print_config:
            from sana.apps.cli.verbs.config import print_config

            return print_config(order, terminal)
        _check_place(order, terminal)
        if order.manner.dry_run:
            from sana.apps.cli.dry_run import tell

            return tell(order, terminal)
        if card is not None:
            _introduce(card, order, terminal)
        parts, seconds = order.machine.load(terminal)
        if card is None and parts.card is not None:
            _introduce(parts.card, order, terminal, parts.name)
        report = Report(timings={"load": seconds}, warnings=terminal.warnings)
        with order.machine.in_use(parts):
            Drawing(parts, order, report, terminal).run()
    terminal.document(report.to_dict())
    return 0


def _check_place(order: Order, terminal: Terminal) -> None:
    """Refuse places that cannot be written to, before anything is loaded, and tell which are open to others."""
    writing, model = order.writing, order.machine.folder
    if model is not None and open_to_all(model):
        terminal.warn(f"Every user of this computer can replace the model in {model.absolute()}.")
    if order.to_stdout:
        if terminal.json or terminal.events:
            raise InvalidInput("`output` - and JSON would both go to stdout. Drop one of them.")
        if sys.stdout.isatty() and not order.manner.dry_run:
            raise InvalidInput("`output` - writes the bytes of a PNG, which a terminal cannot show. Pipe them on.")
        return
    force = writing.force or writing.skip_existing
    check_files(order.files, force=force, make=not order.manner.dry_run)
    folder = order.files[0].parent
    if folder.is_symlink():
        terminal.say(f"{folder} is a link; the pictures go to {folder.resolve()}.")
    if open_to_all(folder):
        terminal.warn(f"Every user of this computer can replace files in {folder.absolute()}.")


def _introduce(card: "Card", order: Order, terminal: Terminal, name: str | None = None) -> None:
    introduce(card, terminal, name)
    if "zh" not in card.languages and any(
        "\u4e00" <= mark <= "\u9fff" for job in order.jobs for mark in job.request.prompt
    ):
        named = name or card.name
        terminal.warn(f"{named} was not trained on Chinese prompts. Say it in English, or use another model.")
