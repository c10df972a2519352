"""`sana config`: every setting of `sana generate`, its value and where that comes from; and `--print-config`."""

from collections.abc import Sequence
from typing import Any

from sana.apps.cli import arguments, settings
from sana.apps.cli.machine import Machine
from sana.apps.cli.names import STDOUT
from sana.apps.cli.notation import TEXTS
from sana.apps.cli.options import EDIT_GROUPS, NOT_HERE, Manner, keys
from sana.apps.cli.order import Order, named_as_flags
from sana.apps.cli.output import Terminal, printable
from sana.apps.cli.settings import FLAG, Settings, to_toml
from sana.apps.cli.values import Shape, seeds_text
from sana.cards import CARDS, Card
from sana.errors import InvalidInput

USAGE = "sana config [options of sana generate]"
DESCRIPTION = """\
Show every setting of `sana generate`, its value and where that comes from, the last one winning:

  the model's card, the user's file, --config FILE, variables such as SANA_STEPS, flags

A file is TOML, with keys named as the flags: steps = 8, size = "16:9", seed = [3, 17]."""
FROM_CARD = ("size", "steps", "guidance", "sampler")


def run(words: Sequence[str], terminal: Terminal) -> int:
    """Print the table, or with --print-config the settings as a file."""
    with named_as_flags():
        prompts, given = arguments.read(words, EDIT_GROUPS, usage=USAGE, description=DESCRIPTION, refused=NOT_HERE)
        if prompts:
            raise InvalidInput(
                "`sana config` takes options only. For one picture's settings: sana PROMPT --print-config"
            )
        manner, known = Manner(**arguments.take(Manner, given)), keys()
        flags = {name: value for name, value in given.items() if name in known}
        own = settings.gather(flags, manner.config, known)
        with own.told():
            machine = Machine(**arguments.take(Machine, dict(own.values)))
    if manner.print_config:
        terminal.document({"config": to_toml(_plain(own.values)), "settings": own.values and _json(own.values)})
        terminal.result(to_toml(_plain(own.values)).rstrip("\n"))
        return 0
    rows = _rows(own, machine)
    files = [str(path) for path in settings.files(manner.config)]
    document = {name: {"value": value, "origin": origin} for name, (value, origin) in rows.items()}
    terminal.document({"settings": document, "files": files, "user_file": str(settings.user_file() or "")})
    terminal.result(_table(rows))
    terminal.say(f"Your own file: {settings.user_file() or 'no home folder'}{'' if files else ' (there is none)'}")
    return 0


def print_config(order: Order, terminal: Terminal) -> int:
    """Print an order as a file that, given to --config, orders the same.

    Raises:
        InvalidInput: its prompts came from stdin, which cannot be read again.
    """
    values = dict(order.settings.values)
    if values.get("prompt_file") == STDOUT:
        raise InvalidInput("`print_config` cannot name stdin as `prompt_file`. Write the prompts into a file first.")
    text = to_toml(_plain({name: values[name] for name in keys() if name in values}))
    card = order.machine.card
    left = {} if card is None else {n: v for n, v in _of_card(card).items() if not set(_names(n)) & set(values)}
    comment = "".join(f"# {line}\n" for line in to_toml(left).splitlines())
    terminal.document({"config": text, "settings": _json(values)})
    terminal.result(
        (text + (f"\n# as the card of {card.name} has it:\n{comment}" if card and left else "")).rstrip("\n")
    )
    return 0


def _plain(values: Any) -> dict[str, Any]:
    """Return settings with seeds written short."""
    ready = dict(values)
    seeds = ready.get("seed")
    if isinstance(seeds, list):
        ready["seed"] = seeds[0] if len(seeds) == 1 else seeds_text(seeds)
    return ready


def _json(values: Any) -> dict[str, Any]:
    return {name: _as_json(value) for name, value in _plain(values).items()}


def _as_json(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_as_json(one) for one in value]
    if type(value) in TEXTS:
        return TEXTS[type(value)](value)
    return str(value) if isinstance(value, Shape) else value


def _names(name: str) -> tuple[str, ...]:
    return (name, "width", "height") if name == "size" else (name,)


def _of_card(card: Card) -> dict[str, Any]:
    size = f"{card.base_size}x{card.base_size}"
    return {"size": size, "steps": card.steps, "guidance": card.guidance, "sampler": card.sampler}


def _rows(own: Settings, machine: Machine) -> dict[str, tuple[Any, str]]:
    """Return name -> value and origin of every setting; `None` is what each model, or chance, decides."""
    card = machine.card or CARDS.get(machine.model)
    rows: dict[str, tuple[Any, str]] = {}
    for name, option in keys().items():
        if name in own.values:
            place = own.origins[name]
            rows[name] = (_json(own.values)[name], "a flag" if place == FLAG else place)
        elif name in FROM_CARD and not ({"width", "height"} & set(own.values) and name == "size"):
            rows[name] = (_of_card(card)[name], f"the card of {card.name}") if card else (None, "the model")
        elif name not in ("width", "height", "prompt"):
            default = option.default
            off = isinstance(default, tuple) and not any(default)
            rows[name] = (None if off else list(default) if isinstance(default, tuple) else default, "the default")
    return rows


def _table(rows: dict[str, tuple[Any, str]]) -> str:
    shown = [(name, _shown(name, value), place) for name, (value, place) in rows.items()]
    widths = [max(len(row[i]) for row in shown) for i in range(2)]
    return "\n".join(f"{name:<{widths[0]}}  {value:<{widths[1]}}  {place}" for name, value, place in shown)


def _shown(name: str, value: Any) -> str:
    if value in (None, [], "") or (name == "pag" and not value):
        return {"seed": "random", "threads": "auto"}.get(name, "-")
    return printable(to_toml({"x": value}).removeprefix("x = ").rstrip("\n"))[:60]
