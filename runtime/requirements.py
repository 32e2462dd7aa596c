"""What has to be installed: looked at before it is imported, so that what is missing or unsuitable is one line."""

import importlib.metadata
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from runtime import console, process

if TYPE_CHECKING:
    from packaging.requirements import Requirement


ROOT = Path(__file__).resolve().parents[1]
INSTALL = {  # by requirements file
    "requirements.txt": "pip install -r requirements.txt",
    "requirements-colossalai.txt": "pip install --no-deps -r requirements-colossalai.txt",
}
BUILT_ON = ("torch", "transformers", "colossalai")  # the programs reach into these, so no other version will do
MINIMUM_PYTHON = (3, 11)


class Package(NamedTuple):
    """A requirement, the file that has it, and the version that is installed, if any."""

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
    """What the requirements files ask for, beside what there is; nothing where the programs came without the files."""
    from packaging.requirements import Requirement  # which may be what is missing

    found = []
    for file in filter(lambda file: (ROOT / file).is_file(), INSTALL):
        for line in (ROOT / file).read_text(encoding="utf-8").splitlines():
            if text := line.partition("#")[0].strip():
                requirement = Requirement(text)
                found.append(Package(requirement, file, installed(requirement.name)))
    return found


def installed(name: str) -> str | None:
    """The version that an import takes, the first on the path."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def require() -> None:
    """Ends the program with status 2 where Python or what it is BUILT_ON is of a version that it does not work with.

    Call before importing them. The other packages are left to the imports that follow: one that fails is a line too.
    """
    sys.excepthook = _refuse_failed_import
    if sys.version_info < MINIMUM_PYTHON:
        needed, found = (".".join(map(str, version[:2])) for version in (MINIMUM_PYTHON, sys.version_info))
        _refuse(
            f"this is Python {found}, and {needed} or later is needed; make a .venv with one: bash scripts/setup.sh"
        )
    unsuitable = [package for package in packages() if package.requirement.name in BUILT_ON and package.problem]
    if unsuitable:
        _refuse(*(f"{package.problem}; {_remedy(package.file)}" for package in unsuitable))


def start_cuda() -> None:
    """Settles what CUDA and torch's allocator read from the environment once, before ColossalAI is imported.

    The allocator's segments grow, unless the user has settled it: blocks of another size then seldom leave memory that
    nothing else fits into (torch's notes on CUDA, "Optimizing memory usage with PYTORCH_ALLOC_CONF").

    ColossalAI's import sets CUDA_DEVICE_MAX_CONNECTIONS=1, also in `colossalai run`, which hands it to its ranks. With
    one queue for all streams, no kernel starts before those that were submitted earlier to other streams have started,
    so that next to nothing overlaps.
    """
    if os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1":
        del os.environ["CUDA_DEVICE_MAX_CONNECTIONS"]
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # its older name
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    import torch

    torch.cuda.is_available()


def _refuse_failed_import(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """In the place of console.end_uncaught, for the imports: what fails later is console.run's."""
    if isinstance(error, ImportError) and not console.interrupted(error) and not _is_own(error):
        _refuse(f"a package cannot be imported ({console.first_line(error)}); {_remedy('requirements.txt')}")
    console.end_uncaught(kind, error, traceback)


def _remedy(file: str) -> str:
    """To start the program in the environment of scripts/setup.sh, where there is one; else to install the file."""
    environment = ROOT / ".venv"
    if (environment / "bin" / "python").is_file() and Path(sys.prefix) != environment:
        return f"start it with {environment / 'bin' / 'python'}, or: {INSTALL[file]}"
    return INSTALL[file]


def _is_own(error: ImportError) -> bool:
    """Whether it is a module of this repository that cannot be imported, which no installation would mend."""
    top = (error.name or "").partition(".")[0]
    return bool(top) and ((ROOT / f"{top}.py").is_file() or (ROOT / top / "__init__.py").is_file())


def _refuse(*problems: str) -> NoReturn:
    def main() -> int:
        raise console.InputError(*problems)

    process.run(main, os.path.basename(sys.argv[0]))
