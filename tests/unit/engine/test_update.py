"""The optimizer step compared with ColossalAI's own, and its waits between streams."""

import functools
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import LlamaForCausalLM

import stream_order
from engine import boost, hybrid, zero
from engine.boost import Engine
from engine.shards import MASTER, MOMENTS, initialize_weights, local_shards
from engine.split_layers import split_tokens
from engine.step import forward_backward, loss_scaler, loss_scaler_state, optimizer_step
from engine.update import Adam, Part
from model_utils import ParameterSpec, initial_weight, load_config
from processes import boosted, job, run_ranks

pytestmark = pytest.mark.slow

HYBRID = "-p hybrid_parallel --pp 1"


def colossalais_step(optimizer, rejects) -> float:
    optimizer.step()
    return float(optimizer.get_grad_norm())


def summed(gradient: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    total = gradient.float()
    dist.all_reduce(total, group=group)
    return total.to(gradient.dtype)


def prepare_layers(job, plugin, model, optimizer) -> None:
    """Prepare the model's layers alone."""
    optimizer.stored = {}
    if job.layout.tp > 1:
        for parameter in split_tokens(model.unwrap(), plugin.tp_group, [(0, job.config.num_hidden_layers)]):
            parameter.register_hook(functools.partial(summed, group=plugin.tp_group))


def stepped(flags: str, ours: bool, small: int = zero.SMALL):
    """Return norm, skip, this rank's states and weights after a clipped step from different gradients per rank."""
    zero.SMALL = small
    if not ours:
        for module in (zero, hybrid):
            module.prepare, module.step = prepare_layers, colossalais_step
        boost.patch_loss_scaling = lambda: None
    precision = flags.partition("-x ")[2] or "bf16"  # ColossalAI sums up and reduces in it
    run = boosted(f"{flags} -b 4 --lr 1e-2 --gradient_clipping 0.1 --reduce_dtype {precision}")
    initialize_weights(run)
    generator = torch.Generator().manual_seed(dist.get_rank() // run.layout.tp)
    ids = torch.randint(run.config.vocab_size, (4, 32), generator=generator)
    label_tokens = 4 * 31 * dist.get_world_size() // run.layout.tp
    forward_backward(run, [{"input_ids": ids, "labels": ids}], label_tokens)
    norm, skipped = optimizer_step(run)
    shards = local_shards(run)
    states = [shard.tensor(key).clone() for shard in shards for key in (MASTER, *MOMENTS)]
    weights = [parameter.detach().clone() for parameter in run.model.unwrap().parameters()]
    return norm, skipped, states, weights


@functools.cache
def reference(ranks: int, flags: str) -> list[tuple]:
    return run_ranks(ranks, stepped, flags, False)


@pytest.mark.parametrize("small", [zero.SMALL, 0])
@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (1, "-p zero2"),
        (2, "-p zero2"),
        (1, "-p zero2 -x fp16"),
        (2, "-p zero2 -x fp32"),
        (3, "-p zero2 -x fp32"),  # a number of ranks that divides none of its sizes
        (1, f"{HYBRID} --zero 0"),
        (2, f"{HYBRID} --tp 1 --zero 1"),
        (2, f"{HYBRID} --tp 2 --zero 0 -x fp16"),
    ],
)
def test_results_equal_colossalais(ranks, flags, small):
    for ours, theirs in zip(run_ranks(ranks, stepped, flags, True, small), reference(ranks, flags), strict=True):
        assert ours[0] == pytest.approx(theirs[0], rel=1e-6)
        assert ours[0] > 0.1  # it clips
        assert ours[1] == theirs[1] == False  # noqa: E712
        for state, other in zip(ours[2], theirs[2], strict=True):
            assert torch.allclose(state, other, rtol=1e-5, atol=1e-8)
        for weight, other in zip(ours[3], theirs[3], strict=True):
            assert torch.allclose(weight.float(), other.float(), rtol=2**-7, atol=1e-7)  # a rounding of bf16 apart


