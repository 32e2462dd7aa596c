"""Required packages: checked before they are imported, so that a missing or unsuitable one is reported in one line."""

import importlib.metadata
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from runtime import process
from runtime.console import InputError, first_line

if TYPE_CHECKING:
    from packaging.requirements import Requirement


ROOT = Path(__file__).resolve().parents[1]
INSTALL = {  # by requirements file
    "requirements.txt": "pip install -r requirements.txt",
    "requirements-colossalai.txt": "pip install --no-deps -r requirements-colossalai.txt",
}
BUILT_ON = ("torch", "transformers", "colossalai")  # the programs use their internals, so only the pinned versions work
MINIMUM_PYTHON = (3, 11)
RECORDED_EXCHANGES = "2000"  # per rank, by NCCL's flight recorder; torchtitan keeps 20,000


class Package(NamedTuple):
    """A requirement, the file that lists it, and the installed version, if any."""

    requirement: "Requirement"
    file: str
    version: str | None

    @property
    def problem(self) -> str | None:
        if self.version is None:
            return f"{self.requirement.name} is not installed"
        if not self.requirement.specifier.contains(self.version, prereleases=True):
            return f"{self.requirement.name} {self.version} is installed, not {self.requirement.specifier}"
        return None


def packages() -> list[Package]:
    """Return the packages that the requirements files list; none if the programs were installed without the files."""
    from packaging.requirements import Requirement  # may itself be missing

    found = []
    for file in filter(lambda file: (ROOT / file).is_file(), INSTALL):
        for line in (ROOT / file).read_text(encoding="utf-8").splitlines():
            if text := line.partition("#")[0].strip():
                requirement = Requirement(text)
                found.append(Package(requirement, file, installed(requirement.name)))
    return found


def installed(name: str) -> str | None:
    """Return the version of a package that an import would find, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def require() -> None:
    """Prepare the process for its imports; end it with status 2 if Python or a package in BUILT_ON has a wrong version.

    Call before importing any of them. Other packages are checked by the imports that follow: a failed import becomes
    one line too.
    """
    process.prepare()
    sys.excepthook = _refuse_failed_import
    if sys.version_info < MINIMUM_PYTHON:
        needed, found = (".".join(map(str, version[:2])) for version in (MINIMUM_PYTHON, sys.version_info))
        _refuse(f"this is Python {found}, but {needed} or later is needed; make a .venv: bash scripts/setup.sh")
    unsuitable = [package for package in packages() if package.requirement.name in BUILT_ON and package.problem]
    if unsuitable:
        _refuse(*(f"{package.problem}; {_remedy(package.file)}" for package in unsuitable))


def start_cuda() -> None:
    """Set the variables that CUDA and torch's allocator read only once. Call before importing ColossalAI.

    The allocator's segments may grow, unless the user has configured it: with fixed segments, blocks of varying size
    leave gaps that nothing fits into (PyTorch notes, "Optimizing memory usage with PYTORCH_ALLOC_CONF").

    ColossalAI sets CUDA_DEVICE_MAX_CONNECTIONS=1 when imported, also in `colossalai run`, which passes it to its ranks.
    With one hardware queue for all streams, a kernel waits for every kernel submitted before it on any stream, so
    that almost nothing overlaps.

    NCCL's flight recorder keeps the last exchanges of a rank, which runtime/watchdog.py writes when the run hangs.
    """
    if os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1":
        del os.environ["CUDA_DEVICE_MAX_CONNECTIONS"]
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if "TORCH_NCCL_TRACE_BUFFER_SIZE" not in os.environ:  # the older name
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", RECORDED_EXCHANGES)
    import torch

    torch.cuda.is_available()


def _refuse_failed_import(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Replace sys.excepthook during the imports; process.run handles later errors."""
    if isinstance(error, ImportError) and not process.interrupted(error) and not _is_own(error):
        _refuse(f"a package cannot be imported ({first_line(error)}); {_remedy('requirements.txt')}")
    process.end_uncaught(kind, error, trace)


def _remedy(file: str) -> str:
    """Return the advice to use scripts/setup.sh's environment if it exists, else to install a requirements file."""
    environment = ROOT / ".venv"
    if (environment / "bin" / "python").is_file() and Path(sys.prefix) != environment:
        return f"start it with {environment / 'bin' / 'python'}, or: {INSTALL[file]}"
    return INSTALL[file]


def _is_own(error: ImportError) -> bool:
    """Return True if the module belongs to this repository, so that no installation would help."""
    top = (error.name or "").partition(".")[0]
    return bool(top) and ((ROOT / f"{top}.py").is_file() or (ROOT / top / "__init__.py").is_file())


def _refuse(*problems: str) -> NoReturn:
    def main() -> int:
        raise InputError(*problems)

    process.run(main, os.path.basename(sys.argv[0]))
