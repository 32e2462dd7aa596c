"""Reports of real runs, opened in a real browser."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launching import ROOT, run_script
from runtime.console import InputError
from runtime.process import USAGE_ERROR
from scripts import report

CHROMIUM = shutil.which("chromium")
POINTER = """<script>
const chart = document.querySelector("svg"), box = chart.getBoundingClientRect();
chart.dispatchEvent(new MouseEvent("mousemove", {clientX: box.right - 1, clientY: box.top + 20}));
</script>
"""


@pytest.fixture(scope="module")
def mixture_run(start, sample):
    """Four steps on two data sets, with two checkpoints and a final model."""
    files = [f"{sample}/data/book_sample.jsonl=0.75", f"{sample}/data/github_sample.jsonl=0.25"]
    with start("-d", *files, "-p", "zero2", "-x", "fp32", "-b", 4, "-s", 1, "--max_steps", 4, "-i", 2) as run:
        assert run.wait() == 0, run.output()
    return run


def make(monkeypatch, *arguments) -> str:
    """Return the page that report.py writes into the current folder."""
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, arguments)])
    assert report.main() == 0
    return Path("report.html").read_text(encoding="utf-8")


def browse(page: Path) -> tuple[str, list[str]]:
    """Open a page in headless Chromium; return its document after its scripts have run, and the console's lines."""
    if CHROMIUM is None:
        pytest.skip("chromium is not installed (Debian: apt install chromium)")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    profile = f"--user-data-dir={page.parent / 'profile'}"
    done = subprocess.run([CHROMIUM, *flags, profile, page.as_uri()], capture_output=True, text=True, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_a_browser_shows_it_without_an_error(monkeypatch, tmp_path, finished_run, mixture_run):
    monkeypatch.chdir(tmp_path)
    runs = [f"first={finished_run.folder / 'tb_logs'}", f"second={mixture_run.folder / 'tb_logs'}"]
    page = make(monkeypatch, *runs, "--prompt")
    assert re.findall(r"(?:\bsrc=|href=|url\(|@import).*", page) == ['href="data:,">']
    document, console = browse(tmp_path / "report.html")
    assert console == []
    assert document.count("<polyline") == 2 * 6

    pointed = tmp_path / "pointed.html"
    pointed.write_text(page.replace("</body>", f"{POINTER}</body>"), encoding="utf-8")
    document, console = browse(pointed)
    assert console == []
    readout = re.search(r'<div class="readout">(.+?)</div>', document)[1]
    for run, (name, loss, step) in zip(
        (finished_run, mixture_run), re.findall(r"(\w+): ([\d.]+) at (\d+)", readout), strict=True
    ):
        assert name == ("first" if run is finished_run else "second")
        assert (float(loss), int(step)) == (pytest.approx(run.column("loss")[-1], abs=2e-4), len(run.metrics))


def test_an_error_in_the_page_would_be_seen(tmp_path):
    """The test above can fail: the console has errors of scripts, and of anything fetched from elsewhere."""
    page = report.PAGE.read_text(encoding="utf-8")
    broken = tmp_path / "broken.html"
    broken.write_text(
        page.replace("$body", '<svg></svg><img src="http://127.0.0.1:9/x.png"><script>nowhere()</script>')
    )
    _, console = browse(broken)
    assert any("nowhere is not defined" in line for line in console)
    assert any("Content Security Policy" in line for line in console)


def test_a_mixture_with_its_checkpoints_and_generated_text(tmp_path, mixture_run):
    logs = mixture_run.folder / "tb_logs"
    done = run_script(
        ROOT / "scripts" / "report.py", logs, "-o", tmp_path / "r.html", "--max_new_tokens", 5, cwd=tmp_path
    )
    assert (done.returncode, done.stderr) == (0, "")
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    told = re.search(r"^epochs: (.+)$", mixture_run.stdout, flags=re.MULTILINE)[1]
    shown = re.findall(r"<td>(\w+)</td><td>[\d.]+%</td><td>(\d+)</td><td>([\d.]+)</td>", page)
    assert ", ".join(f"{name} {epochs}" for name, _, epochs in shown) == told
    assert sum(int(read) for _, read, _ in shown) == 4 * 4
    assert [(name, int(step)) for name, step in re.findall(r"<td>(epoch0-step\d)</td><td>(\d)</td>", page)] == [
        ("epoch0-step4", 4),
        ("epoch0-step2", 2),
    ]
    assert f"<td>{mixture_run.column('loss')[1]:.4f}</td>" in page
    assert "<td>max_steps</td><td>4</td>" in page
    assert "&quot;hidden_size&quot;: 64" in page
    flags = ["--model", mixture_run.save_dir / "final", "--prompt", report.PROMPT, "--max_new_tokens", 5]
    generated = run_script(ROOT / "scripts" / "generate.py", *flags)
    assert f"<pre>{report.escape(generated.stdout.strip())}</pre>" in page


def test_differing_flags_are_marked(monkeypatch, tmp_path, finished_run, mixture_run):
    monkeypatch.chdir(tmp_path)
    page = make(monkeypatch, finished_run.folder / "tb_logs", mixture_run.folder / "tb_logs", "--prompt")
    assert '<tr class="differs"><td>batch_size</td><td>8</td><td>4</td></tr>' in page
    assert '<tr class=""><td>plugin</td><td>zero2</td><td>zero2</td></tr>' in page


def test_a_file_of_metrics_alone(monkeypatch, tmp_path, finished_run):
    """A run's name may be anything, and the file may have come from another machine."""
    monkeypatch.chdir(tmp_path)
    row = finished_run.metrics[0] | {"grad_norm": None, "eval_loss/web": 5.25, "loss": None}
    (tmp_path / "copy.jsonl").write_text(f"{json.dumps(row)}\n")
    page = make(monkeypatch, "<script>alert(1)</script>=copy.jsonl")
    assert "<script>alert" not in page
    assert "<td>eval_loss/web</td><td>5.2500</td>" in page
    for line in ("the folder of checkpoints is not here", "the log folder has no TensorBoard events", "no final model"):
        assert line in page
    _, console = browse(tmp_path / "report.html")
    assert console == []


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("nowhere", "nowhere does not exist; give a run's --tensorboard_dir"),
        ("run.jsonl --output run.htm", "--output: run.htm does not end in .html; choose a name that does"),
        ("run.jsonl --output no/run.html", "--output: folder "),
        ("run.jsonl --x hours", "--x: run.jsonl has no 'hours' in its logs; report it by step"),
        ("run.jsonl --prompt a", "--prompt: no run has a final model to continue it; leave the flag out"),
        ("run.jsonl --max_new_tokens 0", "--max_new_tokens: must be at least 1, not 0"),
    ],
)
def test_mistakes(monkeypatch, tmp_path, flags, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.jsonl").write_text('{"step": 1}\n')
    monkeypatch.setattr(sys, "argv", ["report.py", *flags.split()])
    with pytest.raises(InputError) as raised:
        report.main()
    (problem,) = raised.value.problems
    assert problem.startswith(expected)
    assert not list(tmp_path.glob("**/*.htm*"))


def test_exit_status(tmp_path):
    done = run_script(ROOT / "scripts" / "report.py", "nowhere", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (USAGE_ERROR, "")
    assert done.stderr.startswith("report.py: error: nowhere does not exist")
