"""Replacement of attributes of ColossalAI, torch and transformers: every patch goes through `replace`.

A patch is written against the source of the attribute that it replaces. `replace` refuses a name that the installed
version lacks, and remembers the original. tests/unit/engine/test_patching.py compares digests of the originals' sources
with those of the versions that the patches were written for.

Each patch has four headings: Symptom, Cause, Fix, Remove when.
"""

import hashlib
import inspect
import re
import textwrap
from importlib.metadata import version
from types import ModuleType
from typing import Any

from runtime.console import InputError

PATCHED_PACKAGES = ("colossalai", "torch", "transformers")

_originals: dict[tuple[Any, str], Any] = {}  # by owner and name: a function or class, None for anything else


def replace(target: Any, name: str, value: Any) -> None:
    """Set the attribute `name` of a foreign module, class or object to `value`, and remember the original.

    Raises:
        InputError: the target has no such attribute.
    """
    owner = target if isinstance(target, (type, ModuleType)) else type(target)
    try:
        original = inspect.getattr_static(target, name)
    except AttributeError:
        raise InputError(_missing(owner, name)) from None
    _originals.setdefault((owner, name), source_object(original))
    setattr(target, name, value)


def source_object(attribute: Any) -> Any:
    """Return the function or class behind an attribute, whose source can be read; None for any other value."""
    for inner in ("fget", "__func__"):  # of a property; of a method, also a static or a class method
        attribute = getattr(attribute, inner, attribute)
    return attribute if inspect.isfunction(attribute) or inspect.isclass(attribute) else None


def digests() -> dict[str, str]:
    """Return the SHA-256 of the source of each original replaced so far, by its full name.

    A field holds a value and has no source: its digests are those of the classes that use it, or of its module. Sources
    are read here rather than in `replace`, which runs in every training step.
    """
    sources = []
    for (owner, name), original in _originals.items():
        sources += [original] if original is not None else _users(owner, name)
    return {full_name(source): digest(source) for source in sources if _package(source) in PATCHED_PACKAGES}


def digest(source: Any) -> str:
    """Return the SHA-256 of the source of a function, class or module."""
    return hashlib.sha256(textwrap.dedent(inspect.getsource(source)).strip().encode()).hexdigest()


def full_name(source: Any) -> str:
    """Return the dotted name of a function, class or module."""
    return source.__name__ if isinstance(source, ModuleType) else f"{source.__module__}.{source.__qualname__}"


def _users(owner: Any, field: str) -> list[Any]:
    """Return the owner's class and bases that use `self.field`; for a module, the module itself."""
    if isinstance(owner, ModuleType):
        return [owner]
    bases = [base for base in owner.__mro__ if _package(base) in PATCHED_PACKAGES]
    return [base for base in bases if re.search(rf"\bself\.{field}\b", inspect.getsource(base))]


def _package(source: Any) -> str:
    return full_name(source).partition(".")[0]


def _missing(owner: Any, name: str) -> str:
    bases = [owner] if isinstance(owner, ModuleType) else owner.__mro__
    package = next((_package(base) for base in bases if _package(base) in PATCHED_PACKAGES), None)
    installed = f"{package} {version(package)}" if package else "no package that is patched"
    return (
        f"{full_name(owner)} has no attribute {name!r} to replace; {installed} is installed: "
        "install the versions in requirements.txt and requirements-colossalai.txt"
    )
