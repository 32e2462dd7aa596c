"""scripts/setup.sh in a folder of its own, with one small wheel as the only requirement."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from launching import ROOT

WHEEL = "small-1.0-py3-none-any.whl"
needs_uv = pytest.mark.skipif(shutil.which("uv") is None, reason="uv is not installed (pip install uv)")


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "setup.sh", tmp_path / "scripts")
    with zipfile.ZipFile(tmp_path / WHEEL, "w") as wheel:
        wheel.writestr("small.py", "answer = 42\n")
        wheel.writestr("small-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: small\nVersion: 1.0\n")
        wheel.writestr("small-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("small-1.0.dist-info/RECORD", "")
    (tmp_path / "requirements.txt").write_text(f"./{WHEEL}\n")
    (tmp_path / "requirements-colossalai.txt").write_text("# nothing\n")
    return tmp_path


def set_up(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run setup.sh without this machine's configuration of pip, on which its choice depends."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "LLAMA_PYTHON"))}
    kept |= {"PIP_CONFIG_FILE": os.devnull, "PYTHON": sys.executable} | environment
    command = ["bash", folder / "scripts" / "setup.sh"]
    return subprocess.run(command, env=kept, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("environment", "installer"),
    [
        pytest.param({}, "uv", marks=needs_uv),
        pytest.param({"PIP_FIND_LINKS": "/srv/wheels"}, "pip", marks=needs_uv),
        ({"INSTALLER": "pip"}, "pip"),
    ],
)
def test_the_installer(folder, environment, installer):
    done = set_up(folder, **environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"with {installer} (first time only" in done.stdout
    program = [folder / ".venv" / "bin" / "python", "-c", "import small; print(small.answer)"]
    assert subprocess.run(program, capture_output=True, text=True, check=True).stdout == "42\n"
    (record,) = (folder / ".venv").rglob("small-1.0.dist-info/INSTALLER")
    assert record.read_text().strip() == installer
    again = set_up(folder, **environment)
    assert (again.returncode, again.stdout) == (0, "setup: ready: .venv/bin/python\n")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"INSTALLER": "conda"}, "INSTALLER='conda' is neither uv nor pip; give one of them, or leave INSTALLER out"),
        (
            {"INSTALLER": "uv", "PATH": "/usr/bin:/bin"},
            "INSTALLER=uv: uv is not installed; install it, or leave INSTALLER out",
        ),
    ],
)
def test_mistakes(folder, environment, expected):
    if shutil.which("uv", path=environment.get("PATH", "")):
        pytest.skip("uv is among the system's programs")
    done = set_up(folder, **environment)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"setup: error: {expected}\n"
    assert not (folder / ".venv").exists()
