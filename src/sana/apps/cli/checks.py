"""The single checks of `sana doctor`: each looks at one thing and returns lines. None imports a heavy package."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import sana
from sana.apps.cli import cache
from sana.apps.cli.thumbnail import protocol
from sana.cards import CARDS
from sana.checkpoints.built_in import missing_parts

Answers = dict[str, dict[str, Any]]
"""What the probes and the hub said: stage -> {"facts": ...} or {"error": ...}."""

LITTLE_MEMORY = 1_500_000_000
LITTLE_DISK = 100_000_000
OPTIONAL = {"ftfy": "ftfy", "beautifulsoup4": "bs4"}
NEWEST_TORCH = "2.13.0"


class Check(NamedTuple):
    """One line of the list."""

    name: str
    state: Literal["good", "amiss", "broken"]
    """broken: no picture can be drawn before it is mended."""
    fact: str
    mend: str = ""
    """One command."""


def check_python(answers: Answers) -> list[Check]:
    """Python, the system and this package."""
    system = f"{platform.system()} {platform.machine()}"
    versions = f"{platform.python_version()} on {system}, sanakit {sana.__version__}"
    return [Check("python", "good", versions)]


def check_packages(answers: Answers) -> list[Check]:
    """What the package requires: whether it is there, in a version it was made for."""
    try:
        from packaging.requirements import InvalidRequirement, Requirement

        required = [Requirement(text) for text in importlib.metadata.requires("sanakit") or ()]
    except (ImportError, importlib.metadata.PackageNotFoundError, InvalidRequirement):
        return [Check("packages", "amiss", "sanakit is not installed, only found", f"{pip()} install sanakit")]
    needed = [one for one in required if one.marker is None or one.marker.evaluate({"extra": ""})]
    wrong = {one.name: (str(one), _version(one.name)) for one in needed if not _fits(one)}
    if not wrong:
        return [Check("packages", "good", f"all {len(needed)} that are required, in versions that fit")]
    told = ", ".join(f"{name} {version or 'is missing'}" for name, (_, version) in wrong.items())
    command = f"{pip()} install " + " ".join(f'"{text}"' for text, _ in wrong.values())
    state: Any = "broken" if None in [version for _, version in wrong.values()] else "amiss"
    return [Check("packages", state, f"these do not fit: {told}", command)]


def check_torch(answers: Answers) -> list[Check]:
    """The torch build and what it computes on."""
    install = f'{pip()} install "torch<={NEWEST_TORCH}"'
    facts = answers["torch"].get("facts")
    if facts is None:
        found = _version("torch")
        what = f"{found} cannot be imported ({answers['torch']['error']})" if found else "is not installed"
        return [Check("torch", "broken", what, install if not found else f"{install} --force-reinstall")]
    build = f"CUDA {facts['cuda']}" if facts["cuda"] else f"ROCm {facts['hip']}" if facts["hip"] else "CPU build"
    lines = [Check("torch", "good", f"{facts['version']} ({build})")]
    gpus = [f"{gpu['name']} ({cache.said(gpu['memory'])})" for gpu in facts["gpus"]]
    gpus += ["Apple GPU (mps)"] if facts["mps"] else []
    if gpus:
        lines.append(Check("device", "good", ", ".join(gpus)))
    elif shutil.which("nvidia-smi"):
        mend = f'uv pip install "torch<={NEWEST_TORCH}" --torch-backend=auto --reinstall'
        lines.append(Check("device", "amiss", "there is an NVIDIA driver, but torch finds no GPU", mend))
    else:
        lines.append(Check("device", "good", "the CPU; no GPU was found"))
    extra = [name for name in ("amx_tile", "avx512_bf16") if name in facts["features"]]
    half = f"bfloat16 in hardware ({', '.join(extra)})" if extra else "bfloat16 is emulated, float32 is used"
    lines.append(Check("processor", "good", f"{facts['capability']}, {half}"))
    return [*lines, _threads(facts)]


def _threads(facts: dict[str, Any]) -> Check:
    threads, cores = facts["threads"], facts["cores"]
    if threads > cores:
        fact = f"{threads} threads on {cores} cores, which is slower"
        return Check("threads", "amiss", fact, f"export OMP_NUM_THREADS={cores}")
    return Check("threads", "good", f"{threads} of {cores} cores")


def check_torchvision(answers: Answers) -> list[Check]:
    """The package that nothing here needs, and that breaks transformers where it was made for another torch."""
    version = _version("torchvision")
    if version is None:
        return [Check("torchvision", "good", "is not installed, and not needed")]
    error = answers["torchvision"].get("error")
    if error is None:
        return [Check("torchvision", "good", f"{version} works, and is not needed")]
    fact = f"{version} does not fit torch {_version('torch')} and breaks transformers ({error})"
    return [Check("torchvision", "amiss", fact, f"{pip()} uninstall{' -y' if _has('pip') else ''} torchvision")]


def check_transformers(answers: Answers) -> list[Check]:
    """The package that carries the text encoder, and those that are only good to have."""
    error = answers["transformers"].get("error")
    version = _version("transformers")
    lines = [Check("transformers", "good", f"{version}, Gemma-2 can be imported")]
    if error is not None:
        install = f'{pip()} install --force-reinstall "transformers>=5.0,<6"'
        why = f"{version} cannot be used ({error})" if version else "is not installed"
        if version and "torchvision" in error:
            install = f"{pip()} uninstall{' -y' if _has('pip') else ''} torchvision"
        lines = [Check("transformers", "broken", why, install)]
    diffusers = _version("diffusers")
    lines.append(Check("diffusers", "good", f"{diffusers or 'is not installed'}, and not needed"))
    missing = [name for name, module in OPTIONAL.items() if not _has(module)]
    if missing:
        fact = f"{' and '.join(missing)} missing: --clean-caption cannot be used"
        lines.append(Check("optional", "amiss", fact, f"{pip()} install ftfy beautifulsoup4"))
    else:
        lines.append(Check("optional", "good", "ftfy and beautifulsoup4 are here, for --clean-caption"))
    return lines


def check_memory(answers: Answers) -> list[Check]:
    """Main memory, and room on the disks that are written to."""
    total, free = memory()
    lines = []
    if total is not None and free is not None:
        little = free < LITTLE_MEMORY
        mend = 'sana "PROMPT" --batch-size 1' if little else ""
        fact = f"{cache.said(free)} of {cache.said(total)} are free"
        lines.append(Check("memory", "amiss" if little else "good", fact, mend))
    here = Path.cwd()
    room = cache.free_bytes(here)
    if not os.access(here, os.W_OK) or room < LITTLE_DISK:
        why = "cannot be written to" if room >= LITTLE_DISK else f"only {cache.said(room)} are free"
        lines.append(Check("this folder", "amiss", why, 'sana "PROMPT" -o ~/pictures/'))
    else:
        lines.append(Check("this folder", "good", f"{cache.said(room)} are free for pictures"))
    return lines


def check_cache(answers: Answers) -> list[Check]:
    """Models that were downloaded, and room for more."""
    if not _has("huggingface_hub"):
        return [Check("cache", "amiss", "huggingface_hub is missing", f'{pip()} install "huggingface_hub>=1.0,<3"')]
    room, place = cache.free_bytes(cache.folder()), cache.tilde(cache.folder())
    smallest = min(cache.download_size(card) for card in CARDS.values() if card.hub_id)
    fact, mend = f"{cache.said(room)} are free in {place}", ""
    if room < smallest + cache.MARGIN:
        fact += f"; the smallest model needs {cache.said(smallest)}"
        mend = "export HF_HOME=/a/folder/on/a/larger/disk"
    lines = [Check("cache", "amiss" if mend else "good", fact, mend)]
    for card in CARDS.values():
        state = cache.cached(card)
        if card.hub_id and state.complete:
            lines.append(Check("model", "good", f"{card.name} is here ({cache.said(state.size)})"))
        elif state.size:
            fact = f"{card.name}: {cache.said(state.size)} of about {cache.said(cache.download_size(card))} are here"
            lines.append(Check("model", "amiss", fact, f'sana -m {card.name} "a red fox"'))
    if len(lines) == 1:
        lines.append(Check("model", "good", "only the built-in ones are here"))
    return lines


def check_built_in(answers: Answers) -> list[Check]:
    """The models that come inside the package, with all their parts."""
    cards = [card for card in CARDS.values() if card.folder is not None]
    faults = [f"{card.name} lacks its {lost[0]}" for card in cards if (lost := missing_parts(card))]
    if faults:
        return [Check("built in", "amiss", "; ".join(faults), f"{pip()} install --force-reinstall --no-deps sanakit")]
    return [Check("built in", "good", f"{', '.join(card.name for card in cards)}: all their parts are here")]


def check_hub(answers: Answers) -> list[Check]:
    """Whether the hub answers; the token is never shown."""
    error, facts = answers["hub"].get("error"), answers["hub"].get("facts", {})
    if error is not None:
        fact = f"{facts.get('host', 'the hub')} cannot be reached ({error}): is there a network? The cache still loads"
        return [Check("hub", "amiss", fact, "export HF_HUB_OFFLINE=1")]
    if facts.get("offline"):
        return [Check("hub", "good", "is not asked, because HF_HUB_OFFLINE is set")]
    token = "with a token" if facts["token"] else "no token is set, and none is needed"
    return [Check("hub", "good", f"{facts['host']} answers; {token}")]


def hub_answer(timeout: float) -> dict[str, Any]:
    """Ask the hub for its front page, unless asking is switched off."""
    try:
        from huggingface_hub import constants, get_token
    except Exception as error:  # a broken installation is what is looked for
        return {"error": f"huggingface_hub cannot be imported: {type(error).__name__}"}
    facts = {"host": cache.host(), "token": get_token() is not None, "offline": cache.is_offline()}
    if facts["offline"]:
        return {"facts": facts}
    if not constants.ENDPOINT.startswith(("http://", "https://")):
        return {"facts": facts, "error": "HF_ENDPOINT is no web address"}
    try:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD", headers={"User-Agent": "sanakit"})
        urllib.request.urlopen(request, timeout=timeout).close()
    except urllib.error.HTTPError:
        pass  # it answers, which is all that was asked
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return {"facts": facts, "error": getattr(reason, "strerror", None) or type(reason).__name__}
    return {"facts": facts}


def check_compiler(answers: Answers) -> list[Check]:
    """What --compile needs."""
    names = (os.environ.get("CXX", ""), *(("cl",) if sys.platform == "win32" else ("g++", "clang++", "c++")))
    found = next((name for name in names if name and shutil.which(name)), None)
    if found is not None:
        return [Check("compiler", "good", f"{found}, for --compile")]
    commands = {
        "apt-get": "sudo apt-get install g++",
        "dnf": "sudo dnf install gcc-c++",
        "apk": "sudo apk add g++",
        "pacman": "sudo pacman -S gcc",
        "xcode-select": "xcode-select --install",
        "winget": "winget install Microsoft.VisualStudio.2022.BuildTools",
    }
    mend = next((command for name, command in commands.items() if shutil.which(name)), "export CXX=/path/to/g++")
    return [Check("compiler", "amiss", "no C++ compiler: --compile cannot be used", mend)]


def check_settings(answers: Answers) -> list[Check]:
    """The user's configuration file, and what this terminal shows."""
    from sana.apps.cli.settings import user_file

    path = user_file()
    there = path is not None and path.is_file()
    name = cache.tilde(path) if path is not None else "nowhere, without a home folder"
    fact = f"{name} is read" if there else f"there is no file; it would be {name}"
    way = protocol(os.environ, getattr(sys.stderr, "encoding", None) or "")
    shown = f"pictures are shown as {WAYS[way]}" if way else "pictures are not shown"
    columns = shutil.get_terminal_size().columns
    encoding = getattr(sys.stdout, "encoding", None) or "no encoding"
    return [Check("settings", "good", fact), Check("terminal", "good", f"{columns} columns, {encoding}; {shown}")]


