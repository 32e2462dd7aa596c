"""Logs in TensorBoard, metrics.jsonl and the terminal."""

import io
import json
import re
import resource
import sys
import types

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from scripts.plot_run import read_rows
from training import metrics as module
from training.metrics import Metrics, steps_with_tasks


def line(step):
    return json.dumps({"step": step}) + "\n"


def metrics_of(folder, step=0, run="run"):
    return Metrics(folder, folder / run, step, total_steps=4, total_tokens=4000, interval=2)


def values_of(step, loss):
    rates = {"lr": 3e-4, "grad_norm": 0.5, "tokens": 1000 * step, "tokens_per_second": 1000.0, "mfu": None}
    return {"step": step, "epoch": 0, "loss": loss, **rates}


class TestMetrics:
    @pytest.mark.parametrize(
        ("before", "kept"),
        [
            ([line(1), line(2)], [line(1), line(2)]),
            ([line(1), line(2)[:-1]], [line(1)]),  # torn just before its end
            ([line(1), '{"st'], [line(1)]),
            ([line(1), "\x00" * 8], [line(1)]),
            ([line(1), "\udcff\n", line(2)], [line(1), line(2)]),  # not UTF-8
            ([line(1), "{}\n", "\n", "[]\n", line(2)], [line(1), line(2)]),
            ([], []),
        ],
    )
    def test_a_resumed_file_ends_at_the_checkpoints_step(self, tmp_path, before, kept):
        path = tmp_path / "metrics.jsonl"
        path.write_text("".join(before), errors="surrogateescape")
        file, last = Metrics._open_after(path, step=2)
        with file:
            file.write(b"new\n")
        assert last == (json.loads(kept[-1]) if kept else {})
        assert path.read_text() == "".join([*kept, "new\n"])
        assert list(tmp_path.iterdir()) == [path]

    @pytest.mark.parametrize("step", [0, 2])
    def test_rows_of_later_steps_stay_in_numbered_files(self, tmp_path, step):
        """The resumed run repeats these steps."""
        rows, path = [line(number) for number in range(1, 5)], tmp_path / "metrics.jsonl"
        for _ in range(2):
            path.write_text("".join(rows))
            Metrics._open_after(path, step)[0].close()
            assert path.read_text() == "".join(rows[:step])
        for number in (1, 2):
            assert (tmp_path / f"metrics.{number}.jsonl").read_text() == "".join(rows[step:])

    def test_run_and_resumed_run_make_one_curve(self, tmp_path, capsys):
        for first, last in ((0, 3), (2, 4)):
            metrics = metrics_of(tmp_path / "logs", step=first)
            for step in range(first + 1, last + 1):
                metrics.log(values_of(step, loss=10 * first + step))
            metrics.close()
        lines = [json.loads(text) for text in (tmp_path / "logs" / "metrics.jsonl").read_text().splitlines()]
        assert [(values["step"], values["loss"]) for values in lines] == [(1, 1), (2, 2), (3, 23), (4, 24)]
        assert lines[0].items() >= values_of(1, loss=1).items()
        events = EventAccumulator(str(tmp_path / "logs")).Reload()
        assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
            (1, 1.0),
            (2, 2.0),
            (3, 23.0),
            (4, 24.0),
        ]
        assert "train/mfu" not in events.Tags()["scalars"]  # without a known peak there is nothing to plot
        assert "step 4/4: loss 24.0000, lr 3.00e-04, grad norm 0.500, 1,000 tok/s" in capsys.readouterr().out

    def test_a_restarted_run_keeps_the_rows_that_it_repeats(self, tmp_path):
        """As after a kill before the first checkpoint."""

        def log(steps, loss):
            metrics = metrics_of(tmp_path, 0)
            for number in steps:
                metrics.log(values_of(number, loss=loss))
            metrics.close()

        log((1, 2, 3), loss=7.0)
        log((1, 2), loss=5.0)
        scalars = EventAccumulator(str(tmp_path)).Reload().Scalars("train/loss")
        assert [(event.step, event.value) for event in scalars] == [(1, 5.0), (2, 5.0)]
        for name, expected in (
            ("metrics.jsonl", [(1, 5.0), (2, 5.0)]),
            ("metrics.1.jsonl", [(n, 7.0) for n in (1, 2, 3)]),
        ):
            rows = [json.loads(row) for row in (tmp_path / name).read_text().splitlines()]
            assert [(row["step"], row["loss"]) for row in rows] == expected

    @pytest.mark.parametrize("content", [b"", b"\xff\xfe"])
    def test_a_damaged_record_of_the_owner(self, tmp_path, content):
        metrics = metrics_of(tmp_path)
        metrics.log(values_of(1, loss=5))
        metrics.close()
        (tmp_path / "run.json").write_bytes(content)
        metrics_of(tmp_path, 1).close()
        assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1

    def test_checkpoints_and_logs_moved_together_continue_one_run(self, tmp_path):
        for folder, step in ((tmp_path / "here", 0), (tmp_path / "there", 1)):
            metrics = Metrics(
                folder / "logs", folder / "checkpoint", step, total_steps=4, total_tokens=4000, interval=2
            )
            metrics.log(values_of(step + 1, loss=5))
            metrics.close()
            if step == 0:
                folder.rename(tmp_path / "there")
        assert len((tmp_path / "there" / "logs" / "metrics.jsonl").read_text().splitlines()) == 2

    def test_a_skipped_step_is_reported(self, tmp_path, capsys):
        metrics = metrics_of(tmp_path)
        metrics.log({**values_of(1, loss=5), "grad_norm": None, "mfu": 0.4567})
        metrics.close()
        assert capsys.readouterr().out.endswith("overflow, step skipped, 1,000 tok/s, MFU 45.7%\n")

    def test_a_disk_that_is_full_from_the_start(self, tmp_path, capsys):
        (tmp_path / "metrics.jsonl").write_text(line(1) + line(2))
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1, most))
        try:
            metrics = metrics_of(tmp_path, step=1)
            metrics.describe(1, {"lr": 3e-4}, {})
            metrics.log(values_of(2, loss=5))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        metrics.log(values_of(3, loss=5))
        metrics.close()
        lines = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert [values["step"] for values in lines] == [1, 3]
        assert [event.step for event in EventAccumulator(str(tmp_path)).Reload().Scalars("train/loss")] == [3]
        assert capsys.readouterr().out.count("cannot be logged") == 1

    def test_a_full_disk_loses_rows_but_not_the_run(self, tmp_path, capsys):
        metrics = metrics_of(tmp_path)
        metrics.log(values_of(1, loss=5))
        size = (tmp_path / "metrics.jsonl").stat().st_size
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, most))  # room for part of the next row
        try:
            for step in (2, 3):
                metrics.log(values_of(step, loss=5))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        metrics.log(values_of(4, loss=5))
        metrics.close()
        lines = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert [values["step"] for values in lines] == [1, 4]
        events = EventAccumulator(str(tmp_path)).Reload().Scalars("train/loss")
        assert events[-1].step == 4
        assert capsys.readouterr().out.count("cannot be logged") == 1

    def test_other_ranks_write_nothing(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setenv("RANK", "1")
        metrics = metrics_of(tmp_path / "logs")
        metrics.log(values_of(1, loss=5))
        metrics.close()
        assert not (tmp_path / "logs").exists()
        assert capsys.readouterr() == ("", "")

    def test_evaluations_have_their_own_curves_and_lines(self, tmp_path, capsys):
        metrics = metrics_of(tmp_path)
        metrics.log(values_of(1, loss=2.0) | {"eval_loss": 3.0, "eval_perplexity": 20.0855})
        metrics.log(values_of(2, loss=1.0))
        metrics.close()
        events = EventAccumulator(str(tmp_path)).Reload()
        assert [(event.step, event.value) for event in events.Scalars("eval/loss")] == [(1, 3.0)]
        assert [event.step for event in events.Scalars("eval/perplexity")] == [1]
        assert "step 1: loss 3.0000, perplexity 20.09 on held-out documents" in capsys.readouterr().out.splitlines()

    @pytest.mark.slow
    def test_flags_and_configuration_are_in_tensorboard(self, tmp_path):
        metrics = metrics_of(tmp_path, step=2)
        metrics.describe(2, {"lr": 3e-4, "load": None, "seed": 42}, {"model": "LLaMA"})
        metrics.close()
        events = EventAccumulator(str(tmp_path)).Reload()
        (flags,), (model,) = (events.Tensors(f"{title}/text_summary") for title in ("flags", "model"))
        assert (flags.step, model.step) == (2, 2)
        assert flags.tensor_proto.string_val[0].decode().splitlines()[2:] == [
            "| lr | 0.0003 |",
            "| load | None |",
            "| seed | 42 |",
        ]
        assert model.tensor_proto.string_val == [b"LLaMA"]
        start = HParamsPluginData.FromString(
            events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
        )
        assert start.session_start_info.hparams["lr"].number_value == 3e-4


class TestScoresOnTasks:
    """They come after the rows of later steps."""

    def test_they_are_logged_at_their_step(self, tmp_path, capsys):
        metrics = metrics_of(tmp_path)
        metrics.wandb = types.SimpleNamespace(log=(sent := []).append, close=lambda: None)
        for step in (1, 2):
            metrics.log(values_of(step, loss=step))
        metrics.log_tasks(1, {"words/acc": 0.25, "words/f1": None}, seconds=61)
        metrics.log(values_of(3, loss=3))
        assert metrics.summary()[0].startswith("trained: 3 steps, 3,000 tokens")
        metrics.close()
        row = {"step": 1, "eval_tasks/words/acc": 0.25, "eval_tasks/words/f1": None}
        rows = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [1, 2, 1, 3]
        assert rows[2] == sent[2] == row
        events = EventAccumulator(str(tmp_path)).Reload()
        assert [(event.step, event.value) for event in events.Scalars("eval/tasks/words/acc")] == [(1, 0.25)]
        assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]
        assert "step 1: words/acc 0.2500 (evaluated in 01:01)" in capsys.readouterr().out.splitlines()
        columns = read_rows(tmp_path / "metrics.jsonl")
        assert columns["step"].tolist() == [1, 2, 3]
        assert columns["loss"].tolist() == [1, 2, 3]
        assert columns["eval_tasks/words/acc"].tolist()[0] == 0.25

    def test_a_resume_keeps_those_of_the_steps_that_it_keeps(self, tmp_path):
        metrics = metrics_of(tmp_path)
        for step in (1, 2, 3):
            metrics.log(values_of(step, loss=step))
        for step in (3, 1):
            metrics.log_tasks(step, {"words/acc": 0.25}, seconds=1)
        metrics.close()
        with open(tmp_path / "metrics.jsonl", "a") as file:
            file.write('{"step": 2, "eval_tasks/words/acc": 0.')  # torn
        assert [steps_with_tasks(tmp_path, step) for step in (0, 2, 3)] == [set(), {1}, {1, 3}]
        hours = metrics.last["hours"]
        metrics = metrics_of(tmp_path, step=2)
        assert (metrics.last["step"], metrics.last["hours"] <= hours) == (2, True)
        metrics.close()
        assert steps_with_tasks(tmp_path, 3) == {1}
        rows = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [1, 2, 1]

    def test_the_first_row_after_a_full_disk_removes_no_curve(self, tmp_path):
        metrics = metrics_of(tmp_path)
        for step in (1, 2, 3):
            metrics.log(values_of(step, loss=step))
        metrics.failing = True
        metrics.log_tasks(1, {"words/acc": 0.25}, seconds=1)
        metrics.close()
        events = EventAccumulator(str(tmp_path)).Reload().Scalars("train/loss")
        assert [event.step for event in events] == [1, 2]  # the last step counts as not logged


