"""Findings of scripts/doctor.py on the ranks of one machine; test_several_machines.py runs it on two hosts."""

import importlib.metadata
import sys
import time
from pathlib import Path

from launching import ROOT, ForkedRun, Run
from processes import run_ranks
from scripts import doctor
from scripts.doctor import Finding, lines, show

DOCTOR = ROOT / "scripts" / "doctor.py"


def test_all_checks_pass(tmp_path):
    """Run two ranks under torchrun, with a hosts file that names this machine."""
    (tmp_path / "hosts.txt").write_text("localhost\n")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    flags = ["--hostfile", tmp_path / "hosts.txt", "-o", tmp_path / "new" / "folder"]
    with Run([sys.executable, *launcher, DOCTOR, *flags], tmp_path) as run:
        assert run.wait() == 0, run.output()
    checks = [line[:22].split() for line in run.stdout.splitlines()]
    assert ["ok", "packages"] in checks
    assert ["ok", "hosts"] in checks
    assert ["ok", "all-reduce"] in checks
    assert ["ok", "clocks"] in checks
    assert ["ok", "shared", "folder"] in checks
    assert run.stdout.count("packages") == 1
    assert not list((tmp_path / "new").rglob("*"))


def test_a_problem_is_a_line_with_a_remedy_and_status_1(tmp_path):
    (tmp_path / "hosts.txt").write_text("no-such-name.invalid\n")
    (tmp_path / "file").touch()
    flags = ["--hostfile", tmp_path / "hosts.txt", "-o", tmp_path / "file" / "folder"]
    with ForkedRun([DOCTOR, *flags], tmp_path) as run:
        assert run.wait() == 1
    assert "FAILED  hosts          no-such-name.invalid: " in run.stdout
    assert "FAILED  shared folder " in run.stdout
    assert run.stdout.count("\n                       -> ") == 2
    assert run.stderr == ""


def test_extensions_without_a_gpu(tmp_path):
    script = ROOT / "scripts" / "build_extensions.sh"
    with Run(
        ["bash", script], tmp_path, {"LLAMA_PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}, cwd=tmp_path
    ) as run:
        assert run.wait() == 0, run.output()
    assert run.stdout == "-       extensions     no GPU, so there is nothing to compile\n"


def test_versions(monkeypatch):
    assert doctor.packages().ok
    real = importlib.metadata.version

    def version(name):
        if name == "einops":
            raise importlib.metadata.PackageNotFoundError(name)
        return {"transformers": "4.40.0"}.get(name) or real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    finding = doctor.packages()
    assert not finding.ok
    assert finding.detail == "transformers 4.40.0 is installed, not ==4.51.3; einops is not installed"
    assert "setup.sh" in finding.remedy


def wrong_clock() -> Finding:
    """Check the clocks while rank 1's is a minute fast."""
    doctor.socket.gethostname = lambda: f"node{doctor.rank()}"
    now = time.time
    doctor.time.time = lambda: now() + 60 * doctor.rank()
    return doctor.clocks()


def test_clocks():
    (finding, other) = run_ranks(2, wrong_clock)
    assert finding == other
    assert not finding.ok
    assert finding.detail.startswith("node1 is 60.0 s ahead of node0")


def separate_folders(root: str) -> Finding:
    doctor.SHARED_SECONDS = 1
    return doctor.shared_folder(Path(root, str(doctor.rank())))


def test_folder_that_is_not_shared(tmp_path):
    for finding in run_ranks(2, separate_folders, str(tmp_path)):
        assert not finding.ok
        assert "did not see" in finding.detail
    assert not list(tmp_path.rglob("*"))


def sum_of_all() -> Finding:
    doctor.ALL_REDUCE_BYTES = {"gloo": 2**16}
    return doctor.all_reduce("gloo")


def test_all_reduce():
    for finding in run_ranks(3, sum_of_all):
        assert finding.ok
        assert "gloo, 3 ranks, 0 MiB: " in finding.detail


def test_findings_that_differ_are_shown_for_each_host(capsys):
    same = Finding("CUDA", None, "no GPU")
    assert show({"node1": same, "node2": same})
    assert capsys.readouterr().out == f"{'-':<7} CUDA           no GPU\n"
    assert not show({"node1": same, "node2": Finding("CUDA", False, "no nvcc", "set CUDA_HOME")})
    assert capsys.readouterr().out.splitlines() == [
        *lines(same, "node1"),
        "FAILED  CUDA           node2: no nvcc",
        "                       -> set CUDA_HOME",
    ]
