"""Write one HTML page of runs: curves, final figures, data, checkpoints, generated text and configuration.

    python scripts/report.py tb_logs --output report.html
    python scripts/report.py first=runs/1/tb_logs second=runs/2/tb_logs --x tokens --prompt "Once upon a time" "def "

A run is given as for plot_run.py: its log folder or its metrics.jsonl; NAME= before it sets its name. The page is one
file that needs neither server nor network. The checkpoints and the model that generates text are found through
run.json, which a run writes into its log folder. A run that is still in progress can be reported too.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from runtime import process, requirements

requirements.require()

import argparse
import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from html import escape
from string import Template

import numpy as np
from matplotlib.ticker import EngFormatter, MaxNLocator

from checkpointing.folder import MANIFEST, complete_checkpoints, read_running_states
from data_utils import draws_of, epochs_of
from runtime.console import InputError, below, size_text
from runtime.files import file_problems
from scripts.plot_run import X_LABELS, LoggedRun, Panel, panels_of, read_run, summary
from training.flags import ArgumentParser, add_flag, user_path
from training.folders import OWNER

PAGE = Path(__file__).with_name("report_page.html")
COLORS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f")
GOODPUT = Panel("goodput", "goodput, %", noisy=False, factor=100)
LEFT, TOP, WIDTH, HEIGHT = 48, 8, 380, 190  # of the area inside a chart's axes, in the SVG's units
NEW_TOKENS = 60
PROMPT = "Once upon a time"


@dataclass
class Described:
    """A run's logs, and what else its folders tell.

    Attributes:
        texts: the latest description in TensorBoard, Markdown by title.
        save_dir: the folder of checkpoints; None if the log folder does not name it, or it is gone.
    """

    run: LoggedRun
    color: str
    texts: dict[str, str] = field(default_factory=dict)
    save_dir: Path | None = None

    @property
    def label(self) -> str:
        return f'<span class="key" style="background:{self.color}"></span>{escape(self.run.name)}'

    @property
    def flags(self) -> dict[str, str]:
        """The flags, from the table that Metrics.describe wrote."""
        rows = (line.removeprefix("| ").removesuffix(" |") for line in self.texts.get("flags", "").splitlines()[2:])
        return {name: value for name, _, value in (row.partition(" | ") for row in rows)}

    @property
    def model(self) -> Path | None:
        """The folder of the final model; None if there is none."""
        folder = self.save_dir / "final" if self.save_dir else None
        return folder if folder and folder.is_dir() else None


# ------------------------------------------------------------------------------------------------------------- reading


def describe(run: LoggedRun, color: str) -> Described:
    """Read what lies beside a run's logs."""
    described = Described(run, color, read_texts(run.folder))
    try:
        save_dir = run.folder / json.loads((run.folder / OWNER).read_bytes())["save_dir"]
    except (OSError, ValueError, LookupError, TypeError):
        return described  # the logs of an older version, or a copy
    described.save_dir = save_dir.resolve() if save_dir.is_dir() else None
    return described


