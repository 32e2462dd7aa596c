"""Plot the logs of runs: loss, learning rate, gradient norm, throughput and MFU, with several runs in each panel.

    python scripts/plot_run.py tb_logs --output run.png
    python scripts/plot_run.py first=runs/1/tb_logs second=runs/2/tb_logs --x tokens --smooth 50

A run is its log folder or its metrics.jsonl; NAME= before it sets its name in the legend. In a folder without a
metrics.jsonl, the TensorBoard events are read. A run that is still in progress can be plotted too.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from runtime import process, requirements

requirements.require()

import argparse
import json
from dataclasses import dataclass

import matplotlib
import numpy as np

matplotlib.use("Agg")  # needs no display
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter

from runtime.console import InputError, below
from runtime.files import file_problems
from training.flags import ArgumentParser, add_flag, user_path
from training.metrics import LOG_FILE

MAX_POINTS = 2000  # in a curve; of more, neighbours are averaged
X_LABELS = {"step": "optimizer step", "tokens": "tokens", "hours": "hours of training"}


@dataclass(frozen=True)
class Panel:
    key: str
    title: str
    scale: str = "linear"
    unit: EngFormatter | None = None
    noisy: bool = True
    factor: float = 1  # from the logged value to the one shown


PANELS = (
    Panel("loss", "loss, nats a token"),
    Panel("lr", "learning rate", noisy=False),
    Panel("grad_norm", "gradient norm", scale="log"),
    Panel("tokens_per_second", "throughput, tokens/s", unit=EngFormatter(sep="")),
    Panel("mfu", "MFU, %", factor=100),
)
TFLOPS = Panel("tflops", "TFLOPS/GPU (the device's peak is unknown)")  # instead of MFU


@dataclass
class LoggedRun:
    """A run's logged columns by name, float64 [rows], NaN if a row has no value.

    Attributes:
        folder: of the logs.
    """

    name: str
    columns: dict[str, np.ndarray]
    folder: Path = Path()

    def has(self, key: str) -> bool:
        return key in self.columns and bool(np.isfinite(self.columns[key]).any())

    def boundaries(self, x: str) -> np.ndarray:
        """Return x at the first row of each stage after the first (--stages)."""
        stages = np.nan_to_num(self.columns.get("stage", np.zeros(len(self.columns["step"]))))
        return self.columns[x][1:][np.diff(stages) > 0]

    def curve(self, x: str, key: str, smooth: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Return x and the values where both exist, averaged over `smooth` rows and to at most MAX_POINTS points."""
        position, values = self.columns[x], self.columns[key]
        there = np.isfinite(position) & np.isfinite(values)
        position, values = position[there], values[there]
        if smooth > 1:
            totals = np.cumsum(np.insert(values, 0, 0.0))
            last = np.arange(1, len(values) + 1)
            first = np.maximum(last - smooth, 0)
            values = (totals[last] - totals[first]) / (last - first)
        starts = np.arange(0, len(values), -(-len(values) // MAX_POINTS) or 1)
        if len(starts) < len(values):
            counts = np.diff(np.append(starts, len(values)))
            position, values = (np.add.reduceat(column, starts) / counts for column in (position, values))
        return position, values


# ----------------------------------------------------------------------------------------------------------- the files


def read_run(text: str) -> LoggedRun:
    """Read a run given on the command line.

    Raises:
        InputError: the log does not exist, is unreadable, or has no step yet.
    """
    name, separator, place = text.partition("=")
    if not separator or Path(text).exists():
        name, place = text, text
    path = Path(place).expanduser()
    if path.is_dir() and (path / LOG_FILE).is_file():
        path = path / LOG_FILE
    if path.is_file():
        columns = read_rows(path)
    elif path.is_dir() and any(path.glob("events.out.tfevents.*")):
        columns = read_events(path)
    elif path.exists():
        raise InputError(f"{path} has neither {LOG_FILE} nor TensorBoard events; give a run's --tensorboard_dir")
    else:
        raise InputError(f"{path} does not exist; give a run's --tensorboard_dir, or the metrics.jsonl in it")
    if not len(columns.get("step", ())):
        raise InputError(f"{path} has no step yet; plot it after the first one")
    return LoggedRun(name, columns, path if path.is_dir() else path.parent)


def read_rows(path: Path) -> dict[str, np.ndarray]:
    """Read the columns of a metrics.jsonl, without a last line that is still being written; one row per step."""
    rows: dict[float, dict[str, float]] = {}
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = {key: float(value) for key, value in json.loads(line).items() if value is not None}
                rows.setdefault(row["step"], {}).update(row)
            except (ValueError, TypeError, AttributeError, KeyError) as error:
                if not line.endswith("\n"):
                    break
                raise InputError(
                    f"{path}, line {number}: not a row of metrics; give a file that a run has written"
                ) from error
    return as_columns([rows[step] for step in sorted(rows)])


def as_columns(rows: list[dict[str, float]]) -> dict[str, np.ndarray]:
    keys = dict.fromkeys(key for row in rows for key in row)
    return {key: np.array([row.get(key, np.nan) for row in rows]) for key in keys}


def read_events(folder: Path) -> dict[str, np.ndarray]:
    """Read the columns of TensorBoard events; a step that a resumed run repeated counts once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    rows: dict[int, dict[str, float]] = {}
    for tag in events.Tags()["scalars"]:
        group, _, key = tag.partition("/")
        for event in events.Scalars(tag):
            rows.setdefault(event.step, {"step": event.step})[f"eval_{key}" if group == "eval" else key] = event.value
    return as_columns([rows[step] for step in sorted(rows)])


# --------------------------------------------------------------------------------------------------------- the picture


def draw(runs: list[LoggedRun], x: str = "step", smooth: int = 1) -> pyplot.Figure:
    """Return a figure with a panel per curve, a color per run, and a legend in the last panel."""
    figure, axes = pyplot.subplots(2, 3, figsize=(13, 6.5), layout="constrained")
    colors = pyplot.rcParams["axes.prop_cycle"].by_key()["color"]
    for panel, axis in zip(panels_of(runs), axes.flat, strict=False):
        for number, run in enumerate(runs):
            draw_curve(axis, run, panel, x, smooth, colors[number % len(colors)])
            for place in run.boundaries(x):
                axis.axvline(place, color=colors[number % len(colors)], linestyle=":", linewidth=0.9)
        finish(axis, panel, x)
    draw_legend(axes.flat[-1], runs, colors)
    return figure


def panels_of(runs: list[LoggedRun]) -> list[Panel]:
    return [*PANELS[:-1], PANELS[-1] if any(run.has("mfu") for run in runs) else TFLOPS]


def draw_curve(axis: Axes, run: LoggedRun, panel: Panel, x: str, smooth: int, color: str) -> None:
    if not run.has(panel.key):
        return
    position, values = run.curve(x, panel.key, smooth if panel.noisy else 1)
    axis.plot(position, panel.factor * values, color=color, linewidth=1.3)
    if smooth > 1 and panel.noisy:
        position, values = run.curve(x, panel.key)
        axis.plot(position, panel.factor * values, color=color, linewidth=0.5, alpha=0.3)
    if panel.key == "loss" and run.has("eval_loss"):
        axis.plot(*run.curve(x, "eval_loss"), "o--", color=color, markersize=4, linewidth=0.8)


def finish(axis: Axes, panel: Panel, x: str) -> None:
    axis.set_title(panel.title, fontsize=10)
    axis.set_xlabel(X_LABELS[x], fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)
    axis.set_yscale(panel.scale)
    if x != "hours":
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    if panel.unit:
        axis.yaxis.set_major_formatter(panel.unit)
    if not axis.lines:
        axis.text(0.5, 0.5, "not logged", ha="center", va="center", transform=axis.transAxes, color="gray")


def draw_legend(axis: Axes, runs: list[LoggedRun], colors: list[str]) -> None:
    axis.axis("off")
    for number, run in enumerate(runs):
        axis.plot([], [], color=colors[number % len(colors)], linewidth=3, label=f"{run.name}\n{summary(run)}")
    if any(run.has("eval_loss") for run in runs):
        axis.plot([], [], "o--", color="gray", label="loss on held-out documents")
    if any(len(run.boundaries("step")) for run in runs):
        axis.plot([], [], ":", color="gray", label="a stage begins")
    axis.legend(loc="center", fontsize=8, frameon=False, labelspacing=1)


def summary(run: LoggedRun) -> str:
    """Summarize a run in one line: its last step, tokens and loss."""
    parts = [f"step {int(run.columns['step'][-1]):,}"]
    if run.has("tokens"):
        parts.append(f"{EngFormatter(places=2, sep='')(run.columns['tokens'][-1])} tokens")
    if run.has("loss"):
        _, losses = run.curve("step", "loss", smooth=20)
        parts.append(f"loss {losses[-1]:.3f}")
    return ", ".join(parts)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(prog="plot_run.py", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="[NAME=]RUN", help="a run's --tensorboard_dir or metrics.jsonl")
    add_flag(parser, "-o --output", "run.png", "the PNG file", type=user_path)
    add_flag(parser, "--x", "step", "horizontal axis", choices=tuple(X_LABELS))
    add_flag(parser, "--smooth", 1, "rows in a moving average, drawn over the pale rows")
    return parser.parse_args(arguments)


def main() -> int:
    args = parse_args()
    problems = below(1, smooth=args.smooth) + file_problems("--output", args.output)
    if args.output.suffix.lower() != ".png":
        problems.append(f"--output: {args.output} does not end in .png; choose a name that does")
    if problems:
        raise InputError(*problems)
    runs = [read_run(text) for text in args.runs]
    for run in runs:
        if not run.has(args.x):
            raise InputError(f"--x: {run.name} has no '{args.x}' in its logs; plot it by step")
    existed = args.output.exists()
    try:
        draw(runs, args.x, args.smooth).savefig(args.output, dpi=80)
    except OSError as error:
        if not existed:
            args.output.unlink(missing_ok=True)
        raise InputError(f"--output: {args.output} cannot be written ({error.strerror}); give another file") from error
    for run in runs:
        print(f"{run.name}: {summary(run)}")
    print(f"picture: {args.output}")
    return 0


if __name__ == "__main__":
    process.run(main, "plot_run.py")
