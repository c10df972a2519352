"""The layer rule, read from the source: who may import whom, and what nothing below the applications may do."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import TypeGuard

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "sana"
FILES = sorted(SOURCE.rglob("*.py"))

LAYERS = (
    {"errors", "config", "card", "cards"},
    {"flow", "nn"},
    {"models", "text", "data", "memory"},
    {"checkpoints"},
    {"engine"},
    {"pipelines", "training", "evaluation"},
    {"apps"},
    {"__main__"},
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

TORCH_FREE = {
    "__init__.py",
    "errors.py",
    "config.py",
    "card.py",
    "cards.py",
    "checkpoints/built_in.py",
    "engine/__init__.py",
    "engine/request.py",
    "engine/attachments.py",
    "engine/pictures.py",
    *(f"data/{path.name}" for path in (SOURCE / "data").glob("*.py")),
    "engine/values.py",
    "engine/metadata/__init__.py",
    *(
        f"engine/metadata/{name}.py"
        for name in ("a1111", "comfyui", "containers", "dialects", "exif", "reading", "record", "settings")
    ),
}
HEAVY = {"torch", "transformers", "diffusers", "huggingface_hub"}
COMMAND_LINE = {"argparse", "tyro", "click", "optparse", "getopt"}


def name_of(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def package_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield every imported module with its line; `from sana.x import y` also yields `sana.x.y`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}: write the full name"
            assert node.module is not None
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def run_time_tree(path: Path) -> ast.Module:
    """Parse a file without the imports that only a type checker sees."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [
        node
        for node in tree.body
        if not (isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING")
    ]
    return tree


def layer_faults(path: Path) -> list[str]:
    package = package_of(path)
    if package == "__init__":
        return [f"{line}: {module}" for module, line in imports(run_time_tree(path)) if module.startswith("sana")]
    faults = []
    for module, line in imports(ast.parse(path.read_text(encoding="utf-8"))):
        parts = module.split(".")
        if parts[0] != "sana" or len(parts) < 2 or parts[1] in (package, "__version__"):
            continue
        other = parts[1]
        same_base_layer = RANK[package] == RANK.get(other) == 0
        if other not in RANK or (RANK[other] >= RANK[package] and not same_base_layer):
            faults.append(f"{line}: {package} must not import {module}")
    return faults


def _is_stored(node: ast.AST) -> TypeGuard[ast.Subscript]:
    return isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store)


def conduct_faults(path: Path) -> list[str]:
    """Find printing, argument parsing and reading of the environment."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    faults = [f"{line}: imports {m}" for m, line in imports(tree) if m.split(".")[0] in COMMAND_LINE]
    # torch is told where to keep compiled code by a variable only: to set one is not to read it.
    written = {id(node.value) for node in ast.walk(tree) if _is_stored(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("print", "input"):
            faults.append(f"{node.lineno}: calls {node.func.id}")
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and id(node) not in written:
            owner = (node.value.id, node.attr)
            if owner in (("os", "environ"), ("os", "getenv"), ("os", "putenv"), ("sys", "argv")):
                faults.append(f"{node.lineno}: reads {'.'.join(owner)}")
    return faults


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_follow_the_layers(path: Path) -> None:
    assert package_of(path) in {*RANK, "__init__"}, "a new package needs its place in LAYERS and in the architecture"
    assert layer_faults(path) == []


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_diffusers_is_never_imported(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert [line for module, line in imports(tree) if module.split(".")[0] == "diffusers"] == []


@pytest.mark.parametrize("path", [p for p in FILES if package_of(p) != "apps"], ids=name_of)
def test_nothing_below_the_applications_prints_or_parses(path: Path) -> None:
    assert conduct_faults(path) == []


@pytest.mark.parametrize("path", [p for p in FILES if name_of(p) in TORCH_FREE or package_of(p) == "apps"], ids=name_of)
def test_light_modules_import_nothing_heavy_at_the_top(path: Path) -> None:
    top = ast.Module(
        [n for n in run_time_tree(path).body if isinstance(n, ast.Import | ast.ImportFrom)], type_ignores=[]
    )
    assert [module for module, _ in imports(top) if module.split(".")[0] in HEAVY] == []


def loops_over_levels(path: Path) -> list[int]:
    """Find `for` loops over noise levels or timesteps: there is one loop, in flow/samplers.py."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.For) and any(word in ast.unparse(node.iter) for word in ("sigmas", "timesteps"))
    ]


@pytest.mark.parametrize("path", [p for p in FILES if package_of(p) != "flow"], ids=name_of)
def test_there_is_no_second_sampling_loop(path: Path) -> None:
    assert loops_over_levels(path) == []


def test_the_loop_rule_itself(tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    path.write_text("for i, t in enumerate(scheduler.timesteps):\n    pass\nfor x in images:\n    pass\n")
    assert loops_over_levels(path) == [1]


@pytest.mark.parametrize(
    ("file", "line", "fault"),
    [
        ("flow/samplers.py", "from sana.nn import attention", True),
        ("flow/samplers.py", "from sana.nn.attention import f", True),
        ("flow/samplers.py", "from sana.flow import path", False),
        ("models/dc_ae.py", "import sana.memory.tiling", True),
        ("models/dc_ae.py", "from sana.nn.norms import RMSNorm", False),
        ("engine/parts.py", "from sana.pipelines import SanaPipeline", True),
        ("engine/parts.py", "from sana.checkpoints import folder", False),
        ("cards.py", "from sana.config import TransformerConfig", False),
        ("config.py", "from sana.flow import path", True),
        ("training/loop.py", "from sana import evaluation", True),
        ("apps/cli/run.py", "from sana.engine import generate", False),
    ],
)
def test_the_rule_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, line: str, fault: bool) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(line + "\n")
    monkeypatch.setattr(f"{__name__}.SOURCE", tmp_path)
    assert bool(layer_faults(path)) is fault


@pytest.mark.parametrize(
    "code",
    ["print(1)", "import os\nos.environ['A']", "import os\nos.getenv('A')", "import argparse", "import sys\nsys.argv"],
)
def test_the_conduct_rule_itself(tmp_path: Path, code: str) -> None:
    path = tmp_path / "x.py"
    path.write_text(code)
    assert len(conduct_faults(path)) == 1
    path.write_text("import os\nos.environ['A'] = 'b'")
    assert conduct_faults(path) == []