def read_texts(folder: Path) -> dict[str, str]:
    """Return the texts in a folder's TensorBoard events by title, each as it was written last."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if next(folder.glob("events.out.tfevents.*"), None) is None:
        return {}
    events = EventAccumulator(str(folder)).Reload()
    suffix = "/text_summary"
    return {
        tag.removesuffix(suffix): events.Tensors(tag)[-1].tensor_proto.string_val[0].decode(errors="replace")
        for tag in events.Tags()["tensors"]
        if tag.endswith(suffix)
    }


# -------------------------------------------------------------------------------------------------------------- charts


def charts(runs: list[Described], x: str) -> str:
    panels = [*panels_of([described.run for described in runs]), GOODPUT]
    figures = [chart(panel, runs, x) for panel in panels]
    return f'<h2>Curves by {X_LABELS[x]}</h2><div class="charts">{"".join(figures)}</div>'


def chart(panel: Panel, runs: list[Described], x: str) -> str:
    """Return a figure with a curve per run, and the loss on held-out documents dashed."""
    keys = (panel.key, "eval_loss") if panel.key == "loss" else (panel.key,)
    curves = []
    for described in runs:
        for key in keys:
            if described.run.has(key):
                position, values = described.run.curve(x, key)
                shown = (values > 0) | (panel.scale != "log")
                if shown.any():
                    curves.append((described, key, position[shown], panel.factor * values[shown]))
    title = f"<figcaption>{escape(panel.title)}</figcaption>"
    if not curves:
        return f'<figure>{title}<p class="muted">not logged</p></figure>'
    log = panel.scale == "log"
    horizontal = Axis([position for *_, position, _ in curves], LEFT, WIDTH)
    vertical = Axis([values for *_, values in curves], TOP + HEIGHT, -HEIGHT, log)
    unit = None if x == "hours" else EngFormatter(sep="")
    parts = [*grid(horizontal, vertical, unit, panel.unit), *(line(*curve, horizontal, vertical) for curve in curves)]
    for described in runs:
        for place in horizontal.place(described.run.boundaries(x)):
            style = f'stroke="{described.color}" stroke-dasharray="2 3"'
            parts.append(
                f'<path class="stage" d="M{place:.1f} {TOP}v{HEIGHT}" {style}><title>a stage begins</title></path>'
            )
    data = {
        **{"left": LEFT, "top": TOP, "width": WIDTH, "height": HEIGHT, "log": int(log)},
        **{"x-low": horizontal.low, "x-high": horizontal.high, "y-low": vertical.low, "y-high": vertical.high},
    }
    attributes = " ".join(f'data-{name}="{float(value)!r}"' for name, value in data.items())
    size = f"0 0 {LEFT + WIDTH + 16} {TOP + HEIGHT + 24}"
    text = f'<svg viewBox="{size}" role="img" aria-label="{escape(panel.title)}" {attributes}>{"".join(parts)}</svg>'
    return f'<figure>{title}{text}<div class="readout"></div></figure>'


class Axis:
    """The scale of a chart's axis, which maps values to the SVG's units."""

    def __init__(self, columns: list[np.ndarray], start: float, length: float, log: bool = False):
        values = np.concatenate(columns)
        self.start, self.length, self.log = start, length, log
        self.least, self.most = float(values.min()), float(values.max())
        low, high = self._scaled(np.array([self.least, self.most]))
        if low == high:
            low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
        self.low, self.high = float(low), float(high)

    def _scaled(self, values: np.ndarray) -> np.ndarray:
        return np.log10(values) if self.log else values

    def place(self, values: np.ndarray) -> np.ndarray:
        return self.start + (self._scaled(values) - self.low) / (self.high - self.low) * self.length

    def ticks(self) -> list[float]:
        """Return round values on the axis; powers of ten if a logarithmic one spans more than two."""
        if self.log and self.high - self.low > 2:
            return [10.0**power for power in range(int(np.ceil(self.low)), int(np.floor(self.high)) + 1)]
        bounds = (10**self.low, 10**self.high) if self.log else (self.low, self.high)
        ticks = MaxNLocator(5).tick_values(*bounds)
        return [float(tick) for tick in ticks if bounds[0] <= tick <= bounds[1] and (tick > 0 or not self.log)]


def grid(horizontal: Axis, vertical: Axis, x_unit: EngFormatter | None, y_unit: EngFormatter | None) -> list[str]:
    """Return the lines and labels of the ticks."""
    parts = []
    for tick in horizontal.ticks():
        place, label = float(horizontal.place(np.array(tick))), x_unit(tick) if x_unit else f"{tick:.4g}"
        parts.append(f'<path class="grid" d="M{place:.1f} {TOP}v{HEIGHT}"/>')
        parts.append(f'<text x="{place:.1f}" y="{TOP + HEIGHT + 16}" text-anchor="middle">{label}</text>')
    for tick in vertical.ticks():
        place, label = float(vertical.place(np.array(tick))), y_unit(tick) if y_unit else f"{tick:.4g}"
        parts.append(f'<path class="grid" d="M{LEFT} {place:.1f}h{WIDTH}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{place + 4:.1f}" text-anchor="end">{label}</text>')
    return parts


def line(described: Described, key: str, x: np.ndarray, y: np.ndarray, horizontal: Axis, vertical: Axis) -> str:
    """Return a curve; its points keep three decimals, from which the page reads the values back."""
    places = list(zip(horizontal.place(x), vertical.place(y), strict=True))
    points = " ".join(f"{left:.3f},{top:.3f}" for left, top in places)
    held_out = key == "eval_loss"
    style = ' stroke-dasharray="5 3"' if held_out else ""
    name = escape(described.run.name + (" on held-out documents" if held_out else ""))
    text = f'<polyline data-name="{name}" points="{points}" stroke="{described.color}" stroke-width="1.5"{style}/>'
    if held_out or len(places) == 1:
        text += "".join(
            f'<circle cx="{left:.1f}" cy="{top:.1f}" r="2.5" fill="{described.color}"/>' for left, top in places
        )
    return text


# -------------------------------------------------------------------------------------------------------------- tables


def table(head: list[str], rows: list[list[str]], classes: list[str] | None = None) -> str:
    """Return a table of cells that are HTML already."""
    lines = ["<tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>"]
    for row, name in zip(rows, classes or [""] * len(rows), strict=True):
        lines.append(f'<tr class="{name}">' + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>")
    return f"<table>{''.join(lines)}</table>"


def figures(runs: list[Described]) -> str:
    """Return a table of the last figures, a column per run, with all that was evaluated."""
    evaluated = dict.fromkeys(
        key for described in runs for key in described.run.columns if key.startswith("eval") and described.run.has(key)
    )
    rows = [
        ["steps", *(f"{last(described.run, 'step'):,.0f}" for described in runs)],
        ["tokens", *(number(described.run, "tokens", ",.0f") for described in runs)],
        ["hours of training", *(number(described.run, "hours", ",.3f") for described in runs)],
        ["loss, mean of the last 20 steps", *(number(described.run, "loss", ".4f", 20) for described in runs)],
        *([escape(key), *(number(described.run, key, ".4f") for described in runs)] for key in evaluated),
        ["tokens/s, median", *(median(described.run, "tokens_per_second", ",.0f") for described in runs)],
        ["MFU, median", *(median(described.run, "mfu", ".1%") for described in runs)],
        ["goodput", *(number(described.run, "goodput", ".1%") for described in runs)],
        ["memory", *(number(described.run, "memory_gb", ",.2f", unit=" GB") for described in runs)],
        ["steps that updated nothing", *(number(described.run, "skipped_steps", ",.0f") for described in runs)],
    ]
    return "<h2>Figures</h2>" + table(["", *(described.label for described in runs)], rows)


def last(run: LoggedRun, key: str, mean: int = 1) -> float:
    """Return the mean of a column's last values; NaN if it has none."""
    if not run.has(key):
        return float("nan")
    values = run.columns[key]
    return float(values[np.isfinite(values)][-mean:].mean())


