"""A run on two hosts, disturbed for a minute while nobody intervenes, ends with the bits of an undisturbed one."""

import subprocess
import sys

import pytest

from launching import ROOT
from machines import obstacle


@pytest.mark.slow
def test_faults_on_two_hosts(sample):
    if reason := obstacle():
        pytest.skip(reason)
    command = [sys.executable, ROOT / "scripts" / "torture.py", "--minutes", "1", "--pause", "3", "8", "--seed", "10"]
    data = ["--data", sample / "data", "--tokenizer", sample / "tokenizer"]
    run = subprocess.run([*command, *data], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "every step logged once: yes; the undisturbed run's bits: yes" in run.stdout
    assert "full disk" in run.stdout  # the first fault of this seed, and then a corrupted checkpoint
    assert "corrupted newest checkpoint" in run.stdout
