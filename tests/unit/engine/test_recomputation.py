"""Activation checkpointing: the layers recomputed, the results unchanged, and the fraction that `auto` chooses."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from attn import TORCH_FUSED, select_attention
from engine import shards
from engine.job import Job, recomputed_layers
from engine.step import forward_backward, optimizer_step
from planning.machines import DryRun
from planning.memory import CONTEXT_BYTES, USABLE_FRACTION, estimate_memory, settle
from pretrain import parse_args
from processes import boosted, job, run_ranks
from runtime.console import InputError
from training.checks import check_job


@pytest.mark.parametrize(
    ("fraction", "expected"),
    [(0, []), (0.25, [3]), (0.5, [1, 3]), (0.75, [1, 2, 3]), (0.9, [0, 1, 2, 3]), (1, [0, 1, 2, 3])],
)
def test_layers_are_spread_evenly(fraction, expected):
    assert recomputed_layers(4, fraction) == set(expected)


def passes(flags: str, **changes) -> tuple[float, float, int]:
    """Return loss, norm, and the number of calls of decoder layers in one step."""
    engine = boosted(f"{flags} -b 2", **changes)
    shards.initialize_weights(engine)
    entered = []
    for layer in engine.model.modules():
        if isinstance(layer, LlamaDecoderLayer):
            layer.register_forward_pre_hook(lambda *_: entered.append(1))
    ids = torch.randint(engine.config.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    loss = forward_backward(engine, [{"input_ids": ids, "labels": ids}], 62)
    total = torch.tensor([loss.item(), len(entered)])
    dist.all_reduce(total)
    return total[0].item(), optimizer_step(engine)[0], int(total[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "flags"), [(1, "-p zero2"), (1, "-p gemini"), (2, "-p hybrid_parallel --tp 1 --pp 2")]
)
def test_changes_the_work_and_not_the_result(ranks, flags):
    whole = run_ranks(ranks, passes, flags)[0]
    for fraction in (0.5, 1):
        found = run_ranks(ranks, passes, f"{flags} --recompute {fraction}")[0]
        assert found == (*whole[:2], (1 + fraction) * whole[2])


class Attentions(TorchDispatchMode):
    """A counter of forward runs of the attention kernel."""

    runs = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.runs += operator is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        return operator(*args, **kwargs or {})


def attentions(flags: str) -> tuple[float, float, int]:
    """Return loss, norm, and the kernel's runs in one step, over all ranks."""
    with Attentions() as counted:
        loss, norm, _ = passes(flags, _attn_implementation=TORCH_FUSED)
    runs = torch.tensor(counted.runs)
    dist.all_reduce(runs)
    return loss, norm, runs.item()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (1, "-p zero2"),
        (1, "-p gemini"),
        (2, "-p hybrid_parallel --tp 1 --pp 2"),
        (2, "-p hybrid_parallel --tp 2 --pp 1"),
        (2, "-p hybrid_parallel --tp 1 --pp 1 --sp 2"),
    ],
)
def test_kept_attention_runs_once(ranks, flags):
    whole = run_ranks(ranks, attentions, flags)[0]
    assert run_ranks(ranks, attentions, f"{flags} -g")[0] == (*whole[:2], 2 * whole[2])
    assert run_ranks(ranks, attentions, f"{flags} -g --keep_attention")[0] == whole


def settled(batch_size: int) -> tuple[float, bool, float, float]:
    """Settle `auto` for 7B on one H200: fraction recomputed, True if attention is kept, needed over available memory.

    The fourth value is that ratio for the next faster choice: one layer less, or attention kept if it was not.
    """
    asked = job(f"-c 7b -l 4096 -p zero2 -b {batch_size} -a --gpus 1 --recompute auto")
    dry_run = DryRun(dry_run=True, gpu="H200")
    check_job(asked, dry_run, given=frozenset())
    select_attention(asked.config, flash_attention=True)
    found = settle(asked, dry_run)
    fraction, kept = found.recomputed, found.compute.keep_attention
    less = fraction - 1 / found.config.num_hidden_layers if kept else fraction
    faster = replace(found, compute=replace(found.compute, recompute=less, keep_attention=True))
    return fraction, kept, memory_ratio(found), memory_ratio(faster)


def memory_ratio(planned: Job) -> float:
    return estimate_memory(planned).peak.total / (141e9 * USABLE_FRACTION - CONTEXT_BYTES)


class TestAuto:
    def test_recomputes_no_more_than_necessary(self):
        for batch_size in (3, 4, 8):
            fraction, kept, needed, with_less = settled(batch_size)
            assert 0 < fraction < 1
            assert kept
            assert needed <= 1 < with_less

    def test_recomputes_attention_if_necessary(self):
        fraction, kept, needed, with_less = settled(16)
        assert (fraction, kept) == (1, False)
        assert needed <= 1 < with_less

    def test_recomputes_nothing_if_all_fits(self):
        assert settled(1)[0] == 0

    def test_says_when_nothing_helps(self, capsys):
        assert settled(64)[0] == 1
        assert "will not be enough" in capsys.readouterr().out


@pytest.mark.parametrize("fraction", ["1.5", "-1", "nan"])
def test_a_fraction_is_from_0_to_1(fraction):
    asked = job(f"--recompute {fraction}")
    with pytest.raises(InputError, match=f"--recompute: must be auto or from 0 to 1, not {float(fraction)}"):
        check_job(asked, DryRun(), given=frozenset())


def test_a_word_is_not_a_fraction():
    with pytest.raises(InputError, match="--recompute: 'much' is neither auto nor a number"):
        parse_args(["--recompute", "much"])
