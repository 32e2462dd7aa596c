"""Several data sets with weights: `-d web=0.7 code=0.2 wiki=0.1`."""

import gzip
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from corpora import documents_in, error_of, write_jsonl
from corpus.order import InterleavedOrder, Interleaving
from corpus.prepare import prepare_dataset
from corpus.sources import resolve_source
from data_utils import PackedDataset
from model_utils import load_config
from plain_loop import train_plainly
from pretrain import Data, open_mixture
from runs import SEED, SEQUENCE_LENGTH, problems_of

STEPS, GLOBAL_BATCH, LR = 8, 10, 1e-3
WEIGHTS = {"web": 0.7, "code": 0.2, "wiki": 0.1}
SHORT = 20 * SEQUENCE_LENGTH  # tokens of `wiki`, of which a run reads several epochs


@pytest.fixture(scope="module")
def sources(sample, sample_tokenizer, tmp_path_factory) -> dict[str, Path]:
    """Return a folder of JSONL, a compressed file and a prepared folder, by name."""
    folder = tmp_path_factory.mktemp("sources")
    rows = [{"text": document.text} for document in documents_in(resolve_source(str(sample / "data")))]
    (folder / "web").mkdir()
    write_jsonl(folder / "web" / "part.jsonl", rows[::2])
    with gzip.open(folder / "code.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows[1::2])
    short = write_jsonl(folder / "short.jsonl", [{"text": sample_tokenizer.decode(list(range(20, 900)) * 2)}])
    prepared = prepare_dataset(str(short), sample_tokenizer, folder)
    (folder / "wiki").symlink_to(prepared)
    return {"web": folder / "web", "code": folder / "code.jsonl.gz", "wiki": folder / "wiki"}


def flags_of(sources: dict[str, Path], weights: dict[str, float]) -> list[str]:
    return ["-d", *(f"{sources[name]}={weight}" for name, weight in weights.items())]


@pytest.fixture(scope="module")
def mixed(pretrain, sources):
    """Return a function that trains on a mixture."""

    def mixed(weights: dict[str, float], *args, **kwargs):
        flags = ["-x", "fp32", "-p", "zero2", "-s", 0, "--lr", LR, "--lr_schedule", "constant"]
        return pretrain(*flags_of(sources, weights), *flags, *args, **kwargs)

    return mixed


@pytest.fixture(scope="module")
def whole(mixed):
    return mixed(WEIGHTS, "-b", GLOBAL_BATCH, "--max_steps", STEPS, "-i", 4)


def test_each_step_has_the_proportions_and_the_losses_of_a_plain_loop(whole, sources, sample_tokenizer, cache_dir):
    parts = {
        name: PackedDataset(prepare_dataset(str(path), sample_tokenizer, cache_dir), SEQUENCE_LENGTH)
        for name, path in sources.items()
    }
    order = InterleavedOrder({name: range(len(part)) for name, part in parts.items()}, Interleaving(WEIGHTS), SEED)
    batches = []
    for step in range(STEPS):
        rows = []
        for position in range(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH):
            name = order.interleaving.names[order.interleaving.draw(position)[0]]
            rows.append((name, parts[name][order[position]]["input_ids"]))
        names = [name for name, _ in rows]
        assert {name: names.count(name) for name in WEIGHTS} == {"web": 7, "code": 2, "wiki": 1}
        batches.append(torch.stack([ids for _, ids in rows]))
    expected, _ = train_plainly(load_config("test"), torch.float32, batches, GLOBAL_BATCH, [LR] * STEPS, 1.0)
    assert whole.column("loss") == pytest.approx(expected, rel=2e-6)
    sequences = {name: len(part) for name, part in parts.items()}
    read = ", ".join(f"{name} {STEPS * 10 * WEIGHTS[name] / sequences[name]:.2f}" for name in sorted(WEIGHTS))
    assert f"epochs at the end of the run: {read}\n" in whole.stdout
    assert f"\nepochs: {read}\n" in whole.stdout


def test_a_resume_on_other_ranks_is_the_run_that_never_ended(mixed, whole):
    flags = ["-f", whole.save_dir / "epoch0-step4", "--max_steps", STEPS]
    run = mixed(WEIGHTS, "-b", GLOBAL_BATCH // 2, *flags, processes=2)
    assert run.column("loss") == pytest.approx(whole.column("loss")[4:], rel=2e-5)
    assert run.stdout.split("\nepochs: ")[1].splitlines()[0] == whole.stdout.split("\nepochs: ")[1].splitlines()[0]


def test_the_mixture_may_change_on_a_resume_with_one_flag_and_one_line(mixed, whole, start, sources):
    other = {"web": 0.5, "wiki": 0.5}
    flags = ["-b", GLOBAL_BATCH, "-f", whole.save_dir / "epoch0-step4", "--max_steps", STEPS]
    command = [*flags_of(sources, other), *flags, "-x", "fp32", "-p", "zero2", "-s", 0, "--lr", LR]
    with start(*command, "--lr_schedule", "constant") as run:
        assert run.wait() == 2
    changed = f"--load: the mixture of --dataset was {WEIGHTS} in the checkpoint and is {other} now"
    assert run.stderr == f"pretrain.py: error: {changed}; --allow_changes resumes anyway\n"
    resumed = mixed(other, *flags, "--allow_changes")
    assert [line for line in resumed.stdout.splitlines() if "--load: " in line] == [
        f"{changed}, as --allow_changes allows"
    ]
    counts = [dict(re.findall(r"(\w+) (\d+\.\d\d)", run.stdout.split("\nepochs: ")[1])) for run in (whole, resumed)]
    before, after = (float(each["wiki"]) for each in counts)
    assert after / before == pytest.approx((4 * 1 + 4 * 5) / (8 * 1), rel=0.05)
    again = ["-f", resumed.save_dir / f"epoch0-step{STEPS}", "-b", GLOBAL_BATCH, "--max_steps", STEPS + 1]
    assert mixed(other, *again).column("step") == [STEPS + 1]  # the changed mixture is the checkpoint's now


def test_held_out_loss_of_each_data_set(mixed, sources):
    two = {"web": 0.5, "code": 0.5}
    run = mixed(two, "-b", GLOBAL_BATCH, "--max_steps", 2, "--eval_fraction", 0.2, "--eval_interval", 1)
    row = run.metrics[-1]
    low, high = sorted(row[f"eval_loss/{name}"] for name in two)
    assert low < row["eval_loss"] < high
    assert "held out of web: " in run.stdout
    board = EventAccumulator(str(run.folder / "tb_logs"))
    board.Reload()
    assert {"eval/loss", "eval/loss/web", "eval/loss/code"} <= set(board.Tags()["scalars"])


def test_a_data_set_that_is_too_small_is_named_as_the_user_did(tmp_path, sample_tokenizer):
    names = [str(tmp_path / f"{name}.jsonl") for name in ("large", "small")]
    write_jsonl(tmp_path / "large.jsonl", [{"text": "long " * 100}])
    write_jsonl(tmp_path / "small.jsonl", [{"text": "a"}])
    data = Data(
        dataset=dict.fromkeys(names, 0.5),
        dataset_revision=None,
        dataset_slices=(),
        cache_dir=tmp_path / "cache",
        eval_fraction=None,
        streaming=False,
        shuffle_buffer=1,
        slice_weights=None,
        document_mask=False,
        given=frozenset(),
    )
    job = SimpleNamespace(batch=SimpleNamespace(max_length=32))
    assert f" tokens, but the whole data set has 3 ({names[1]}); " in error_of(
        open_mixture, data, sample_tokenizer, job
    )


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ("-d web=0.7 code=0.2", "the weights add up to 0.9; they must add up to 1"),
        ("-d web=1.5 code=-0.5", "'code=-0.5' is not NAME=WEIGHT with a weight above 0"),
        ("-d web=0.7 code", "'code' is not NAME=WEIGHT with a weight above 0"),
        ("-d web=0.5 web=0.5", "web is named twice; give it one weight"),
        ("-d a/web=0.5 b/web.jsonl=0.5", "two data sets are called web; rename one, or link to it"),
        ("-d web=0.5 code=0.5 --slice_weights llama", "--slice_weights: takes one --dataset, not 2; leave it out"),
        ("-d web=0.5 code=0.5 --streaming --max_steps 5", "--streaming: takes one --dataset, not 2; leave it out"),
    ],
)
def test_mistakes_are_one_line(flags, problem):
    try:
        (line,) = problems_of(f"{flags} -p zero2 -x bf16")
    except Exception as error:
        (line,) = error.problems
    assert problem in line