def hazards(flags: str, small: int, ignored: tuple[str, str] | None = None) -> tuple[list[str], set[str]]:
    """Return the missing waits in three steps that reduce gradients during the backward pass, as on a GPU.

    Also return all streams that were used.
    """
    storages = stream_order.watch_storages(ignored)

    class Plugin(hybrid.HybridParallelPlugin):
        def __init__(self, **options):
            super().__init__(**options | {"overlap_communication": True})

    hybrid.HybridParallelPlugin = Plugin
    zero.SMALL = small
    run = boosted(f"{flags} -x bf16 -b 2")
    initialize_weights(run)
    assert sum(parameter.numel() >= small for parameter in run.model.unwrap().parameters()) > 2 * zero.IN_FLIGHT
    ids = torch.randint(run.config.vocab_size, (2, 32), generator=torch.Generator().manual_seed(dist.get_rank()))
    micro_batches = [{"input_ids": ids, "labels": ids}] * run.job.batch.accumulation_steps
    with storages:
        for _ in range(3):
            forward_backward(run, micro_batches, 62 * len(micro_batches) * 2)
            optimizer_step(run)
    return sorted(storages.hazards), set(storages.streams.known)


class TestStreams:
    @pytest.mark.parametrize("small", [0, 3000])  # 3000: weights of key, value and norms are smaller
    @pytest.mark.parametrize(
        "flags",
        [
            "-p zero2",
            "-p zero2 --accumulation_steps 3 -g",
            "-p zero2 --accumulation_steps 3 --exchange step",
            f"{HYBRID} --tp 1 --zero 1",
        ],
    )
    def test_wait_for_one_another(self, flags, small):
        for found, streams in run_ranks(2, hazards, flags, small):
            assert found == []
            assert streams == {"default", "stream 2", "NCCL"}

    @pytest.mark.parametrize(
        ("ignored", "hazard"),
        [
            (("stream 2", "wait_stream"), "all_to_all_single on stream 2 does not wait for"),
            (("default", "wait_event"), "on default gets memory and does not wait for"),
            (("default", "wait_stream"), "on default does not wait for"),
            (("default", "wait"), "on default does not wait for all_gather_into_tensor on NCCL"),
        ],
    )
    def test_missing_wait_is_detected(self, ignored, hazard):
        for found, _ in run_ranks(2, hazards, "-p zero2", 0, ignored):
            assert any(hazard in line for line in found), found


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("step", "dtype", "scale", "divisor"),
    [(1, torch.bfloat16, 2.0, None), (7, torch.float32, -1, None), (2, torch.bfloat16, 1.0, 3.0)],
)
def test_one_pass_over_the_weights_is_adamw(step, dtype, scale, divisor):
    master, moment, square = torch.randn(3, 5000, device="cuda").abs_()
    gradient, working = torch.randn(5000, device="cuda").to(dtype), torch.empty(5000, dtype=dtype, device="cuda")
    others = [tensor.clone() for tensor in (master, moment, square)]
    adam = Adam.__new__(Adam)  # its constructor loads kernels that are not needed here
    part = Part(torch.nn.Parameter(working), working, master, gradient)
    updated = []
    adam.parts, adam.updated = {master.data_ptr(): part}, updated.append
    adam.divisor = None if divisor is None else torch.tensor(divisor, device="cuda")
    tensors = [[tensor] for tensor in (gradient, master, moment, square)]
    adam._update_on_device(0, None, tensors, 1e-2, 0.9, 0.95, 1e-8, step, 1, 1, 0.1, scale)

    lists = [[tensor] for tensor in (others[0], gradient.float() / (abs(scale) * (divisor or 1)), others[1], others[2])]
    options = dict(lr=1e-2, beta1=0.9, beta2=0.95, weight_decay=0.1, eps=1e-8, amsgrad=False, maximize=False)
    torch._fused_adamw_(*lists, [], [torch.tensor(float(step), device="cuda")], **options)
    for ours, theirs in zip((master, moment, square), others, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-7)
    assert torch.equal(working, master.to(dtype))
    assert updated == [part]


@pytest.mark.gpu
def test_sums_of_gradients():
    from engine.kernels import add_

    gradients = torch.randn(3, 5000, device="cuda").bfloat16()
    total = gradients[0].float()
    for gradient in gradients[1:]:
        add_(total, gradient)
    assert torch.equal(total, gradients[0].float() + gradients[1].float() + gradients[2].float())


