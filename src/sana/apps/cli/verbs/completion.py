"""`sana completion`: a script that lets a shell complete verbs, flags, choices, names and files.

The script is made from the dataclasses that the flags come from, and asks nothing while one types.
"""

import importlib
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from sana.apps.cli import arguments
from sana.apps.cli.arguments import COMMON, Flag, flags_of
from sana.apps.cli.known import TASKS
from sana.apps.cli.output import Terminal
from sana.cards import CARDS
from sana.errors import InvalidInput, did_you_mean

USAGE = "sana completion bash|zsh|fish"
DESCRIPTION = """\
Print a script that completes verbs, flags, choices, models and files.

  bash   echo 'source <(sana completion bash)' >> ~/.bashrc
  zsh    echo 'source <(sana completion zsh)' >> ~/.zshrc
  fish   sana completion fish > ~/.config/fish/completions/sana.fish"""

Shell = Literal["bash", "zsh", "fish"]


class Page(NamedTuple):
    """What can follow a verb."""

    summary: str
    flags: Sequence[Flag]
    words: Sequence[str]
    """What the first word may be."""
    files: str
    """Suffix of the files that a word may name; "*" is any file, "" none."""


@dataclass(frozen=True, kw_only=True)
class Words:
    """What the words behind a verb are, besides its flags."""

    flags_in: str | None = None
    """Module that holds the flags as `GROUPS`, if it is not the verb's own."""
    choices: Callable[[], Sequence[str]] = tuple
    files: str = ""


def run(words: Sequence[str], terminal: Terminal) -> int:
    """Print the script of the shell that is named."""
    shells, _ = arguments.read(words, (), usage=USAGE, description=DESCRIPTION)
    if len(shells) != 1:
        raise InvalidInput("Which shell? One of bash, zsh, fish. For example: source <(sana completion bash)")
    if shells[0] not in SCRIPTS:
        meant = did_you_mean(shells[0], SCRIPTS)
        raise InvalidInput(f"There is no script for '{shells[0][:40]}', only for {', '.join(SCRIPTS)}.{meant}")
    script = SCRIPTS[shells[0]](pages())
    terminal.result(script)
    terminal.document({"shell": shells[0], "script": script})
    return 0


def pages() -> dict[str, Page]:
    """Return verb -> what can follow it, for every verb."""
    from sana.apps.cli import VERBS

    found = {}
    for name, verb in VERBS.items():
        follows = WORDS.get(name, Words())
        module = importlib.import_module(follows.flags_in or verb.module)
        own = module.groups() if hasattr(module, "groups") else getattr(module, "GROUPS", ())
        once = {flag.names[-1]: flag for flag in flags_of((*own, COMMON))}  # tasks of one verb share some
        flags = [flag._replace(choices=tuple(CARDS)) if "--model" in flag.names else flag for flag in once.values()]
        found[name] = Page(verb.summary, flags, follows.choices(), follows.files)
    return found


def bash(verbs: dict[str, Page]) -> str:
    """Return the script for bash 4 and later; without a verb the flags are those of `generate`."""
    lines = [
        "# sana completion for bash",
        "_sana() {",
        '    local word="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}" verb="${COMP_WORDS[1]}"',
        "    COMPREPLY=()",
        """    if [[ $word == "=" ]]; then word=""; fi""",
        '    if [[ $before == "=" ]]; then before="${COMP_WORDS[COMP_CWORD-2]}"; fi',
        '    case "$verb" in',
        f"        {'|'.join(verbs)}) ;;",
        "        *) verb=generate",
        "            if [[ $COMP_CWORD -eq 1 && $word != -* ]]; then",
        f"                {_offer(verbs)}",
        "                return",
        "            fi ;;",
        "    esac",
        '    case "$verb" in',
    ]
    for name, page in verbs.items():
        values = {"|".join(flag.names): _bash_values(flag) for flag in page.flags if flag.takes_value}
        lines += [f"        {name})", '            case "$before" in']
        lines += [f"                {names}) {command}; return ;;" for names, command in values.items()]
        lines += [
            "            esac",
            "            if [[ $word == -* ]]; then",
            f"                {_offer(name for flag in page.flags for name in flag.names)}",
            f"            else {_bash_words(page)}; fi ;;",
        ]
    return "\n".join([*lines, "    esac", "}", "complete -o filenames -F _sana sana"])


def _offer(words: Iterable[str], more: str = "") -> str:
    """Return the command of bash that offers words, and what another command prints."""
    return f"""mapfile -t COMPREPLY < <(compgen -W "{" ".join(words)}" -- "$word"{more})"""


def _bash_values(flag: Flag) -> str:
    if flag.choices:
        return _offer(flag.choices, '; compgen -d -- "$word"' if flag.takes_file else "")
    return "compopt -o default" if flag.takes_file else ":"


