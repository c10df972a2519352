"""`sana doctor`: the list, its commands, and computers on which something is amiss."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command import Sana

import sana as package
from sana.apps.cli import cache, checks
from sana.apps.cli.checks import CHECKS, Answers, Check
from sana.apps.cli.verbs import doctor

TORCH = {
    "version": "2.13.0",
    "cuda": None,
    "hip": None,
    "gpus": [],
    "mps": False,
    "capability": "AVX2",
    "features": [],
    "threads": 2,
    "cores": 2,
}
DRAWING = {"device": "cpu", "load_seconds": 0.5, "draw_seconds": 0.25, "sha256": "0"}
HUB = {"host": "huggingface.co", "token": True, "offline": False}


def answers(**changes: Any) -> Answers:
    """What a healthy computer says, with changes."""
    good = {
        "torch": {"facts": TORCH},
        "torchvision": {"error": "ModuleNotFoundError: none"},
        "transformers": {"facts": {"version": "5.0"}},
        "drawing": {"facts": DRAWING},
        "hub": {"facts": HUB},
    }
    return {**good, **changes}


def listed(found: Answers) -> dict[str, Check]:
    """Return name -> line, for all checks."""
    return {check.name: check for look in CHECKS for check in look(found)}


@pytest.fixture(autouse=True)
def steady(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A computer with enough of everything."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cache, "folder", lambda: tmp_path / "hub")
    monkeypatch.setattr(cache, "free_bytes", lambda path: 50_000_000_000)
    monkeypatch.setattr(checks, "memory", lambda: (16_000_000_000, 8_000_000_000))


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretend that packages have other versions, or are missing."""
    original = checks._version

    def pretend(**others: str | None) -> None:
        monkeypatch.setattr(checks, "_version", lambda name: others[name] if name in others else original(name))

    return pretend


def test_on_a_healthy_computer_all_is_good(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: "/bin/g++" if name == "g++" else None)
    found = listed(answers())
    for name in ("torch", "device", "processor", "threads", "torchvision", "compiler", "memory", "hub", "drawing"):
        assert found[name].state == "good", found[name]
        assert found[name].mend == ""
    assert "with a token" in found["hub"].fact


def test_whatever_is_not_good_has_a_command(versions: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    broken = {"error": "ImportError: broken"}
    versions(torchvision="0.28.0", torch=None, transformers=None, diffusers=None, tqdm="1.0")
    monkeypatch.setattr(cache, "free_bytes", lambda path: 1_000_000)
    monkeypatch.setattr(checks, "memory", lambda: (4_000_000_000, 500_000_000))
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr(checks, "_has", lambda module: module == "huggingface_hub")
    found = listed(dict.fromkeys(("torch", "torchvision", "transformers", "drawing", "hub"), broken))
    amiss = {name: check for name, check in found.items() if check.state != "good"}
    assert {"torch", "transformers", "torchvision", "memory", "this folder", "cache", "hub", "compiler"} <= set(amiss)
    assert {name for name, check in amiss.items() if not check.mend} == {"drawing"}  # it follows from the others
    assert all("\n" not in check.mend for check in amiss.values())
    assert found["torch"].state == found["transformers"].state == "broken"
    assert found["torch"].mend.startswith("uv pip install")


def test_the_trap_of_torchvision(versions: Callable[..., None]) -> None:
    versions(torchvision="0.28.0", torch="2.13.0")
    error = {"error": "RuntimeError: operator torchvision::nms does not exist"}
    found = listed(answers(torchvision=error, transformers=error))
    assert found["torchvision"].state == "amiss"
    assert "0.28.0 does not fit torch 2.13.0" in found["torchvision"].fact
    assert found["torchvision"].mend.endswith("uninstall -y torchvision")
    assert found["transformers"].mend == found["torchvision"].mend
    assert listed(answers(torchvision={"facts": {"version": "0.28.0"}}))["torchvision"].state == "good"


def test_packages_that_do_not_fit_are_named(versions: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    needs = ["torch>=2.9,<=2.13.0", "tqdm>=4.66", 'diffusers==0.42.1; extra == "test"']
    monkeypatch.setattr("importlib.metadata.requires", lambda name: needs)
    versions(torch="2.15.0", tqdm="4.70")
    found = listed(answers())["packages"]
    assert (found.state, found.fact) == ("amiss", "these do not fit: torch 2.15.0")
    assert found.mend.endswith('install "torch<=2.13.0,>=2.9"')
    versions(torch="2.13.0+cpu", tqdm=None)
    assert listed(answers())["packages"].state == "broken"
    versions(torch="2.13.0+cpu", tqdm="4.70")
    assert "all 2 that are required" in listed(answers())["packages"].fact


def test_devices_and_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = {**TORCH, "cuda": "13.0", "gpus": [{"name": "NVIDIA X", "memory": 8e9}], "features": ["amx_tile"]}
    found = listed(answers(torch={"facts": gpu}))
    assert found["torch"].fact == "2.13.0 (CUDA 13.0)"
    assert found["device"].fact == "NVIDIA X (8.0 GB)"
    assert "bfloat16 in hardware (amx_tile)" in found["processor"].fact
    monkeypatch.setattr("shutil.which", lambda name: "/bin/x" if name == "nvidia-smi" else None)
    unused = listed(answers())["device"]
    assert (unused.state, "torch-backend" in unused.mend) == ("amiss", True)
    crowded = listed(answers(torch={"facts": {**TORCH, "threads": 8}}))["threads"]
    assert crowded.mend == "export OMP_NUM_THREADS=2"


def test_half_a_download_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    half = cache.Cached(complete=False, size=3_000_000_000)
    whole = cache.Cached(complete=True, size=7_000_000_000)
    states = {"sana-0.6b-512": half, "sana-1.6b-1024": whole}
    none = cache.Cached(complete=False, size=0)
    monkeypatch.setattr(cache, "cached", lambda card: states.get(card.name, none))
    lines = checks.check_cache(answers())
    assert [line.state for line in lines] == ["good", "good", "amiss"]
    assert "sana-1.6b-1024 is here (7.0 GB)" in lines[1].fact
    assert "3.0 GB of about 7.1 GB" in lines[2].fact
    assert lines[2].mend.startswith("sana -m sana-0.6b-512")


def test_the_token_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(cache, "is_offline", lambda: False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://user:secret@127.0.0.1:9")
    answer = checks.hub_answer(0.5)
    assert answer["facts"] == {"host": "127.0.0.1", "token": True, "offline": False}
    assert "secret" not in json.dumps(answer)
    line = listed(answers(hub=answer))["hub"]
    assert line.mend == "export HF_HUB_OFFLINE=1"
    assert "127.0.0.1 cannot be reached" in line.fact
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "file:///etc/passwd")
    assert checks.hub_answer(0.5)["error"] == "HF_ENDPOINT is no web address"


def test_offline_the_hub_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "is_offline", lambda: True)
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("the hub was asked"))
    answer = checks.hub_answer(0.5)
    assert listed(answers(hub=answer))["hub"].fact == "is not asked, because HF_HUB_OFFLINE is set"


