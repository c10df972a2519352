"""Start-up is part of the product: the package and its `--help` must not load the heavy libraries."""

import subprocess
import sys
from pathlib import Path

import pytest

import sana

HEAVY = ("torch", "transformers", "diffusers", "huggingface_hub", "numpy")


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_by(code: str) -> list[str]:
    """Run `code` in a fresh interpreter and return which heavy libraries it loaded."""
    report = f"import sys; print('\\nLOADED', *[m for m in {HEAVY!r} if m in sys.modules])"
    return run(f"{code}\n{report}").rsplit("LOADED", 1)[1].split()


@pytest.mark.parametrize(
    "code",
    [
        "import sana",
        "import sana; dir(sana); sana.__version__; sana.__all__",
        "import sana.errors, sana.config, sana.cards",
        "from sana import Request; Request(prompt='a fox', steps=3)",
        "from sana import read_metadata",
    ],
)
def test_light_names_load_nothing_heavy(code: str) -> None:
    assert loaded_by(code) == []


def test_the_check_can_fail() -> None:
    assert "torch" in loaded_by("from sana import load_image")


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"]])
def test_help_loads_neither_torch_nor_transformers(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom sana.apps.cli import main\n"
        f"sys.argv = ['sana', *{arguments!r}]\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert stop.code in (0, None), stop.code"
    )
    assert not {"torch", "transformers"} & set(loaded_by(code))


def test_every_public_name_resolves_and_is_listed() -> None:
    for name in sana.__all__:
        assert getattr(sana, name) is not None, name
        assert name in dir(sana)
    assert sorted(sana.__all__) == sorted(sana._HOMES)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Sanapipeline'"):
        sana.Sanapipeline  # noqa: B018


def test_type_checkers_see_the_same_names() -> None:
    source = Path(sana.__file__).read_text(encoding="utf-8")
    block = source.split("if TYPE_CHECKING:")[1].split("__version__")[0]
    for name, home in sana._HOMES.items():
        line = next(line for line in block.splitlines() if name in line.replace(",", " ").split())
        assert f"from {home} import" in line
