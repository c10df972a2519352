"""`sana edit`: a picture to begin with; from there on the road of `sana generate`."""

from collections.abc import Sequence

from sana.apps.cli.options import EDIT_GROUPS
from sana.apps.cli.order import named_as_flags, parse
from sana.apps.cli.output import Terminal
from sana.apps.cli.roads import EDIT
from sana.apps.cli.verbs.generate import carry_out


def run(words: Sequence[str], terminal: Terminal) -> int:
    """Carry out the verb."""
    with named_as_flags():
        return carry_out(parse(words, EDIT), terminal)


GROUPS = EDIT_GROUPS