def test_the_command_draws_and_says_so(sana: Sana) -> None:
    said = sana("doctor", "--json", "-q")
    document = json.loads(said.out)
    assert said.code == 0, said.err
    assert document["can_draw"] is True
    assert {check["name"] for check in document["checks"]} >= {"python", "torch", "memory", "cache", "terminal"}
    assert len(document["probes"]["drawing"]["facts"]["sha256"]) == 64
    assert not list(Path().glob("*.png"))
    assert sana("doctor", "nonsense").code == 2


def test_a_computer_without_a_working_torch_gets_its_list_too(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise OSError('libtorch.so: cannot open shared object file')")
    path = os.pathsep.join((str(Path(package.__file__).parents[1]), str(tmp_path)))
    code = (
        "import sys; from sana.apps.cli import main; n = main(['doctor']); sys.exit(n + 10 * ('torch' in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "cannot be imported (OSError: libtorch.so: cannot open shared object file)" in done.stdout
    assert "No picture can be drawn" in done.stdout
    assert "install" in done.stdout


def test_a_probe_that_dies_or_hangs_does_no_harm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "python"
    script.write_text(
        '#!/bin/sh\necho chatter\necho \'{"stage": "torch", "facts": {"version": "1"}}\'\nkill -SEGV $$\n'
    )
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    said: Answers = {}
    doctor._ask_program(("torch", "drawing"), said)
    assert said["torch"]["facts"]["version"] == "1"
    assert said["drawing"]["error"] == "its program ended with code -11"
    script.write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(doctor, "LONGEST_PROBE", 0.3)
    said = {}
    doctor._ask_program(("torch",), said)
    assert said["torch"]["error"] == "no answer within 0.3 seconds"
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nowhere"))
    said = {}
    doctor._ask_program(("torch",), said)
    assert "no program could be started" in said["torch"]["error"]


def test_memory_is_known_or_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    total, free = checks.memory()
    assert total is not None
    assert free is not None
    assert 0 <= free <= total
    monkeypatch.setattr("builtins.open", lambda *_, **__: (_ for _ in ()).throw(OSError()))
    monkeypatch.setattr(os, "sysconf", lambda name: (_ for _ in ()).throw(ValueError()))
    assert checks.memory() == (None, None)
