"""What a newcomer does in the first five minutes works without a network, in far less time."""

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "first_five_minutes.sh"
NO_NETWORK = """\
import socket

def refuse(*_, **__):
    raise OSError("this test has no network")

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = refuse
"""


def without_network(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Return words before a command, and variables, that take the network away."""
    namespace = ["unshare", "--map-root-user", "--net"]
    if shutil.which("unshare") and subprocess.run([*namespace, "true"], capture_output=True).returncode == 0:
        return namespace, {}
    (folder / "sitecustomize.py").write_text(NO_NETWORK)  # no namespaces here: Python's own sockets are closed
    return [], {"PYTHONPATH": str(folder)}


@pytest.mark.skipif(os.name == "nt", reason="a shell script")
def test_the_first_five_minutes_need_no_network(tmp_path: Path) -> None:
    words, variables = without_network(tmp_path)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    home = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "hub")}
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "SANA_", "XDG_"))}
    began = resource.getrusage(resource.RUSAGE_CHILDREN)
    ran = subprocess.run(
        [*words, "sh", str(SCRIPT)],
        cwd=tmp_path,
        env={**kept, **home, **variables, "PATH": path, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "Traceback" not in ran.stderr
    assert ran.stdout.count("identical") == 1
    assert len(list(tmp_path.glob("sana-first-steps.*/**/*.png"))) == 3
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime < 290