def number(run: LoggedRun, key: str, form: str, mean: int = 1, unit: str = "") -> str:
    return f"{last(run, key, mean):{form}}{unit}" if run.has(key) else "-"


def median(run: LoggedRun, key: str, form: str) -> str:
    return f"{np.nanmedian(run.columns[key]):{form}}" if run.has(key) else "-"


def data(described: Described) -> str:
    """Return a table of a run's data sets, from the newest checkpoint if it trains on several."""
    newest = next(complete_checkpoints(described.save_dir), None) if described.save_dir else None
    states = read_running_states(newest[1]) if newest else {}
    if mixture := states.get("mixture"):
        weights, epochs = mixture["weights"], epochs_of(mixture, states["sequences"])
        read = draws_of(mixture, states["sequences"])
        read |= {name: round(epochs[name] * mixture["lengths"][name]) for name in epochs}  # in today's length
        rows = [
            [
                *(escape(name), f"{weights[name]:.2%}" if name in weights else "-", f"{read[name]:,}"),
                f"{epochs[name]:.2f}" if name in epochs else "not recorded",
            ]
            for name in weights | epochs
        ]
        note = f'<p class="muted">as of the checkpoint at step {states["step"]:,}</p>'
        return table(["data set", "weight", "sequences read", "epochs"], rows) + note
    passes = f"{last(described.run, 'epoch') + 1:,.0f}" if described.run.has("epoch") else "-"
    name = described.flags.get("dataset", "not recorded")
    return table(
        ["data set", "in pass", "tokens read"], [[escape(name), passes, number(described.run, "tokens", ",.0f")]]
    )


def configuration(runs: list[Described]) -> str:
    """Return the flags, a column per run, with those marked that differ; then each run's plan, machine and model."""
    names = dict.fromkeys(name for described in runs for name in described.flags)
    if not names:
        return '<p class="muted">not recorded: the log folder has no TensorBoard events</p>'
    rows = [[name, *(described.flags.get(name, "-") for described in runs)] for name in names]
    classes = ["differs" if len(set(row[1:])) > 1 else "" for row in rows]
    head = ["flag", *(described.label for described in runs)]
    parts = [
        "<details open><summary>flags</summary>",
        table(head, [list(map(escape, row)) for row in rows], classes),
        "</details>",
    ]
    for described in runs:
        texts = "\n".join(described.texts.get(title, "").strip("`\n") for title in ("plan", "machine", "model"))
        parts.append(
            f"<details><summary>{described.label}: plan, machine, model</summary><pre>{escape(texts)}</pre></details>"
        )
    return "".join(parts)


