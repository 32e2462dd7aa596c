"""Traces of chosen steps and ranks; snapshots of GPU memory, for which these tests replace torch's two functions."""

import json
from collections import Counter

import pytest
import torch

from runs import problems_of
from training.inspection import Inspection, Inspector


@pytest.mark.parametrize(("flags", "traced"), [((), [0]), (("--profile_ranks", "1", "0"), [0, 1])])
def test_a_trace_holds_the_steps_of_the_ranks(flags, traced, pretrain):
    small = ["-p", "zero2", "-x", "fp32", "-b", 2, "--max_steps", 5, "--profile_steps", "2-4"]
    run = pretrain(*small, *flags, processes=2)
    files = {f"steps2-4-rank{rank}.json" for rank in traced}
    folder = run.folder / "tb_logs" / "profile"
    assert {file.name for file in folder.iterdir()} == files
    assert f"profile: {folder / 'steps2-4-rank0.json'}, for chrome://tracing" in run.stdout
    for name in files:
        events = json.loads((folder / name).read_text())["traceEvents"]
        names = Counter(event.get("name") for event in events)
        assert names["aten::embedding"] == 3  # one forward pass a step
        assert names["aten::mm"] > 100


def test_a_run_that_resumes_inside_the_steps_traces_the_rest(pretrain, tmp_path):
    small = ["-p", "zero2", "-x", "fp32", "-b", 2, "--lr_schedule", "constant", "-f", "latest"]
    for steps, count in ((2, 1), (4, 2)):
        run = pretrain(*small, "--max_steps", steps, "--profile_steps", f"2-{steps}", folder=tmp_path)
        trace = run.folder / "tb_logs" / "profile" / f"steps2-{steps}-rank0.json"
        events = json.loads(trace.read_text())["traceEvents"]
        assert sum(event.get("name") == "aten::embedding" for event in events) == count


def run_out_of_memory(inspector: Inspector) -> None:
    """Take steps 2 and 3, then run out of memory."""
    with inspector:
        assert inspector.end(2) == []
        (report,) = inspector.end(3)
        assert report.endswith("step3-rank0.pickle, for pytorch.org/memory_viz")
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_snapshots_at_a_step_and_when_memory_runs_out(monkeypatch, tmp_path):
    recorded = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda *args, **options: recorded.append(options))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: open(path, "w").close())
    with pytest.raises(torch.OutOfMemoryError):
        run_out_of_memory(Inspector(Inspection(memory_snapshot=3), tmp_path))
    names = {file.name for file in (tmp_path / "memory").iterdir()}
    assert names == {"step3-rank0.pickle", "out-of-memory-rank0.pickle"}
    assert recorded == [{"max_entries": 100_000}, {"enabled": None}]


def test_mistakes_are_one_line(problems):
    assert problems_of("-p zero2 --profile_ranks 0") == [
        "--profile_ranks: takes effect only with --profile_steps; give that too, or leave it out"
    ]
    assert problems_of("-p zero2 --profile_steps 1-2 --profile_ranks 1") == [
        "--profile_ranks: 1 is none of the 1 ranks, numbered from 0"
    ]
    assert problems_of("-p zero2 --memory_snapshot 5") == [
        "--memory_snapshot: shows the memory of a GPU, and there is none; leave it out"
    ]
    assert problems("--max_steps", 5, "--profile_steps", "4-6", "-x", "bf16") == [
        "--profile_steps: the run ends at step 5, before step 6; give earlier steps"
    ]