def overflowed():
    run = boosted("-p zero2 -x fp16 -b 2")
    initialize_weights(run)
    before = [parameter.detach().clone() for parameter in run.model.unwrap().parameters()]
    ids = torch.randint(run.config.vocab_size, (2, 32))
    forward_backward(run, [{"input_ids": ids, "labels": ids}], 1e-4)
    skipped = optimizer_step(run)[1]
    after = [parameter.detach() for parameter in run.model.unwrap().parameters()]
    return skipped, all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_an_overflow_updates_nothing():
    assert run_ranks(1, overflowed) == [(True, True)]


STEPS = (False, True, True, False, False)  # overflows: the loss scale grows in the first, and falls in the third
SCALES = [2.0**17, 2.0**17, 2.0**16, 2.0**16, 2.0**16]  # after each step


def sequences(step: int) -> torch.Tensor:
    return torch.randint(1024, (4, 32), generator=torch.Generator().manual_seed(step))


def plain_training(clipping: float, left_out: Sequence[bool]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Return gradient norms and first moments of a float32 loop that leaves out steps."""
    config = load_config("test")
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_weight(ParameterSpec(name, parameter.shape), config, 0, torch.device("cpu")))
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    norms = []
    for step, skipped in enumerate(left_out):
        if skipped:
            continue
        ids = sequences(step)
        F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), clipping or torch.inf).item())
        adamw.step()
        adamw.zero_grad()
    return norms, {name: adamw.state[parameter]["exp_avg"] for name, parameter in model.named_parameters()}


def scaled_training(flags: str, clippings: list[float], references: list[dict[str, torch.Tensor]]) -> list:
    """Return, for each clipping, norms, scales, and the largest relative error of this rank's first moments."""
    found = []
    for clipping, moments in zip(clippings, references, strict=True):
        run = boosted(f"{flags} -x fp16 --lr 1e-3 --gradient_clipping {clipping} --seed 0")
        initialize_weights(run)
        scaler = loss_scaler(run).grad_scaler
        scaler._growth_step = scaler._growth_interval - 1
        replicas = dist.get_world_size() // (run.layout.tp * run.layout.pp)
        norms, scales = [], []
        for step, overflows in enumerate(STEPS):
            mine = sequences(step).chunk(replicas)[dist.get_rank() % replicas].split(run.job.batch.batch_size)
            # Only the last rank's loss is too large for fp16.
            labels = 1e-4 if overflows and dist.get_rank() == dist.get_world_size() - 1 else 4 * 31
            micro_batches = [{"input_ids": ids, "labels": ids} for ids in mine]
            forward_backward(run, micro_batches, labels)
            norm, skipped = optimizer_step(run)
            assert skipped == overflows
            norms += [] if skipped else [norm]
            scales.append(scaler.scale.item())
        shards = [shard for shard in local_shards(run) if shard.start < shard.stop]
        rights = [shard.read(moments[shard.spec.name]) for shard in shards]
        pairs = [(shard.tensor("exp_avg"), right) for shard, right in zip(shards, rights, strict=True)]
        found.append((norms, scales, max(((own - right).norm() / right.norm()).item() for own, right in pairs)))
    return found


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (2, "-p zero2 -b 1 --accumulation_steps 2"),
        (2, "-p gemini -b 1 --accumulation_steps 2"),
        (2, "-p gemini -b 1 --accumulation_steps 2 --exchange step"),
        (2, f"{HYBRID} --tp 2 --zero 0 -b 4"),
        (2, "-p hybrid_parallel --tp 1 --pp 2 -b 4 --microbatch_size 2"),
    ],
)
def test_gradients_are_divided_by_the_scale_that_multiplied_them(ranks, flags):
    """Cover a scale that grows, an overflow on one rank, and a scale that falls. Measured error: 4e-3."""
    norms = plain_training(0, STEPS)[0]
    clippings = [0.0, 0.75 * norms[0]]  # between the gradient's norm and half of it
    references = [plain_training(clipping, STEPS) for clipping in clippings]
    for rank in run_ranks(ranks, scaled_training, flags, clippings, [moments for _, moments in references]):
        for found, (right, _) in zip(rank, references, strict=True):
            assert found[0] == pytest.approx(right, rel=1e-2)
            assert found[1] == SCALES
            assert found[2] < 0.02