def checkpoints(described: Described) -> str:
    """Return a table of the complete checkpoints and the final model."""
    if described.save_dir is None:
        return '<p class="muted">the folder of checkpoints is not here</p>'
    rows = []
    for step, folder in complete_checkpoints(described.save_dir):
        files = json.loads((folder / MANIFEST).read_bytes())["files"]
        loss = described.run.columns.get("loss", np.array([]))[described.run.columns["step"] == step]
        rows.append(
            [
                escape(folder.name),
                f"{step:,}",
                f"{loss[-1]:.4f}" if len(loss) and np.isfinite(loss[-1]) else "-",
                size_text(sum(file["bytes"] for file in files.values())),
                moment(folder / MANIFEST),
            ]
        )
    if described.model:
        size = sum(file.stat().st_size for file in described.model.rglob("*") if file.is_file())
        rows.append(["final", "", "", size_text(size), moment(described.model)])
    place = f'<p class="muted">{escape(str(described.save_dir))}</p>'
    return place + (
        table(["checkpoint", "step", "loss", "size", "written"], rows) if rows else "<p>none complete yet</p>"
    )


def moment(path: Path) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(path.stat().st_mtime))


def samples(described: Described, prompts: list[str], tokens: int) -> str:
    """Return what the final model generates, or the message with which generate.py refuses.

    generate.py runs in a process of its own, so that a model that does not fit or is damaged costs only its text.
    """
    if described.model is None:
        return '<p class="muted">no final model</p>'
    program, parts = Path(__file__).with_name("generate.py"), []
    for prompt in prompts:
        flags = ["--model", described.model, f"--prompt={prompt}", "--max_new_tokens", tokens]
        done = subprocess.run(list(map(str, [sys.executable, program, *flags])), capture_output=True, check=False)
        text = done.stderr if done.returncode else done.stdout
        parts.append(f"<pre>{escape(text.decode(errors='replace').strip())}</pre>")
    return "".join(parts)


# ------------------------------------------------------------------------------------------------------------ the page


def page(runs: list[Described], x: str, prompts: list[str], tokens: int) -> str:
    title = ", ".join(described.run.name for described in runs)
    overview = "".join(f"<p>{described.label}: {escape(summary(described.run))}</p>" for described in runs)
    parts = [f"<h1>{escape(title)}</h1>", overview, charts(runs, x), figures(runs)]
    parts += section("Data", runs, data)
    parts += section("Checkpoints", runs, checkpoints)
    if prompts:
        parts += section("Generated text", runs, lambda described: samples(described, prompts, tokens))
    parts += ["<h2>Configuration</h2>", configuration(runs)]
    return Template(PAGE.read_text(encoding="utf-8")).substitute(title=escape(title), body="\n".join(parts))


def section(title: str, runs: list[Described], content: Callable[[Described], str]) -> list[str]:
    """Return a heading and each run's content, under its name if there are several."""
    several = len(runs) > 1
    return [f"<h2>{title}</h2>", *((f"<h3>{run.label}</h3>" if several else "") + content(run) for run in runs)]


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(prog="report.py", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="[NAME=]RUN", help="a run's --tensorboard_dir or metrics.jsonl")
    add_flag(parser, "-o --output", "report.html", "the HTML file", type=user_path)
    add_flag(parser, "--x", "step", "horizontal axis", choices=tuple(X_LABELS))
    text = f"texts for the final model to continue; without a text: none (default: {PROMPT!r})"
    add_flag(parser, "--prompt", str, text, nargs="*", metavar="TEXT")
    add_flag(parser, "--max_new_tokens", NEW_TOKENS, "tokens to generate at most for a prompt")
    return parser.parse_args(arguments)


def main() -> int:
    args = parse_args()
    problems = below(1, max_new_tokens=args.max_new_tokens) + file_problems("--output", args.output)
    if args.output.suffix.lower() != ".html":
        problems.append(f"--output: {args.output} does not end in .html; choose a name that does")
    if problems:
        raise InputError(*problems)
    logged = [read_run(text) for text in args.runs]
    for run in logged:
        if not run.has(args.x):
            raise InputError(f"--x: {run.name} has no '{args.x}' in its logs; report it by step")
    runs = [describe(run, COLORS[number % len(COLORS)]) for number, run in enumerate(logged)]
    if args.prompt and not any(described.model for described in runs):
        raise InputError("--prompt: no run has a final model to continue it; leave the flag out")
    prompts = [PROMPT] if args.prompt is None else args.prompt
    text = page(runs, args.x, prompts, args.max_new_tokens)
    existed = args.output.exists()
    try:
        args.output.write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        if not existed:
            args.output.unlink(missing_ok=True)
        raise InputError(f"--output: {args.output} cannot be written ({error.strerror}); give another file") from error
    for described in runs:
        print(f"{described.run.name}: {summary(described.run)}")
    print(f"report: {args.output}")
    return 0


if __name__ == "__main__":
    process.run(main, "report.py")
