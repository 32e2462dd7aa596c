"""Held-out documents, and evaluation on them under every plugin without an effect on training."""

import itertools
import json
import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from corpus.encoder import TextEncoder
from corpus.manifest import HELD_OUT, TRAIN, is_held_out
from corpus.prepare import prepare_dataset
from data_utils import PackedDataset
from engine import shards
from engine.shards import MASTER
from engine.step import forward_backward, optimizer_step
from model_utils import IGNORE_INDEX, build_model, load_config
from processes import boosted, random_states, run_ranks
from runtime.console import InputError
from runtime.process import INTERRUPTED
from training.evaluation import evaluate, evaluation_loader

HYBRID = "-p hybrid_parallel --tp 1"
SEQUENCES = 5  # not divisible by any number of ranks or batch size here


def held_out():
    """Return sequences of 64 tokens, each with more ignored labels than the one before."""
    tokens = torch.randint(1024, (SEQUENCES, 64), generator=torch.Generator().manual_seed(0))
    items = [{"input_ids": ids, "labels": ids.clone()} for ids in tokens]
    for number, item in enumerate(items):
        item["labels"][: 10 * number] = IGNORE_INDEX
    return items


@pytest.fixture(scope="module")
def expected():
    config = load_config("test")
    model, states = build_model(config, torch.device("cpu")), random_states(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(states[name, MASTER])
        logits = torch.cat([model(item["input_ids"][None]).logits[:, :-1] for item in held_out()])
    return F.cross_entropy(logits.flatten(0, 1), torch.cat([item["labels"][1:] for item in held_out()])).item()


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (1, "-p zero2 -b 2"),
        (2, "-p zero2 -b 2"),
        (2, "-p gemini -b 1 --accumulation_steps 2"),
        (2, "-p hybrid_parallel --tp 2 -b 4"),
        (2, f"{HYBRID} --pp 2 -b 2 --accumulation_steps 2 -g"),
        (2, f"{HYBRID} --pp 2 --pp_style interleaved -b 2 --accumulation_steps 2"),
        (2, f"{HYBRID} --sp 2 -b 2"),
        (4, f"{HYBRID} --pp 2 --zero 1 -b 2"),
    ],
)
def test_loss_and_the_training_around_it(expected, ranks, flags):
    for first, unlabelled, stopped, norms, undisturbed in run_ranks(ranks, evaluate_while_training, flags):
        assert first == {
            "eval_loss": pytest.approx(expected, rel=3e-3),
            "eval_perplexity": pytest.approx(math.exp(expected), rel=3e-2),
        }
        assert unlabelled == {}
        assert stopped is None  # on every rank, though only one was told to stop
        assert norms == undisturbed


def evaluate_while_training(flags):
    """Take two optimizer steps with evaluations before and between, then two from the same weights without."""
    states, results = random_states(load_config("test")), []
    for evaluating in (True, False):
        engine = boosted(flags + " -x bf16 --microbatch_size 1")
        shards.restore(engine, lambda name, key: states[name, key], adam_steps=0)
        sizes = engine.job.batch
        loader = evaluation_loader(engine, held_out(), sizes)
        batch = next(iter(loader))
        micro_batch = {name: value[: sizes.batch_size] for name, value in batch.items()}
        micro_batches = [micro_batch] * sizes.accumulation_steps
        norms = []
        if evaluating:
            results.append(evaluate(engine, {"": loader}))
            unlabelled = [item | {"labels": torch.full_like(item["labels"], IGNORE_INDEX)} for item in held_out()]
            others = evaluation_loader(engine, unlabelled, sizes)
            results.append(evaluate(engine, {"": others}))
        for step in range(2):
            forward_backward(engine, micro_batches, 500)
            norms.append(optimizer_step(engine)[0])
            if evaluating and step == 0:
                stopping = dist.get_rank() == dist.get_world_size() - 1
                results.append(evaluate(engine, {"": loader}, lambda stopping=stopping: stopping))
        results.append(norms)
    return results


@pytest.fixture(scope="module")
def folders(sample, sample_tokenizer, tmp_path_factory):
    """Return the sample prepared without held-out documents, and with a fifth of them held out."""
    cache = tmp_path_factory.mktemp("held_out")
    data = str(sample / "data")
    return [
        prepare_dataset(data, sample_tokenizer, cache, num_workers=workers, eval_fraction=fraction)
        for fraction, workers in ((0.0, 1), (0.2, 2))
    ]


def documents(folder, split, bos):
    """Return the token ids of every document of a split."""
    tokens = PackedDataset(folder, 1, split=split)
    ids = [tokens[index]["input_ids"].item() for index in range(len(tokens))]
    starts = [*(index for index, token in enumerate(ids) if token == bos), len(ids)]
    return [tuple(ids[start:stop]) for start, stop in itertools.pairwise(starts)]