def check_drawing(answers: Answers) -> list[Check]:
    """Whether a picture comes out."""
    facts, error = answers["drawing"].get("facts"), answers["drawing"].get("error")
    if facts is not None:
        seconds = f"{facts['load_seconds']:.1f} s to load, {facts['draw_seconds']:.1f} s for two steps"
        return [Check("drawing", "good", f"the built-in model draws on the {facts['device']} ({seconds})")]
    earlier = any("error" in answers[stage] for stage in ("torch", "transformers"))
    mend = "" if earlier else f"{pip()} install --force-reinstall sanakit"
    return [Check("drawing", "broken", f"the built-in model does not draw ({error})", mend)]


def memory() -> tuple[int | None, int | None]:
    """Return total and free bytes of main memory, as far as the system tells; a container's limit counts."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            rows = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in file}
        total, free = rows["MemTotal"], rows["MemAvailable"]
    except (OSError, KeyError, ValueError, IndexError):
        try:
            pages = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_AVPHYS_PAGES")
            total, free = (count * os.sysconf("SC_PAGE_SIZE") for count in pages)
        except (AttributeError, ValueError, OSError):
            return None, None
    try:
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())  # "max", no number, where there is no limit
        used = int((group / "memory.current").read_text())
    except (OSError, ValueError):
        return total, free
    return min(total, limit), max(0, min(free, limit - used))


def pip() -> str:
    """Return the command that installs packages here."""
    return "python -m pip" if _has("pip") else "uv pip"


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _fits(requirement: Any) -> bool:
    version = _version(requirement.name)
    return version is not None and requirement.specifier.contains(version, prereleases=True)


WAYS = {
    "kitty": "kitty graphics",
    "iterm2": "inline images",
    "sixel": "sixels",
    "truecolor": "coloured blocks",
    "256": "blocks of 256 colours",
}
CHECKS: tuple[Callable[[Answers], list[Check]], ...] = (
    check_python,
    check_packages,
    check_torch,
    check_torchvision,
    check_transformers,
    check_compiler,
    check_memory,
    check_built_in,
    check_cache,
    check_hub,
    check_settings,
    check_drawing,
)
