"""Requirements files: every import is listed, pinned, installed, explained and licensed."""

import ast
import importlib.metadata
import os
import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from launching import ROOT
from runtime import requirements
from runtime.process import USAGE_ERROR

FILES = ("requirements.txt", "requirements-colossalai.txt", "requirements-dev.txt")
LINE = re.compile(r"(?P<requirement>[\w.-]+ *[><=]=[^#]*)(#(?P<reason>.*))?")
LICENCES = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("| licence |")[2]


def lines() -> list[tuple[str, str, bool]]:
    """Return (file, requirement, has a reason); the reason stands beside it, or above a file's only requirement."""
    found = []
    for file in FILES:
        text = (ROOT / file).read_text(encoding="utf-8")
        matches = [match for match in map(LINE.fullmatch, text.splitlines()) if match]
        for match in matches:
            explained = match["reason"] or (len(matches) == 1 and text.startswith("#"))
            found.append((file, match["requirement"].strip(), bool(explained)))
    return found


def imported(path: Path) -> set[str]:
    """Return the packages that a file imports, without Python's own."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    packages = {name.partition(".")[0] for name in names} - sys.stdlib_module_names
    return {"protobuf" if name == "google" else name for name in packages}  # pip's name of it


def test_every_imported_package_is_listed():
    files = [*ROOT.glob("*.py"), *(path for path in ROOT.glob("*/*.py") if path.parent.name != "tests")]
    own = {path.stem for path in [*files, *ROOT.glob("tests/support/*.py")]} | {path.parent.name for path in files}
    listed = {Requirement(requirement).name for file, requirement, _ in lines() if file != "requirements-dev.txt"}
    # torchtitan is for a comparison, lm_eval for --eval_tasks; triton comes with torch for CUDA.
    optional = {"flash_attn", "lm_eval", "torchtitan", "triton"}
    assert set().union(*map(imported, files)) - own <= listed | optional


@pytest.mark.parametrize(("file", "requirement", "explained"), lines())
def test_pinned_installed_explained_and_licensed(file, requirement, explained):
    parsed = Requirement(requirement)
    assert parsed.specifier
    assert explained, f"{file}: {requirement} has no reason beside it"
    assert re.search(rf"\b{re.escape(parsed.name)}\b", LICENCES), f"CONTRIBUTING.md: no licence of {parsed.name}"
    assert parsed.specifier.contains(importlib.metadata.version(parsed.name), prereleases=True)


def test_remedy_is_the_environment_that_is_there(monkeypatch, tmp_path):
    monkeypatch.setattr(requirements, "ROOT", tmp_path)
    assert requirements._remedy("requirements.txt") == "pip install -r requirements.txt"
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").touch()
    assert requirements._remedy("requirements.txt").startswith(f"start it with {tmp_path}/.venv/bin/python, or: pip ")
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    assert requirements._remedy("requirements.txt") == "pip install -r requirements.txt"


def test_older_python(monkeypatch, capsys):
    monkeypatch.setattr(requirements, "MINIMUM_PYTHON", (99, 0))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit, match=str(USAGE_ERROR)):
        requirements.require()
    assert "99.0 or later is needed" in capsys.readouterr().err