def test_a_documents_text_decides_its_split(folders, sample, sample_tokenizer):
    bos = sample_tokenizer.bos_token_id
    everything = documents(folders[0], TRAIN, bos)
    train, test = documents(folders[1], TRAIN, bos), documents(folders[1], HELD_OUT, bos)
    assert sorted(train + test) == sorted(everything)
    assert not set(train) & set(test)  # duplicates of a text are in the same split
    assert len(test) / len(everything) == pytest.approx(0.2, abs=0.1)
    for path in (sample / "data").glob("*.jsonl"):
        for row in path.open(encoding="utf-8"):
            text = json.loads(row)["text"]
            (ids,) = TextEncoder(sample_tokenizer).encode([text])
            assert (tuple(ids.tolist()) in test) == is_held_out(text, 0.2)
            break


def test_a_prepared_folder_keeps_its_fraction(folders, sample_tokenizer, tmp_path):
    folder = str(folders[1])
    assert prepare_dataset(folder, sample_tokenizer, tmp_path, eval_fraction=None) == folders[1]
    with pytest.raises(InputError, match=r"--eval_fraction: .* was prepared with 0.2, not 0.1"):
        prepare_dataset(folder, sample_tokenizer, tmp_path, eval_fraction=0.1)


def test_an_evaluation_before_the_first_step(pretrain):
    flags = ["-p", "zero2", "-x", "fp32", "-b", 1, "--eval_fraction", 0.2, "--eval_interval", 2]
    trained = pretrain(*flags, "--max_steps", 2)
    loss = f"{trained.metrics[-1]['eval_loss']:.4f}"
    continued = pretrain(*flags, "--max_steps", 2, "--init_from", trained.save_dir / "final", "--eval_first")
    assert f"before the first step: loss {loss}, perplexity" in continued.stdout
    more = ["--max_steps", 3, "-f", "latest", "--allow_changes", "--eval_first"]
    resumed = pretrain(*flags, *more, folder=continued.folder)
    assert "before the first step" not in resumed.stdout


# Sends a signal to the process during an evaluation once step {step} has been logged.
SIGNAL_IN_EVALUATION = """
from training import evaluation
forward_loss, log, logged = evaluation.forward_loss, metrics.Metrics.log, []
def log_and_remember(self, values):
    log(self, values)
    logged.append(values["step"])
metrics.Metrics.log = log_and_remember
def signal_and_forward(*args):
    if {step} in logged:
        os.kill(os.getpid(), signal.SIGUSR1)
    return forward_loss(*args)
evaluation.forward_loss = signal_and_forward
"""


def test_a_signal_ends_a_run_in_its_evaluation(pretrain):
    flags = ["-p", "zero2", "-x", "bf16", "-b", 1, "--max_steps", 9, "--eval_fraction", 0.2, "--eval_interval", 2]
    run = pretrain(*flags, check=False, change=SIGNAL_IN_EVALUATION.format(step=1))
    assert run.returncode == INTERRUPTED
    assert run.column("step") == [1, 2]
    assert "eval_loss" not in run.metrics[-1]
    assert (run.save_dir / "epoch0-step2" / "manifest.json").is_file()
    assert (run.save_dir / "final").is_dir()


def test_an_evaluation_that_a_signal_ended_is_repeated_on_resume(pretrain, tmp_path):
    """This includes the evaluation after the last step, without which the run is not finished."""
    flags = ["-p", "zero2", "-x", "bf16", "-b", 1, "--eval_fraction", 0.2, "--eval_interval", 2]
    whole = pretrain(*flags, "--max_steps", 4)
    run = pretrain(*flags, "--max_steps", 4, check=False, change=SIGNAL_IN_EVALUATION.format(step=1))
    again = pretrain(
        *flags,
        "--max_steps",
        4,
        "-f",
        "latest",
        folder=run.folder,
        check=False,
        change=SIGNAL_IN_EVALUATION.format(step=3),
    )
    assert (run.returncode, again.returncode) == (INTERRUPTED, INTERRUPTED)
    assert (again.save_dir / "epoch0-step4" / "manifest.json").is_file()
    end = pretrain(*flags, "--max_steps", 4, "-f", "latest", folder=run.folder)
    for key in ("step", "loss"):
        assert end.column(key) == whole.column(key)
    assert [row.get("eval_loss") for row in end.metrics] == [row.get("eval_loss") for row in whole.metrics]


# Imitates gemini_auto on a GPU, which moves chunks by a plan made in the first training pass.
AUTO = """
boost = training.session.boost
def boost_with_moving_chunks(job):
    engine = boost(job)
    engine.model.gemini_manager.policy_name = "auto"
    return engine
training.session.boost = boost_with_moving_chunks
"""


def test_an_evaluation_is_left_out_where_the_plugin_has_to_train_first(pretrain):
    flags = ["-p", "gemini", "-x", "bf16", "-b", 1, "--eval_fraction", 0.2, "--eval_interval", 2, "--max_steps", 4]
    run = pretrain(*flags, check=False, change=AUTO + SIGNAL_IN_EVALUATION.format(step=1))
    assert run.returncode == INTERRUPTED
    end = pretrain(*flags, "-f", "latest", folder=run.folder, change=AUTO)
    assert "evaluation: skipped for step 2: gemini must train a step first" in end.stdout
    assert end.column("step") == [1, 2, 3, 4]
    assert ["eval_loss" in row for row in end.metrics] == [False, False, False, True]