def _bash_words(page: Page) -> str:
    if page.words:
        return _offer(page.words)
    if not page.files or page.files == "*":
        return "compopt -o default" if page.files else ":"
    return f"""mapfile -t COMPREPLY < <(compgen -f -X '!*{page.files}' -- "$word"; compgen -d -- "$word")"""


def zsh(verbs: dict[str, Page]) -> str:
    """Return the script for zsh."""
    lines = [
        "#compdef sana",
        "# sana completion for zsh",
        f"_sana_models() {{ _alternative 'names:name:({' '.join(CARDS)})' 'folders:folder:_files -/' }}",
        "_sana() {",
        "    local -a verbs",
        "    verbs=(",
        *(f"        {shlex.quote(f'{name}:{page.summary}')}" for name, page in verbs.items()),
        "    )",
        "    if (( CURRENT == 2 )) && [[ $words[2] != -* ]]; then",
        "        _describe 'verb' verbs",
        "        return",
        "    fi",
        "    local verb=$words[2]",
        f"    if [[ ${{verb}} == ({'|'.join(verbs)}) ]]; then",
        "        shift words; (( CURRENT-- ))",
        "    else",
        "        verb=generate",
        "    fi",
        "    case $verb in",
    ]
    for name, page in verbs.items():
        lines.append(f"        {name})")
        lines.append("            _arguments -s \\")
        lines += [f"                {spec} \\" for flag in page.flags for spec in _zsh_flag(flag)]
        lines.append(f"                {_zsh_words(page)} ;;")
    return "\n".join(
        [*lines, "    esac", "}", 'if [[ $funcstack[1] == _sana ]]; then _sana "$@"; else compdef _sana sana; fi']
    )


def _zsh_flag(flag: Flag) -> list[str]:
    text = flag.summary.replace("\\", "").replace("[", "(").replace("]", ")").replace(":", "")
    values = f"({' '.join(flag.choices)})" if flag.choices else "_files" if flag.takes_file else " "
    values = "_sana_models" if flag.choices and flag.takes_file else values
    value = f":{flag.names[-1].lstrip('-')}:{values}" if flag.takes_value else ""
    return [shlex.quote(f"{name}[{text}]{value}") for name in flag.names]


def _zsh_words(page: Page) -> str:
    if page.words:
        return shlex.quote(f"*:word:({' '.join(page.words)})")
    if not page.files:
        return shlex.quote("*: :")
    return shlex.quote("*:file:_files" + ("" if page.files == "*" else f' -g "*{page.files}"'))


def fish(verbs: dict[str, Page]) -> str:
    """Return the script for fish."""
    names = " ".join(verbs)
    first = shlex.quote(f"not __fish_seen_subcommand_from {names}")
    lines = ["# sana completion for fish", "complete -c sana -f"]
    lines += [f"complete -c sana -n {first} -a {name} -d {shlex.quote(page.summary)}" for name, page in verbs.items()]
    for name, page in verbs.items():
        seen = f"__fish_seen_subcommand_from {name}"
        where = shlex.quote(f"{seen}; or not __fish_seen_subcommand_from {names}" if name == "generate" else seen)
        for flag in page.flags:
            spelled = [f"-s {n[1:]}" if len(n) == 2 else f"-l {n[2:]}" for n in flag.names]
            value = ""
            if flag.takes_value:
                value = " -r -F" if flag.takes_file else " -x"
                value += f" -a {shlex.quote(' '.join(flag.choices))}" if flag.choices else ""
            lines.append(f"complete -c sana -n {where} {' '.join(spelled)}{value} -d {shlex.quote(flag.summary)}")
        if page.words:
            lines.append(f"complete -c sana -n {where} -a {shlex.quote(' '.join(page.words))}")
        elif page.files:
            files = "-F" if page.files == "*" else f"-k -a {shlex.quote(f'(__fish_complete_suffix {page.files})')}"
            lines.append(f"complete -c sana -n {where} {files}")
    return "\n".join(lines)


def _dataset_tasks() -> Sequence[str]:
    from sana.apps.cli.verbs.dataset import TASKS

    return tuple(TASKS)


def _metrics() -> Sequence[str]:
    from sana.evaluation.runner import METRICS

    return tuple(METRICS)


WORDS = {
    "generate": Words(flags_in="sana.apps.cli.options"),
    "edit": Words(files="*"),
    "batch": Words(files="*"),
    "info": Words(files="*"),
    "replay": Words(files="*"),
    "decode": Words(files=".safetensors"),
    "models": Words(choices=lambda: (*TASKS, *CARDS)),
    "convert": Words(files="*"),
    "lora": Words(files="*"),
    "dataset": Words(choices=_dataset_tasks),
    "train": Words(files=".toml"),
    "evaluate": Words(choices=_metrics),
    "completion": Words(choices=lambda: tuple(SCRIPTS)),
}
SCRIPTS: dict[str, Callable[[dict[str, Page]], str]] = {"bash": bash, "zsh": zsh, "fish": fish}
