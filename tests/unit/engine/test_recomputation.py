"""Which layers are computed twice, that the result does not depend on it, and how many `auto` chooses."""

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from attn import TORCH_FUSED, select_attention
from engine import shards
from engine.layout import resolve_layout
from engine.recomputation import recomputed_layers
from engine.step import forward_backward, optimizer_step
from model_utils import load_config
from planning.memory import CONTEXT_BYTES, USABLE_SHARE, estimate_memory, settle_recomputation
from pretrain import parse_args
from processes import boosted, run_ranks
from runtime.console import InputError
from training.checks import validate_args


@pytest.mark.parametrize(
    ("share", "expected"),
    [(0, []), (0.25, [3]), (0.5, [1, 3]), (0.75, [1, 2, 3]), (0.9, [0, 1, 2, 3]), (1, [0, 1, 2, 3])],
)
def test_layers_are_spread_evenly(share, expected):
    assert recomputed_layers(load_config("test"), share) == set(expected)


def passes(flags: str, **changes) -> tuple[float, float, int]:
    """Loss, norm, and how often decoder layers were entered in one step."""
    run = boosted(f"{flags} -b 2", **changes)
    shards.initialize_weights(run)
    entered = []
    for layer in run.model.modules():
        if isinstance(layer, LlamaDecoderLayer):
            layer.register_forward_pre_hook(lambda *_: entered.append(1))
    ids = torch.randint(run.config.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    loss = forward_backward(run, [{"input_ids": ids, "labels": ids}], 62)
    total = torch.tensor([loss.item(), len(entered)])
    dist.all_reduce(total)
    return total[0].item(), optimizer_step(run)[0], int(total[1])


@pytest.mark.parametrize(
    ("ranks", "flags"), [(1, "-p zero2"), (1, "-p gemini"), (2, "-p hybrid_parallel --tp 1 --pp 2")]
)
def test_changes_the_work_and_not_the_result(ranks, flags):
    whole = run_ranks(ranks, passes, flags)[0]
    for share in (0.5, 1):
        assert run_ranks(ranks, passes, f"{flags} --recompute {share}")[0] == (*whole[:2], (1 + share) * whole[2])


class Attentions(TorchDispatchMode):
    """Counts how often the kernel of attention runs forward."""

    runs = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.runs += operator is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        return operator(*args, **kwargs or {})


def attentions(flags: str) -> tuple[float, float, int]:
    """Loss, norm, and the kernel's runs in one step, over all ranks."""
    with Attentions() as counted:
        loss, norm, _ = passes(flags, _attn_implementation=TORCH_FUSED)
    runs = torch.tensor(counted.runs)
    dist.all_reduce(runs)
    return loss, norm, runs.item()


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
def test_attention_that_is_kept_runs_once(ranks, flags):
    whole = run_ranks(ranks, attentions, flags)[0]
    assert run_ranks(ranks, attentions, f"{flags} -g")[0] == (*whole[:2], 2 * whole[2])
    assert run_ranks(ranks, attentions, f"{flags} -g --keep_attention")[0] == whole


def settled(batch_size: int) -> tuple[float, bool, float, float]:
    """What `auto` takes on one H200, the share and whether attention is kept; memory that it and the next better need.

    Memory is over the room there is; better is one layer less, or where attention is not kept to keep it.
    """
    flags = f"-p zero2 -b {batch_size} -a --dry_run --gpus 1 --gpu H200 --recompute auto"
    args, config = parse_args(flags.split()), load_config("7b")
    validate_args(args, config)
    select_attention(config, args.flash_attention)
    layout = resolve_layout(args, config)
    settle_recomputation(args, config, layout)
    room = 141e9 * USABLE_SHARE - CONTEXT_BYTES
    needed = estimate_memory(args, config, layout).peak.total / room
    share, kept = args.recompute, args.keep_attention
    if kept:
        args.recompute -= 1 / config.num_hidden_layers
    args.keep_attention = True
    return share, kept, needed, estimate_memory(args, config, layout).peak.total / room


class TestAuto:
    def test_recomputes_no_more_than_it_must(self):
        for batch_size in (3, 4, 8):
            share, kept, needed, with_less = settled(batch_size)
            assert 0 < share < 1
            assert kept
            assert needed <= 1 < with_less

    def test_attention_too_where_it_must(self):
        share, kept, needed, with_less = settled(16)
        assert (share, kept) == (1, False)
        assert needed <= 1 < with_less

    def test_nothing_where_all_fits(self):
        assert settled(1)[0] == 0

    def test_says_when_nothing_helps(self, capsys):
        assert settled(64)[0] == 1
        assert "will not be enough" in capsys.readouterr().out


@pytest.mark.parametrize("share", ["1.5", "-1", "nan"])
def test_a_share_is_from_0_to_1(share):
    args = parse_args(["-c", "test", "-l", "64", "--recompute", share])
    with pytest.raises(InputError, match=r"--recompute: .* is neither auto nor from 0 to 1"):
        validate_args(args, load_config("test"))


def test_a_word_is_no_share():
    with pytest.raises(InputError, match="--recompute: 'much' is neither auto nor a number"):
        parse_args(["--recompute", "much"])
