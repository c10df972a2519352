"""`sana batch`: a whole file of prompts, in one run or many, on one computer or several."""

import dataclasses
from collections.abc import Sequence

from sana.apps.cli.manifest import NAME, Manifest
from sana.apps.cli.options import BATCH_GROUPS
from sana.apps.cli.order import Order, named_as_flags, parse
from sana.apps.cli.output import Terminal
from sana.apps.cli.roads import BATCH
from sana.apps.cli.shards import name_batch, share
from sana.apps.cli.values import Shard
from sana.apps.cli.verbs.generate import carry_out
from sana.errors import InvalidInput


def run(words: Sequence[str], terminal: Terminal) -> int:
    """Carry out the verb."""
    with named_as_flags():
        order = parse(words, BATCH, name_batch)
        if order.axes:
            raise InvalidInput("A batch has no `sweep`, which a file of settings or a variable sets. Drop it there.")
        shard: Shard | None = order.others.get("shard")
        whole = len(order.seeds)
        order = _shared(order, shard)
        if not order.jobs:
            terminal.say(f"The file has fewer pictures ({whole}) than there are shares, and {shard} has none.")
            terminal.document({"files": [], "seeds": [], "shard": str(shard)})
            return 0
        if shard is not None:
            terminal.say(f"Share {shard} has {len(order.seeds)} of {whole} pictures.")
        end = f"-{shard.number}-of-{shard.of}" if shard is not None else ""
        return carry_out(order, terminal, Manifest(order.files[0].parent / f"{NAME}{end}.jsonl"))


def _shared(order: Order, shard: Shard | None) -> Order:
    """Return the order with the pictures of a share; what is there is left out, unless it is to be drawn again."""
    writing = dataclasses.replace(order.writing, skip_existing=not order.writing.force)
    jobs = order.jobs if shard is None else share(order.jobs, shard)
    return dataclasses.replace(order, jobs=jobs, writing=writing)


GROUPS = BATCH_GROUPS