class TestTime:
    """Times by a clock that the test advances."""

    @pytest.fixture
    def clock(self, monkeypatch) -> list[float]:
        now = [1000.0]
        monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
        return now

    def log(self, clock, metrics, steps, seconds=3600) -> None:
        for step in steps:
            clock[0] += seconds
            metrics.log(values_of(step, loss=step))
        metrics.close()

    def test_hours_continue_in_a_resumed_run(self, tmp_path, clock):
        self.log(clock, metrics_of(tmp_path), (1, 2, 3))
        clock[0] += 1e6
        metrics = metrics_of(tmp_path, step=2)
        self.log(clock, metrics, (3, 4), seconds=1800)
        rows = [json.loads(row) for row in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert [row["hours"] for row in rows] == [1, 2, 2.5, 3]
        assert metrics.summary() == [
            "trained: 4 steps, 4,000 tokens, 3.000 hours in all; loss 4.0000",
            "speed: 1 tok/s on average, saves and evaluations included",
        ]

    def test_summary_with_gpu_hours(self, tmp_path, clock, monkeypatch):
        """The loss is averaged, since that of one step is noisy; GPU-hours include saves and evaluations."""
        monkeypatch.setattr(module.torch.cuda, "is_available", lambda: True)
        monkeypatch.setenv("WORLD_SIZE", "8")
        metrics = Metrics(tmp_path, tmp_path / "run", 0, total_steps=21, total_tokens=21_000, interval=10)
        for step in range(1, 22):
            clock[0] += 90
            metrics.log({**values_of(step, loss=step), "mfu": 0.4})
        clock[0] += 200
        assert metrics.summary() == [
            "trained: 21 steps, 21,000 tokens, 0.525 hours in all; loss 21.0000 (mean of the last 20 steps: 11.5000)",
            "speed: 10 tok/s, MFU 0.4% on average, saves and evaluations included; "
            "8 GPUs x 0.581 hours = 4.644 GPU-hours",
        ]
        metrics.close()

    def test_time_left_excludes_the_first_step(self, tmp_path, clock, capsys):
        metrics = Metrics(tmp_path, tmp_path / "run", 0, total_steps=100, total_tokens=100_000, interval=10)
        clock[0] += 500
        self.log(clock, metrics, range(1, 31), seconds=60)
        lines = capsys.readouterr().out.splitlines()
        assert [line.rpartition(", ")[2] for line in lines] == [
            "1,000 tok/s",
            "1:30:00 left",
            "1:20:00 left",
            "1:10:00 left",
        ]

    def test_time_left_counts_tokens(self, tmp_path, clock, capsys):
        """In a stage of other batches, 10 steps have as many tokens as 20 before; each takes twice as long."""
        metrics = Metrics(tmp_path, tmp_path / "run", 0, total_steps=30, total_tokens=40_000, interval=10)
        for step in range(1, 31):
            tokens = 1000 * step if step <= 20 else 20_000 + 2000 * (step - 20)
            clock[0] += 60 if step <= 20 else 120
            metrics.log({**values_of(step, loss=5), "tokens": tokens})
        lines = [line for line in capsys.readouterr().out.splitlines() if line.endswith("left")]
        assert [line.rpartition(", ")[2] for line in lines] == ["30:00 left", "20:00 left"]

    def test_progress_bar_in_a_terminal(self, tmp_path, monkeypatch):
        terminal = io.StringIO()
        terminal.isatty = lambda: True
        monkeypatch.setattr(sys, "stderr", terminal)
        metrics = metrics_of(tmp_path)
        metrics.log({**values_of(1, loss=5), "mfu": 0.4567})
        metrics.bar.refresh()
        metrics.close()
        shown = re.search(r"training: 1/4 \[\d\d:\d\d<[\d:?]+, ([^]]*)\]", terminal.getvalue())
        assert shown, terminal.getvalue()
        assert shown[1] == "loss 5.0000, 1,000 tok/s, MFU 45.7%, lr 3.00e-04, grad norm 0.500"
