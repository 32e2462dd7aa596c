"""Findings of scripts/doctor.py on the ranks of one machine; test_several_machines.py runs it on two hosts."""

import importlib.metadata
import json
import re
import sys
import time
from pathlib import Path

import pytest

from launching import ROOT, ForkedRun, Run
from planning import measure
from planning.facts import BUILT_IN, read_facts
from planning.measure import _shortfalls
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


def test_measured_speeds_are_facts_for_dry_runs_and_the_benchmark(tmp_path):
    """Measure two ranks, then estimate and time a step by that file."""
    facts = tmp_path / "facts.json"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    with Run([sys.executable, *launcher, DOCTOR, "--measure", facts, "-o", tmp_path / "run"], tmp_path) as run:
        assert run.wait() == 0, run.output()
    assert re.search(rf"^ok +speed +[\d.]+ TFLOPS in bf16, .*; written to {facts}$", run.stdout, re.MULTILINE)
    found = read_facts(facts)
    assert found.card == "CPU"
    assert found.origin.startswith("measured on 2 x CPU, 20")
    assert found.latency[0] != BUILT_IN["H100"].latency[0]  # measured between the ranks
    assert found.collectives < BUILT_IN["H100"].collectives / 10

    flags = ["-c", "test", "-l", 64, "-p", "zero2", "--mixed_precision", "fp32", "--facts", facts]
    with ForkedRun([ROOT / "benchmark.py", *flags, "--json", tmp_path / "figures.json", "-s", 3], tmp_path) as run:
        assert run.wait() == 0, run.output()
    estimated = json.loads((tmp_path / "figures.json").read_text())["step_seconds_estimated"]
    assert f" s (estimated {estimated:.3f}), p10 " in run.stdout
    with ForkedRun([ROOT / "benchmark.py", *flags, "--dry_run"], tmp_path) as run:
        assert run.wait() == 0, run.output()
    table = run.stdout.partition(f"(with speeds in {facts}):\n")[2]
    total = float(re.search(r" total\n.* ([\d.,]+)\n", table)[1].replace(",", ""))
    assert total == pytest.approx(estimated * 1e3, abs=0.06)


def test_a_measurement_that_could_not_be_written_is_refused_first(tmp_path):
    with ForkedRun([DOCTOR, "--measure", tmp_path / "none" / "facts.json"], tmp_path) as run:
        assert run.wait() == 2
    assert run.stdout == ""
    assert run.stderr.startswith(f"doctor.py: error: --measure: folder {tmp_path}/none does not exist; create it")


def test_slow_cards_and_links_are_named():
    known = BUILT_IN["H100"]
    good = [known.products[-1][1], known.memory, known.attention[0][1], known.host_link]
    throttled = [0.6 * good[0], *good[1:]]
    everywhere = [
        ("node1, GPU 0", good),
        ("node1, GPU 1", throttled),
        ("node2, GPU 0", [0.95 * speed for speed in good]),
    ]
    links = [("node1", 255.0), ("node2", 127.5)]
    assert list(map(str, _shortfalls(known, everywhere, links))) == [
        "node1, GPU 1: matrix products 403 TFLOPS, expected 672",
        "node2: collective operations within the host 128 GB/s, expected 255",
    ]
    assert not list(_shortfalls(known, [("node1, GPU 0", good)], links[:1]))


@pytest.mark.parametrize("known", [None, BUILT_IN["H100"]], ids=["unknown card", "faster than the built-in speeds"])
def test_a_card_that_is_slower_than_the_others_is_named(known):
    speeds = [1e4, 1e4, 1e4, 1e4]
    everywhere = [("node1, GPU 0", speeds), ("node1, GPU 1", speeds), ("node2, GPU 0", [1e4, 8e3, 1e4, 1e4])]
    found = list(map(str, _shortfalls(known, everywhere, [])))
    assert found == ["node2, GPU 0: memory 8,000 GB/s, expected 10,000"]


def test_the_slower_of_two_cards_is_named():
    everywhere = [("node1, GPU 0", [100.0] * 4), ("node2, GPU 0", [100.0, 100.0, 85.0, 100.0])]
    found = list(map(str, _shortfalls(None, everywhere, [("node1", 100.0), ("node2", 85.0)])))
    assert found == [
        "node2, GPU 0: attention 85 TFLOPS, expected 100",
        "node2: collective operations within the host 85 GB/s, expected 100",
    ]


def test_every_fact_is_of_the_slowest_rank(monkeypatch):
    """A second rank of half the speed: each fact of this one is halved."""
    own = {}

    def gather_with_a_slow_rank(value):
        if isinstance(value, tuple) and isinstance(value[0], str):
            own["curves"] = value[1]
            return [value, (value[0], [speed / 2 for speed in value[1]])]
        if value is None:
            return [None, None]
        own["others"] = value
        return [value, tuple(speed / 2 for speed in value)]

    monkeypatch.setattr(measure, "gather", gather_with_a_slow_rank)
    facts, _ = measure.measure()
    assert [facts.products[-1][1], facts.memory, facts.attention[0][1], facts.host_link] == [
        pytest.approx(speed / 2) for speed in own["curves"]
    ]
    assert (facts.float32, facts.host_adam, facts.loader) == pytest.approx([speed / 2 for speed in own["others"]])


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
