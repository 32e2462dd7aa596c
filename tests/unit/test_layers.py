"""Rules of the layout: imports point down, and only some modules import colossalai and argparse."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAYERS = (  # a module imports only from its own room and from layers below
    ("pretrain", "finetune", "benchmark"),
    ("training",),
    ("checkpointing", "planning"),
    ("engine", "data_utils"),
    ("corpus",),
    ("attn", "model_utils"),
    ("runtime",),
)
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
WITH_ARGPARSE = {"pretrain.py", "finetune.py", "benchmark.py", "training/flags.py"}
MODULES = sorted(
    path for path in (*ROOT.glob("*.py"), *ROOT.glob("*/*.py")) if path.parts[-2] in LAYER or path.parent == ROOT
)


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.module is not None
            assert node.level == 0, f"{path}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_six_top_level_modules_and_one_level_of_rooms():
    names = {"pretrain", "finetune", "benchmark", "attn", "data_utils", "model_utils"}
    assert {path.stem for path in ROOT.glob("*.py")} == names
    rooms = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert rooms == LAYER.keys() - names
    assert not [path for room in rooms for path in (ROOT / room).glob("*/*.py")]
    assert not [room for room in rooms if (ROOT / room / "__init__.py").read_text()]


def test_names_of_test_files_are_unique():
    """pytest imports them by name alone, so that of two of the same name it refuses the second."""
    names = [path.name for path in ROOT.glob("tests/**/*.py")]
    assert len(names) == len(set(names)) + names.count("conftest.py") - 1


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    names = list(imported(path))
    rooms = {name.partition(".")[0] for name in names}
    assert not [room for room in rooms & LAYER.keys() - {own} if LAYER[room] <= LAYER[own]]
    assert "colossalai" not in rooms or own == "engine"
    assert "argparse" not in rooms or str(path.relative_to(ROOT)) in WITH_ARGPARSE
    if own == "benchmark":
        assert not [name for name in names if name.startswith(("checkpointing.", "training.loop"))]
