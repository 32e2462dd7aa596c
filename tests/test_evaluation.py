"""Evaluation under every plugin against plain PyTorch, and training that goes on as if there had been none."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import boosted, random_states, run_ranks

import sharded_state
from booster_utils import forward_backward, optimizer_step, resolve_layout
from data_utils import IGNORE_INDEX
from evaluation import evaluate, evaluation_loader
from model_utils import build_model, load_config
from sharded_state import MASTER

HYBRID = "-p hybrid_parallel --tp 1"
SEQUENCES = 5  # which no number of ranks and no batch divides


def held_out():
    """Sequences of 64 tokens, each with more labels that do not count than the one before."""
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
        (2, f"{HYBRID} --sp 2 -b 2"),
        (4, f"{HYBRID} --pp 2 --zero 1 -b 2"),
    ],
)
def test_loss_and_the_training_around_it(expected, ranks, flags):
    for first, stopped, norms, undisturbed in run_ranks(ranks, evaluate_while_training, flags):
        assert first == {
            "eval_loss": pytest.approx(expected, rel=3e-3),
            "eval_perplexity": pytest.approx(math.exp(expected), rel=3e-2),
        }
        assert stopped is None  # on every rank, though one alone has been told to
        assert norms == undisturbed


def evaluate_while_training(flags):
    """Two optimizer steps with evaluations around them, then two from the same weights without."""
    states, results = random_states(load_config("test")), []
    for evaluating in (True, False):
        run = boosted(flags + " -x bf16 --microbatch_size 1")
        sharded_state.restore(run.plugin, run.model, run.optimizer, lambda name, key: states[name, key], adam_steps=0)
        layout = resolve_layout(run.args, run.config)
        loader = evaluation_loader(run.plugin, held_out(), layout, run.args)
        batch = next(iter(loader))
        micro_batch = {name: value[: run.args.batch_size] for name, value in batch.items()}
        micro_batches = [micro_batch] * run.args.accumulation_steps
        norms = []
        if evaluating:
            results.append(evaluate(run.booster, run.model, loader, layout))
        for step in range(2):
            forward_backward(run.booster, run.model, run.optimizer, micro_batches, 500)
            norms.append(optimizer_step(run.model, run.optimizer)[0])
            if evaluating and step == 0:
                told = dist.get_rank() == dist.get_world_size() - 1
                results.append(evaluate(run.booster, run.model, loader, layout, lambda told=told: told))
        results.append(norms)
    return results
