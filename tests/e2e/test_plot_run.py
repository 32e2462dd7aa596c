"""Plots of real runs' logs."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from matplotlib import pyplot

from launching import ROOT, run_script
from runtime.console import InputError
from runtime.process import USAGE_ERROR
from scripts import plot_run
from scripts.plot_run import LoggedRun, draw, main, read_run


@pytest.fixture
def logs(finished_run):
    return finished_run.folder / "tb_logs"


@pytest.fixture(autouse=True)
def _closed_figures():
    yield
    pyplot.close("all")


def plot(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["plot_run.py", *map(str, arguments)])
    return main()


def titles(figure) -> list[str]:
    return [axis.get_title() for axis in figure.axes if axis.axison]


def test_plot_run_as_a_command(logs, tmp_path):
    command = [sys.executable, ROOT / "scripts" / "plot_run.py", logs, "--output", tmp_path / "run.png"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert f"{logs}: step 3, 1.54k tokens, loss " in done.stdout
    assert done.stderr == ""
    assert pyplot.imread(tmp_path / "run.png").shape == (520, 1040, 4)


def test_curves_equal_the_logged_values(logs, finished_run):
    figure = draw([read_run(str(logs))])
    expected = [
        ("loss", "loss"),
        ("learning rate", "lr"),
        ("gradient norm", "grad_norm"),
        ("through", "tokens_per_second"),
    ]
    for (title, key), axis in zip(expected, figure.axes, strict=False):
        assert axis.get_title().startswith(title)
        (line,) = axis.lines
        assert line.get_xdata().tolist() == [1, 2, 3]
        assert line.get_ydata().tolist() == finished_run.column(key)
    assert titles(figure)[-1].startswith("TFLOPS/GPU")  # instead of MFU, since a CPU's peak is unknown


def test_tensorboard_events_have_the_same_values(logs, tmp_path):
    events = shutil.copytree(logs, tmp_path / "events", ignore=shutil.ignore_patterns("metrics.jsonl"))
    from_events, from_rows = read_run(str(events)), read_run(f"named={logs}")
    assert (from_events.name, from_rows.name) == (str(events), "named")
    assert from_events.columns.keys() == from_rows.columns.keys() - {"epoch", "mfu"}
    for key, values in from_events.columns.items():
        np.testing.assert_allclose(values, from_rows.columns[key], rtol=1e-6)


def test_several_runs_by_tokens_with_evaluations_and_mfu(logs, tmp_path):
    rows = [json.loads(row) for row in (logs / "metrics.jsonl").read_text().splitlines()]
    rows[1] |= {"mfu": 0.5, "eval_loss": 6.0, "grad_norm": None}  # as on a GPU after an fp16 overflow
    other = tmp_path / "metrics.jsonl"
    other.write_text("".join(f"{json.dumps(row)}\n" for row in rows) + '{"step": 4, "lo')  # still being written
    figure = draw([read_run(str(logs)), read_run(f"other={other}")], x="tokens", smooth=2)
    loss, _, grad_norm, _, mfu, legend = figure.axes
    assert mfu.get_title() == "MFU, %"
    assert mfu.lines[0].get_ydata().tolist() == [50.0]
    assert [512, 1536] in [line.get_xdata().tolist() for line in grad_norm.lines]
    assert [6.0] in [line.get_ydata().tolist() for line in loss.lines]
    names = [text.get_text().partition("\n")[0] for text in legend.get_legend().get_texts()]
    assert names == [str(logs), "other", "loss on held-out documents"]


def test_neighbors_are_averaged_in_long_runs():
    steps = np.arange(1.0, 10_001)
    run = LoggedRun("long", {"step": steps, "loss": steps % 2, "lr": steps})
    position, loss = run.curve("step", "loss")
    assert len(loss) == plot_run.MAX_POINTS
    assert position[:2].tolist() == [3.0, 8.0]
    np.testing.assert_allclose(loss[:2], [0.6, 0.4])
    _, smooth = LoggedRun("", {"step": steps[:6], "loss": steps[:6]}).curve("step", "loss", smooth=3)
    assert smooth.tolist() == [1, 1.5, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("make", "arguments", "expected"),
    [
        (None, ["nowhere"], "nowhere does not exist; give a run's --tensorboard_dir"),
        ("folder", ["run"], "run has neither metrics.jsonl nor TensorBoard events"),
        ("", ["run"], "has no step yet"),
        ("words\n{}\n", ["run"], "line 1: not a row of metrics"),
        ('{"loss": 1}\n', ["run"], "line 1: not a row of metrics"),
        ('{"step": 1}\n', ["run", "--x", "hours"], "--x: run has no 'hours'"),
        ('{"step": 1}\n', ["run", "--output", "run.jpg"], "--output: run.jpg does not end in .png"),
        ('{"step": 1}\n', ["run", "--output", "no/run.png"], "--output: folder "),
        ('{"step": 1}\n', ["run", "--smooth", "0"], "--smooth: must be at least 1, not 0"),
    ],
)
def test_mistakes(monkeypatch, tmp_path, make, arguments, expected):
    monkeypatch.chdir(tmp_path)
    if make is not None:
        (tmp_path / "run").mkdir()
        if make != "folder":
            (tmp_path / "run" / "metrics.jsonl").write_text(make)
    with pytest.raises(InputError) as raised:
        plot(monkeypatch, *arguments)
    (problem,) = raised.value.problems
    assert expected in problem
    assert not list(tmp_path.glob("**/*.png"))


def test_a_folder_without_write_permission(monkeypatch, logs, locked_folder):
    with pytest.raises(InputError, match=f"^--output: no permission to write in {locked_folder}; give another folder$"):
        plot(monkeypatch, logs, "--output", locked_folder / "run.png")


def test_exit_status(tmp_path):
    done = run_script(ROOT / "scripts" / "plot_run.py", "nowhere", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (USAGE_ERROR, "")
    assert done.stderr.startswith("plot_run.py: error: nowhere does not exist")
