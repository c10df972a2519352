"""`sana generate`, the verb that needs not be named: parse, load, draw, save."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sana.apps.cli.drawing import Drawing
from sana.apps.cli.machine import introduce
from sana.apps.cli.manifest import Manifest
from sana.apps.cli.names import check_files, open_to_all, tell_place
from sana.apps.cli.order import Order, named_as_flags, parse
from sana.apps.cli.output import Terminal
from sana.apps.cli.report import Report
from sana.apps.cli.settings import FLAG
from sana.cards import CARDS
from sana.errors import InvalidInput

if TYPE_CHECKING:
    from sana.cards import Card


def run(words: Sequence[str], terminal: Terminal) -> int:
    """Carry out the verb."""
    with named_as_flags():
        return carry_out(parse(words), terminal)


def carry_out(order: Order, terminal: Terminal, manifest: Manifest | None = None) -> int:
    """Do what was ordered, or only tell about it, and return the exit code."""
    card = order.machine.card
    if card is not None:
        order.fitted(card)
    _check_controls(order, card)
    if order.manner.print_config:
        from sana.apps.cli.verbs.config import print_config

        return print_config(order, terminal)
    _check_place(order, terminal)
    if order.manner.dry_run:
        from sana.apps.cli.dry_run import tell

        return tell(order, terminal)
    if card is not None:
        _introduce(card, order, terminal)
    parts, seconds = order.machine.load(terminal, drawing=order.fitted)
    if card is None and parts.card is not None:
        _introduce(parts.card, order, terminal, parts.name)
    report = Report(timings={"load": seconds}, warnings=terminal.warnings)
    with order.machine.in_use(parts):
        Drawing(parts, order, report, terminal, manifest).run()
    terminal.document(report.to_dict())
    return 0


def _check_controls(order: Order, card: "Card | None") -> None:
    """Refuse control pictures that nothing would follow, and a control network that has nothing to follow.

    Raises:
        InvalidInput: naming the flag.
    """
    wanted, named = any(job.request.controls for job in order.jobs), order.machine.controlnet
    if named is not None and not wanted and order.settings.origins.get("controlnet") == FLAG:
        raise InvalidInput("`controlnet` has no effect without `controls`. Drop it, or say what to follow.")
    if not wanted or named is not None or card is None or card.controlnet is not None:
        return
    width = card.transformer.inner_dim
    known = (one for one in CARDS.values() if one.controlnet is not None)
    networks = sorted(known, key=lambda one: one.transformer.inner_dim != width)  # one that fits comes first
    raise InvalidInput(
        f"{card.name} has no control network for `controls`. Name one with `controlnet`, such as {networks[0].name}."
    )


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
    tell_place(order.files[0].parent, "the pictures go", terminal)


def _introduce(card: "Card", order: Order, terminal: Terminal, name: str | None = None) -> None:
    introduce(card, terminal, name)
    if "zh" not in card.languages and any(
        "\u4e00" <= mark <= "\u9fff" for job in order.jobs for mark in job.request.prompt
    ):
        named = name or card.name
        terminal.warn(f"{named} was not trained on Chinese prompts. Say it in English, or use another model.")
