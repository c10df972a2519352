"""`sana completion`: the scripts offer what the command understands."""

import dataclasses
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from command import Sana

from sana.apps.cli import VERBS
from sana.apps.cli.arguments import flag_of
from sana.apps.cli.verbs.completion import SCRIPTS, pages
from sana.cards import CARDS
from sana.engine.attachments import CONTROL_KINDS
from sana.engine.request import Request


@pytest.fixture
def scripts(sana: Sana) -> dict[str, str]:
    """The scripts, in files of their shells' names."""
    for shell in SCRIPTS:
        said = sana("completion", shell)
        assert said.code == 0, said.err
        Path(shell).write_text(said.out)
    return {shell: Path(shell).read_text() for shell in SCRIPTS}


def offered(*words: str) -> list[str]:
    """Return what bash would offer for the last of the words."""
    line = " ".join(f"'{word}'" for word in ("sana", *words))
    code = f"""
        source ./bash
        COMP_WORDS=({line}); COMP_CWORD={len(words)}
        compopt() {{ echo FILES; }}
        _sana
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(
        ["bash", "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={**os.environ, "LC_ALL": "C.UTF-8"},
    )
    assert done.stderr == ""
    return [line for line in done.stdout.splitlines() if line]


def test_bash_completes_verbs_flags_choices_models_and_files(scripts: dict[str, str]) -> None:
    Path("my recipe.toml").touch()
    Path("other.txt").touch()
    Path("folder").mkdir()
    assert offered("mod") == ["models"]
    assert set(offered("")) == set(VERBS)
    assert offered("a fox", "--samp") == ["--sampler"]
    assert offered("a fox", "--sampler", "") == ["flow-dpm", "flow-euler", "scm"]
    assert offered("a fox", "--dtype", "=", "bf") == ["bfloat16"]
    assert offered("a fox", "--dtype", "=") == ["auto", "float32", "bfloat16", "float16"]
    assert offered("generate", "-m", "nan") == ["nano", "nano-sprint", "nano-controlnet"]
    assert offered("-m", "sana-0") == [name for name in CARDS if name.startswith("sana-0")]
    assert offered("x", "-m", "fold") == ["folder"]
    assert offered("models", "sana-sprint-0") == ["sana-sprint-0.6b-1024"]
    assert offered("models", "ver") == ["verify"]
    assert offered("a fox", "--control", "") == list(CONTROL_KINDS)
    assert offered("edit", "") == ["FILES"]
    assert "--strength" in offered("edit", "--")
    assert offered("train", "my") == ["my recipe.toml"]
    assert set(offered("train", "")) == {"my recipe.toml", "folder"}
    assert set(offered("evaluate", "")) == {"geneval", "control", "autoencoder"}
    assert offered("completion", "z") == ["zsh"]
    assert offered("info", "") == ["FILES"]
    assert offered("a fox", "-o", "") == ["FILES"]
    assert offered("a fox", "--seed", "") == []
    assert "--no-binning" in offered("--no-")
    assert "--guidance" not in offered("models", "--")


def test_every_flag_of_the_request_is_offered_everywhere(scripts: dict[str, str]) -> None:
    for one in dataclasses.fields(Request):
        if one.name != "prompt":
            flag = flag_of({"controls": "control", "loras": "lora", "pag_scale": "pag"}.get(one.name, one.name))
            assert flag in scripts["bash"]
            assert flag in scripts["zsh"]
            assert f"-l {flag[2:]} " in scripts["fish"]
    for script in scripts.values():
        assert all(name in script for name in (*VERBS, *CARDS))


def test_every_verb_has_its_page() -> None:
    found = pages()
    assert set(found) == set(VERBS)
    assert all(any("--json" in flag.names for flag in page.flags) for page in found.values())
    assert all(flag.summary for page in found.values() for flag in page.flags)


@pytest.mark.parametrize("shell", list(SCRIPTS))
def test_the_shell_can_read_its_script(scripts: dict[str, str], shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    subprocess.run([shell, "-n", shell], check=True, timeout=20)


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
def test_fish_completes(scripts: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(Path.cwd()))

    def shown(line: str) -> list[str]:
        command = ["fish", "-c", f"source ./fish; complete -C '{line}'"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        return [row.split("\t")[0] for row in done.stdout.splitlines()]

    assert shown("sana mod") == ["models"]
    assert shown("sana models sana-sprint-0") == ["sana-sprint-0.6b-1024"]
    assert sorted(shown("sana fox --sampler ")) == ["flow-dpm", "flow-euler", "scm"]


def test_a_shell_must_be_named_and_known(sana: Sana) -> None:
    assert "Which shell?" in sana("completion").err
    said = sana("completion", "bsh")
    assert said.code == 2
    assert "There is no script for 'bsh', only for bash, zsh, fish. Did you mean 'bash'?" in said.err
    assert "only for bash, zsh, fish." in sana("completion", "tcsh").err
