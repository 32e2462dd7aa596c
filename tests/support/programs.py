"""Small programs that a test runs in a process of their own."""

import os
import subprocess
import sys
import textwrap
from typing import Any

from launching import ROOT


def program(code: str, **environment: str) -> dict[str, Any]:
    """Return subprocess.run's or Popen's arguments for Python code that imports the repository's modules."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "", **environment}
    return {"args": [sys.executable, "-c", textwrap.dedent(code)], "env": variables}


def run_program(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(**program(code, **environment), capture_output=True, text=True, timeout=120)


def main_program(statements: str) -> str:
    """Return code that runs a main() consisting of `statements`."""
    body = textwrap.indent(textwrap.dedent(statements), "    ")
    imports = "from runtime import console, process\nfrom runtime.console import InputError, RunError"
    return f"{imports}\ndef main():\n{body}\nprocess.run(main, 'train.py')"


def run_main(statements: str, **environment: str) -> subprocess.CompletedProcess:
    return run_program(main_program(statements), **environment)