REJECTED = (False, False, True, False)


def snapshot(run: Engine) -> list[torch.Tensor]:
    """Return copies of weights, master weights, moments and Adam's step counts on this rank."""
    shards = local_shards(run) if run.layout.plugin != "fsdp" else []
    states = [value for state in run.optimizer.optim.state.values() for value in state.values()]
    gemini = run.layout.plugin == "gemini"
    working = [chunk.payload for chunk in run.optimizer.chunk16_set] if gemini else run.model.parameters()
    tensors = [*working, *(shard.tensor(key) for shard in shards for key in (MASTER, *MOMENTS))]
    return [torch.as_tensor(value).detach().clone() for value in (*tensors, *states)]


def rejecting_training(flags: str, moments: dict[str, torch.Tensor]) -> tuple:
    """Reject steps by their norm; return norms, Adam's step count, the loss scale's state, and the moments' error."""
    asked = job(f"{flags.replace('fsdp', 'zero2')} --lr 1e-3 --gradient_clipping 0.5 --seed 0")
    if "fsdp" in flags:
        asked = replace(asked, parallelism=replace(asked.parallelism, plugin="fsdp"))
    run = boost.boost(asked)
    initialize_weights(run)
    replicas, norms = dist.get_world_size() // (run.layout.tp * run.layout.pp), []
    for step, rejected in enumerate(REJECTED):
        mine = sequences(step).chunk(replicas)[dist.get_rank() % replicas]
        micro_batches = [{"input_ids": ids, "labels": ids} for ids in mine.split(run.job.batch.batch_size)]
        before, seen = snapshot(run), []
        forward_backward(run, micro_batches, 4 * 31)
        norm, skipped = optimizer_step(run, lambda norm, seen=seen, rejected=rejected: seen.append(norm) or rejected)
        assert skipped == rejected
        assert seen == [norm]
        changed = [not torch.equal(old, new) for old, new in zip(before, snapshot(run), strict=False)]
        assert not any(changed) if rejected else any(changed)
        norms.append(norm)
    counts = {int(state["step"]) for state in run.optimizer.optim.state.values()}
    shards = [shard for shard in local_shards(run) if shard.start < shard.stop] if "fsdp" not in flags else []
    pairs = [(shard.tensor("exp_avg"), shard.read(moments[shard.spec.name])) for shard in shards]
    error = max([((own - right).norm() / right.norm()).item() for own, right in pairs], default=0)
    return norms, counts, loss_scaler_state(run), error


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (2, "-p gemini -x bf16 -b 1 --accumulation_steps 2"),
        (2, "-p gemini -x fp16 -b 1 --accumulation_steps 2 --exchange step"),
        (2, "-p zero2 -x fp16 -b 2"),
        (1, "-p zero2_cpu -x bf16 -b 4"),
        (1, "-p hybrid_parallel -x fp32 -b 4"),
        (2, f"{HYBRID} --tp 2 -x bf16 -b 4"),
        (2, "-p hybrid_parallel --tp 1 --pp 2 -x fp16 -b 4"),
        (2, "-p fsdp -x bf16 -b 2"),
    ],
)
def test_a_rejected_step_changes_nothing(ranks, flags):
    """The moments equal those of a plain loop that leaves the step out; fp16's scale counts it as one without overflow.

    Measured error of the moments: fp32 1e-6, fp16 4e-3, bf16 2e-2.
    """
    _, moments = plain_training(0.5, REJECTED)
    for norms, counts, scaler, error in run_ranks(ranks, rejecting_training, flags, moments):
        assert min(norms) > 0.5
        assert counts == {REJECTED.count(False)}
        assert (scaler is not None) == ("fp16" in flags)
        if scaler:
            assert scaler == {"scale": 2.0**16, "growth_step": len(REJECTED), "hysteresis_step": 0}
        assert error < (1e-4 if "fp32" in flags else 0.02 if "fp16" in flags else 0.1)
