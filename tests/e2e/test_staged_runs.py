"""`--stages FILE`: other data, lengths and learning rates from a token on, in runs that are stopped and resumed."""

import json
import re
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from corpora import documents_in, write_jsonl
from corpus.manifest import HELD_OUT
from corpus.prepare import prepare_dataset
from corpus.sources import resolve_source
from data_utils import PackedDataset
from launching import ROOT, Run, optimizer_states, run_script
from model_utils import load_config
from plain_loop import train_plainly
from resuming import RECORD, SIGNAL, curve, states_of
from runs import SEQUENCE_LENGTH, batch_at
from scripts import plot_run

STEPS, GLOBAL_BATCH, LR = 9, 8, 1e-3
STEP_TOKENS = GLOBAL_BATCH * SEQUENCE_LENGTH
BEGIN = (0, 3, 6)  # steps before each stage
LONG = 2 * SEQUENCE_LENGTH
WEIGHTS = [{"web": 1.0}, {"web": 0.5, "wiki": 0.5}, {"code": 0.75, "wiki": 0.25}]
STAGES = f"""
[[stage]]
from_token = {BEGIN[1] * STEP_TOKENS}
data = {{"WEB" = 0.5, "WIKI" = 0.5}}
[[stage]]
from_token = 0.66
data = {{"CODE" = 0.75, wiki = 0.25}}
max_length = {LONG}
lr_schedule = "linear"
min_lr_ratio = 0
"""
FLAGS = ["-x", "fp32", "-s", 1, "--lr", LR, "--lr_schedule", "constant", "--max_steps", STEPS]
TWO_RANKS = ["-p", "zero2", "-b", 2, "--accumulation_steps", 2]


@pytest.fixture(scope="module")
def sources(sample, tmp_path_factory) -> dict[str, Path]:
    """Return three data sets by name, of which `wiki` is so short that a run reads several epochs."""
    folder = tmp_path_factory.mktemp("sources")
    rows = [{"text": document.text} for document in documents_in(resolve_source(str(sample / "data")))]
    short = [{"text": row["text"][500:800]} for row in rows[:40:4]]
    return {
        name: write_jsonl(folder / f"{name}.jsonl", part)
        for name, part in (("web", rows[::2]), ("code", rows[1::2]), ("wiki", short))
    }


def written(folder: Path, sources: dict[str, Path], text: str = STAGES) -> Path:
    path = folder / "stages.toml"
    for name, source in sources.items():
        text = text.replace(f'"{name.upper()}"', json.dumps(str(source)))
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def staged(pretrain, sources, tmp_path_factory) -> Callable[..., Run]:
    """Return a function that trains with STAGES, or other ones, on `web` first."""
    folder = tmp_path_factory.mktemp("stages")
    file = written(folder, sources)

    def staged(*args, stages: Path | None = file, **kwargs) -> Run:
        flags = ["--stages", stages] if stages else []
        return pretrain("-d", sources["web"], *FLAGS, *flags, *args, **kwargs)

    return staged


@pytest.fixture(scope="module")
def whole(staged, tmp_path_factory) -> tuple[Run, list[torch.Tensor]]:
    """Return an uninterrupted run that saves after every second step, and the batch of each of its steps."""
    path = tmp_path_factory.mktemp("whole") / "batches"
    run = staged("-p", "zero2", "-b", GLOBAL_BATCH, "-i", 2, change=RECORD.format(path=str(path)))
    return run, [torch.tensor(json.loads(line)) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def sequences(sources, sample_tokenizer, cache_dir) -> dict[tuple[str, int], PackedDataset]:
    """Return each data set in sequences of both lengths."""
    folders = {name: prepare_dataset(str(path), sample_tokenizer, cache_dir) for name, path in sources.items()}
    return {
        (name, length): PackedDataset(folders[name], length) for name in sources for length in (SEQUENCE_LENGTH, LONG)
    }


def assert_equal_checkpoints(run: Run, other: Run, step: int, states: bool = True) -> None:
    """Assert that both runs' checkpoints of a step are equal to the bit."""
    folder, expected = (next(each.save_dir.glob(f"epoch*-step{step}")) for each in (run, other))
    assert folder.name == expected.name
    for file in sorted((expected / "model").iterdir()):
        assert (folder / "model" / file.name).read_bytes() == file.read_bytes()
    tensors, others = optimizer_states(folder), optimizer_states(expected)
    assert [name for name in others if not torch.equal(tensors[name], others[name])] == []
    if states:
        assert states_of(folder) == states_of(expected)


def test_each_stage_has_its_data_length_and_learning_rate(whole, sequences):
    """The batches are found again in the data sets; the losses are those of a plain loop on them."""
    run, batches = whole
    assert [tuple(batch.shape) for batch in batches] == [(8, SEQUENCE_LENGTH)] * 6 + [(4, LONG)] * 3
    assert run.column("tokens") == [STEP_TOKENS * step for step in range(1, STEPS + 1)]
    places = {
        (name, tuple(part[index]["input_ids"].tolist())): index
        for (name, _), part in sequences.items()
        for index in range(len(part))
    }
    read: dict[tuple[str, int], list[int]] = {}
    for stage, (start, stop) in enumerate(((0, 3), (3, 6), (6, 9))):
        rows = [tuple(row) for batch in batches[start:stop] for row in batch.tolist()]
        names = [next(name for name in WEIGHTS[stage] if (name, row) in places) for row in rows]
        count = Counter(names)
        assert {name: count[name] / len(rows) for name in count} == WEIGHTS[stage]
        for name, row in zip(names, rows, strict=True):
            read.setdefault((name, len(row)), []).append(places[name, row])
    short = sequences["web", SEQUENCE_LENGTH]  # the run began with it alone, and reads on in the order that it had
    assert [short[index]["input_ids"].tolist() for index in read["web", SEQUENCE_LENGTH]] == batch_at(
        short, 0, 24 + 12
    ).tolist()
    for (name, length), indexes in read.items():
        epoch = len(sequences[name, length])
        assert len(set(indexes[:epoch])) == min(epoch, len(indexes)), name
    rates = [LR] * 6 + [LR * (1 - step / 3) for step in range(3)]
    assert run.column("lr") == pytest.approx(rates, rel=1e-6)
    losses, norms = train_plainly(load_config("test"), torch.float32, batches, GLOBAL_BATCH, rates, 1.0)
    assert run.column("loss") == pytest.approx(losses, rel=2e-6)
    assert run.column("grad_norm") == pytest.approx(norms, rel=1e-5)


def test_epochs_of_each_data_set_are_printed(whole, sequences):
    run, _ = whole
    size = {key: len(part) for key, part in sequences.items()}
    wiki = 12 / size["wiki", SEQUENCE_LENGTH]
    expected = {
        "web": 36 / size["web", SEQUENCE_LENGTH],
        "code": 9 / size["code", LONG],
        "wiki": wiki + 3 / size["wiki", LONG],
    }
    assert f"\nepochs: {', '.join(f'{name} {expected[name]:.2f}' for name in sorted(expected))}\n" in run.stdout
    lines = run.stdout.splitlines()
    start = lines.index(next(line for line in lines if line.startswith("stage 2: ")))
    assert lines[start : start + 3] == [
        "stage 2: steps 7 to 9, 1,536 tokens; learning rate 1.00e-03 to 3.33e-04; a step: 4 x 1 accumulated x 1 "
        "data-parallel = 4 sequences x 128 tokens",
        f"  code: 75.00%, epochs 0.00 to {expected['code']:.2f} of {size['code', LONG]:,} sequences",
        f"  wiki: 25.00%, epochs {wiki:.2f} to {expected['wiki']:.2f} of {size['wiki', LONG]:,} sequences; an epoch "
        "begins, since its sequences have another length",
    ]
    assert "stage 1 begins after step 3\n" in run.stdout
    assert run.column("stage") == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_up_to_the_first_boundary_it_is_the_run_without_stages(staged, whole, sources):
    """There a checkpoint is saved, from which the run without may go on with stages, which is one change."""
    run, _ = whole
    without = staged("-p", "zero2", "-b", GLOBAL_BATCH, "-i", 3, stages=None)
    rows = [{key: value for key, value in row.items() if key != "stage"} for row in curve(run)]
    assert rows[:3] == curve(without)[:3]
    assert rows[3]["loss"] != curve(without)[3]["loss"]
    assert_equal_checkpoints(run, without, 3, states=False)
    assert {int(folder.name.partition("step")[2]) for folder in run.save_dir.glob("epoch*")} == {2, 3, 4, 6, 8, 9}

    flags = ["-p", "zero2", "-b", GLOBAL_BATCH, "-f", without.save_dir / "epoch0-step3"]
    refused = staged(*flags, check=False)
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    expected = (
        r"pretrain.py: error: --stages: those ahead were, in the checkpoint, none, and are from 1,536 web 50.00%, "
        r"wiki 50.00% \(\w{8}\) of 64 tokens; from 0.66 code 75.00%, wiki 25.00% \(\w{8}\) of 128 tokens, linear to 0 "
        r"of --lr now; --allow_changes resumes anyway"
    )
    assert re.fullmatch(expected, line), line
    resumed = staged(*flags, "--allow_changes")
    assert curve(resumed) == curve(run, after=3)
    assert_equal_checkpoints(resumed, run, STEPS)


def test_other_data_are_no_spike(whole):
    """The steps that --skip_spikes compares with begin anew with a stage."""
    run, _ = whole
    windows = {}
    for folder in run.save_dir.glob("epoch*"):
        state = json.loads((folder / "running_states.json").read_text())
        windows[state["step"]] = len(state["window"])
    assert windows == {2: 2, 3: 3, 4: 1, 6: 3, 8: 2, 9: 3}


@pytest.mark.parametrize("step", [1, 3, 4, 6, 8])
def test_kill_and_resume_is_exact(staged, whole, step):
    """In each stage, and at both boundaries."""
    run, _ = whole
    flags = ["-p", "zero2", "-b", GLOBAL_BATCH, "-i", 2, "-f", "latest"]
    killed = staged(*flags, change=SIGNAL.format(name="SIGKILL", step=step, rank=0), check=False)
    assert killed.returncode == -signal.SIGKILL
    resumed = staged(*flags, folder=killed.folder)
    assert curve(resumed) == curve(run)
    assert_equal_checkpoints(resumed, run, STEPS)


def test_kill_one_of_two_ranks_at_a_boundary_and_resume(staged):
    flags = [*TWO_RANKS, "-i", 2]
    run = staged(*flags, processes=2)
    kill = SIGNAL.format(name="SIGKILL", step=BEGIN[2], rank=1)
    killed = staged(*flags, change=kill, processes=2, check=False)
    assert killed.returncode != 0
    assert killed.column("step")[-1] < STEPS
    resumed = staged(*flags, "-f", "latest", folder=killed.folder, processes=2)
    assert curve(resumed) == curve(run)
    assert_equal_checkpoints(resumed, run, STEPS)


@pytest.mark.parametrize("step", [2, 3, 4, 6, 8])
def test_resume_from_each_checkpoint_is_exact(staged, whole, step):
    run, _ = whole
    resumed = staged("-p", "zero2", "-b", GLOBAL_BATCH, "-f", next(run.save_dir.glob(f"*-step{step}")))
    assert curve(resumed) == curve(run, after=step)
    assert_equal_checkpoints(resumed, run, STEPS)


@pytest.mark.parametrize("step", [2, 3, 4, 6, 8])
def test_resume_from_each_checkpoint_on_other_ranks(staged, whole, step):
    run, _ = whole
    resumed = staged(*TWO_RANKS, "-f", next(run.save_dir.glob(f"*-step{step}")), processes=2)
    for key in ("step", "epoch", "tokens", "lr", "stage"):
        assert resumed.column(key) == run.column(key)[step:]
    assert resumed.column("loss") == pytest.approx(run.column("loss")[step:], rel=2e-5)
    epochs = [re.search(r"\nepochs: (.*)", each.stdout)[1] for each in (resumed, run)]
    assert epochs[0] == epochs[1]


@pytest.mark.parametrize(
    ("processes", "flags", "size"),
    [
        (2, "-p gemini -x bf16 -b 2 --accumulation_steps 2", 2),
        (4, "-p hybrid_parallel --tp 2 --pp 2 -b 8 --microbatch_size 2", 4),
        (2, "-p hybrid_parallel --tp 1 --pp 2 --pp_style interleaved -b 8", 4),
        (2, "-p hybrid_parallel --tp 1 --pp 1 --sp 2 -b 4 --accumulation_steps 2 --exchange step", 4),
    ],
)
def test_every_layout_takes_stages_of_other_lengths(staged, sources, tmp_path, processes, flags, size):
    """Longer with fewer micro-batches, and back; resumes are exact, and the losses those of zero2."""

    def stages(name: str, size: int) -> Path:
        longer = f"max_length = {LONG}\nbatch_size = {size}\naccumulation_steps = 1"
        back = (
            f"[[stage]]\nfrom_token = 0.88\nmax_length = {SEQUENCE_LENGTH}\nbatch_size = {size}\naccumulation_steps = 2"
        )
        (tmp_path / name).mkdir()
        return written(tmp_path / name, sources, STAGES.replace(f"max_length = {LONG}", longer) + back)

    evaluating = ["-i", 7, "--eval_fraction", 0.1, "--eval_interval", 4]
    expected = staged("-p", "zero2", "-b", 4, "--accumulation_steps", 2, *evaluating, stages=stages("expected", 4))
    flags, file = [*flags.split(), *evaluating], stages("own", size)
    run = staged(*flags, stages=file, processes=processes)
    assert run.column("tokens") == expected.column("tokens")
    assert run.column("loss") == pytest.approx(expected.column("loss"), rel=7e-4 if "gemini" in flags else 2e-5)
    resumed = staged(*flags, "-f", next(run.save_dir.glob("*-step7")), stages=file, processes=processes)
    assert curve(resumed) == curve(run, after=7)
    assert_equal_checkpoints(resumed, run, STEPS)


def test_held_out_documents_of_all_stages(staged, sources, sample_tokenizer, cache_dir):
    """Each evaluation is on all data sets, in sequences of the stage's length, of which there must be one."""
    flags = ["-p", "zero2", "-b", GLOBAL_BATCH, "--eval_fraction", 0.2, "--eval_interval", 3, "--eval_first"]
    run = staged(*flags)
    assert "before the first step: loss " in run.stdout
    sequences = dict(re.findall(r"^held out of (\w+): (\d+) sequences of 64 tokens", run.stdout, re.MULTILINE))
    assert sequences.keys() == set(sources)
    left_out = f"held out of wiki: left out of evaluations on {LONG} tokens: --eval_fraction: "
    for step, length in ((3, SEQUENCE_LENGTH), (9, LONG)):
        model = AutoModelForCausalLM.from_pretrained(next(run.save_dir.glob(f"*-step{step}")) / "model")
        folder = prepare_dataset(str(sources["web"]), sample_tokenizer, cache_dir, eval_fraction=0.2)
        part = PackedDataset(folder, length, split=HELD_OUT)
        ids = torch.stack([part[index]["input_ids"] for index in range(len(part))])
        assert run.metrics[step - 1]["eval_loss/web"] == pytest.approx(model(ids, labels=ids).loss.item(), rel=1e-5)
    for step, row in zip((3, 6, 9), run.metrics[2::3], strict=True):
        named = {f"eval_loss/{name}" for name in sources}
        assert named - set(row) == ({"eval_loss/wiki"} if step == 9 and left_out in run.stdout else set())


@pytest.mark.parametrize("step", [3, 9])
def test_a_signal_at_a_boundary(staged, whole, step):
    run, _ = whole
    flags = ["-p", "zero2", "-b", GLOBAL_BATCH, "-i", 2, "-f", "latest"]
    stopped = staged(*flags, change=SIGNAL.format(name="SIGTERM", step=step - 1, rank=0), check=False)
    assert (stopped.save_dir / "final").is_dir()
    resumed = staged(*flags, folder=stopped.folder)
    assert curve(resumed) == curve(run)
    assert_equal_checkpoints(resumed, run, STEPS)


def test_plot_and_report_show_the_boundaries(whole, tmp_path):
    run, _ = whole
    (logged,) = (plot_run.read_run(str(run.folder / "tb_logs")),)
    assert logged.boundaries("step").tolist() == [4, 7]
    figure = plot_run.draw([logged], "tokens")
    assert [line.get_xdata()[0] for line in figure.axes[0].lines if line.get_linestyle() == ":"] == [
        *(STEP_TOKENS * step for step in (4, 7)),
    ]
    done = run_script(ROOT / "scripts" / "report.py", run.folder / "tb_logs", "-o", tmp_path / "r.html", "--prompt")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert page.count("a stage begins") == 2 * 6  # in each chart
    epochs = dict(re.findall(r"(\w+) ([\d.]+)", re.search(r"\nepochs: (.*)", run.stdout)[1]))
    shown = re.findall(r"<td>(web|code|wiki)</td><td>([^<]+)</td><td>\d+</td><td>([\d.]+)</td>", page)
    assert {name: weight for name, weight, _ in shown} == {"web": "-", "code": "75.00%", "wiki": "25.00%"}
    assert {name: read for name, _, read in shown} == epochs
    assert not plot_run.LoggedRun("x", {"step": np.arange(3.0)}).boundaries("step").size


def test_dry_run(start, sources, tmp_path):
    """It prints the stages, the memory of the largest and each one's time, and makes no folder."""
    file = written(tmp_path, sources, STAGES + f"[[stage]]\nfrom_token = 0.88\nmax_length = {SEQUENCE_LENGTH}")
    flags = ["-d", sources["web"], *FLAGS, "-p", "zero2", "-b", 8, "--gpus", 1, "--stages", file, "--dry_run"]
    with start(*flags) as run:
        assert run.wait() == 0, run.output()
    steps = re.findall(r"^stage (\d): steps (\d) to (\d), ", run.stdout, re.MULTILINE)
    assert steps == [("0", "1", "3"), ("1", "4", "6"), ("2", "7", "8"), ("3", "9", "9")]
    assert re.findall(r"^time of stage (\d):$", run.stdout, re.MULTILINE) == ["0", "1", "2", "3"]
    assert f"memory of the stage that takes most, with sequences of {LONG} tokens:" in run.stdout
    assert run.stdout.count("  <- peak") == 1
    assert not run.save_dir.exists()


def test_bad_stages_end_before_anything_is_allocated(problems, sources, tmp_path):
    cases = {
        '[[stage]]\nfrom_token = 0.5\ndata = "no/such/file"': ["stage 1, data: ", "no/such/file"],
        "[[stage]]\nfrom_token = 0.5\nmax_length = 129": ["stage 1, max_length: ", "129"],
        '[[stage]]\nfrom_token = "1T"': ["stage 1, from_token: ", "--max_steps"],
        '[[stage]]\nfrom_token = 0.01\nlr_schedule = "linear"': ["stage 1, lr_schedule: ", "warm-up"],
        f'[[stage]]\nfrom_token = 0.5\nmax_length = {LONG}\ndata = "TINY"': ["stage 1, max_length: ", f"takes {LONG} "],
        f'[[stage]]\nfrom_token = 0.5\nmax_length = {LONG}\ndata = "EMPTY"': [
            "stage 1, data: ",
            "empty.jsonl is empty",
        ],
    }
    folder = tmp_path / "sets"
    folder.mkdir()
    others = {
        "tiny": write_jsonl(folder / "tiny.jsonl", [{"text": "a few words " * 12}]),
        "empty": write_jsonl(folder / "empty.jsonl", []),
    }
    for text, expected in cases.items():
        file = written(folder, sources | others, text)
        (problem,) = problems("--stages", file, "-b", 4, "-x", "fp32", "--max_steps", 9)
        assert problem.startswith(f"--stages: {file}, stage 1, "), problem
        assert all(part in problem for part in expected), problem
