"""Sums of gradients over micro-batches and ranks, compared with a float32 model in plain PyTorch."""

import os
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from engine.boost import boost
from engine.shards import initialize_weights, local_shards
from engine.step import forward_backward, optimizer_step
from model_utils import ParameterSpec, initial_weight, load_config
from processes import boosted, job, run_ranks

pytestmark = pytest.mark.slow

LENGTH = 32
FEW, MANY = 4, 64  # sequences in a step, one in a micro-batch
HYBRID = "-p hybrid_parallel --pp 1"


def sequences(number: int) -> torch.Tensor:
    return torch.randint(32, (number, LENGTH), generator=torch.Generator().manual_seed(0))


def plain_gradients(number: int) -> dict[str, torch.Tensor]:
    """Return the float32 gradients of the mean loss over all tokens, from one batch."""
    config = load_config("test")
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_weight(ParameterSpec(name, parameter.shape), config, 42, torch.device("cpu")))
    ids = sequences(number)
    F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def errors(flags: str, number: int, references: dict[str, torch.Tensor]) -> list[tuple[float, float]]:
    """Return this rank's squared errors and squares of the first moments, embeddings left out."""
    replicas = dist.get_world_size()
    if any(split in flags for split in ("pp 2", "tp 2", "sp 2")):
        replicas //= 2
    run = boosted(f"{flags} -b 1 --accumulation_steps {number // replicas} --gradient_clipping 0")
    initialize_weights(run)
    mine = sequences(number).chunk(replicas)[dist.get_rank() % replicas]
    micro_batches = [{"input_ids": ids, "labels": ids} for ids in mine.split(1)]
    forward_backward(run, micro_batches, number * (LENGTH - 1))
    optimizer_step(run)
    found = []
    for shard in local_shards(run):
        if shard.start < shard.stop and "embed" not in shard.spec.name:
            right = shard.read(references[shard.spec.name])
            found.append((((10 * shard.tensor("exp_avg") - right) ** 2).sum().item(), (right**2).sum().item()))
    return found


def relative_error(ranks: int, flags: str, number: int) -> float:
    pairs = [pair for rank in run_ranks(ranks, errors, flags, number, plain_gradients(number)) for pair in rank]
    return (sum(error for error, _ in pairs) / sum(square for _, square in pairs)) ** 0.5


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (1, "-p zero2"),
        (2, "-p zero2"),
        (2, "-p zero2 --exchange step"),
        (1, "-p zero2_cpu"),
        (1, "-p gemini"),
        (1, "-p gemini_auto"),
        (2, "-p gemini_auto"),
        (2, "-p gemini"),
        (2, "-p gemini --exchange step"),
        (2, f"{HYBRID} --tp 1 --zero 0"),
        (2, f"{HYBRID} --tp 1 --zero 1"),
        (2, f"{HYBRID} --tp 1 --zero 2"),
        (2, f"{HYBRID} --tp 2"),
        (2, f"{HYBRID} --tp 1 --sp 2 --zero 1 -a"),
        (2, "-p hybrid_parallel --tp 1 --pp 2"),
    ],
)
def test_the_error_does_not_grow_with_the_number_of_micro_batches(ranks, flags):
    few, many = (relative_error(ranks, flags, number) for number in (FEW, MANY))
    assert many < few < 0.0068  # measured: 0.0041 and 0.0066; summed in bf16 at least 0.0065 and 0.0070


def reductions(flags: str, in_one_host: bool) -> list[tuple[int, str, torch.dtype]]:
    """Return the micro-batch, operation and precision of each reduction in a step of three; 3: after the last one."""
    found, passes = [], []

    def record(name: str) -> None:
        operation = getattr(dist, name)

        def recorded(output, gradients, *args, **kwargs):
            found.append((len(passes) - 1, name, gradients.dtype))
            return operation(output, gradients, *args, **kwargs)

        setattr(dist, name, recorded)

    record("reduce_scatter_tensor")
    record("all_to_all_single")
    if not in_one_host:
        os.environ["LOCAL_RANK"] = "0"
    run = boosted(f"{flags} -b 1 --accumulation_steps 3")
    initialize_weights(run)
    run.model.unwrap().register_forward_pre_hook(lambda *_: passes.append(None))
    batches = [{"input_ids": ids, "labels": ids} for ids in sequences(3).split(1)]
    forward_backward(run, batches, 2 * 3 * (LENGTH - 1))
    passes.append(None)
    optimizer_step(run)
    return found


@pytest.mark.parametrize(
    ("dtype", "in_one_host", "expected"),
    [
        ("fp32", True, ("all_to_all_single", torch.bfloat16)),
        ("fp32", False, ("reduce_scatter_tensor", torch.float32)),
        ("bf16", True, ("reduce_scatter_tensor", torch.bfloat16)),
    ],
)
def test_when_and_in_which_precision_gradients_are_reduced(dtype, in_one_host, expected):
    once_expected = ("reduce_scatter_tensor", torch.bfloat16 if dtype == "bf16" else torch.float32)
    found = []
    for flags in (
        "-p zero2 --exchange micro_batch",
        "-p zero2 --exchange step",
        f"{HYBRID} --tp 1 --zero 1 --exchange step",
        "-p gemini --exchange micro_batch",
        "-p gemini --exchange step",
    ):
        (rank,) = {tuple(rank) for rank in run_ranks(2, reductions, f"{flags} --reduce_dtype {dtype}", in_one_host)}
        operations = {(operation, precision) for _, operation, precision in rank}
        assert operations == {once_expected if "step" in flags else expected}
        found.append([micro_batch for micro_batch, *_ in rank])
    each, once, hybrid, chunks, chunks_once = found
    assert each == [0, 1, 2]
    assert once == hybrid == [3]
    assert chunks == sorted(len(chunks_once) * [0, 1, 2])
    assert chunks_once == len(chunks_once) * [3]


def trained(flags: str, extra_dp: int = 1, **changes: int) -> tuple[list[float], list[torch.Tensor]]:
    """Train two steps from different sequences on each rank; return losses and norms, and this rank's first moments."""
    asked = job(f"{flags} -b 1 --gradient_clipping 0.1", **changes)
    run = boost(replace(asked, parallelism=replace(asked.parallelism, extra_dp=extra_dp)))
    initialize_weights(run)
    micro_batches = run.job.batch.accumulation_steps
    mine = sequences(2 * micro_batches * run.layout.dp).chunk(run.layout.dp)[
        dist.get_rank() // (run.layout.tp * run.layout.pp)
    ]
    steps = []
    for step in mine.chunk(2):
        batches = [{"input_ids": ids, "labels": ids} for ids in step.split(1)]
        steps.append(forward_backward(run, batches, micro_batches * run.layout.dp * (LENGTH - 1)).item())
        steps.append(optimizer_step(run)[0])
    moments = [shard.tensor("exp_avg").clone() for shard in local_shards(run) if shard.start < shard.stop]
    return steps, moments


def assert_the_same(ours: list, theirs: list) -> None:
    """Compare what `trained` returned on all ranks, to the rounding of a float32 sum of up to four micro-batches."""
    for (steps, moments), (other_steps, other_moments) in zip(ours, theirs, strict=True):
        assert steps == pytest.approx(other_steps, rel=1e-6)
        for moment, other in zip(moments, other_moments, strict=True):
            assert torch.allclose(moment, other, rtol=1e-5, atol=4 * 2**-24 * float(other.abs().max()))


@pytest.mark.parametrize(
    ("ranks", "flags", "extra_dp"),
    [(2, "", 1), (2, "-x fp16", 1), (2, "", 2), (4, "", 2), (4, "--tp 2", 1)],
)
def test_gemini_sums_up_the_same_once_a_step(ranks, flags, extra_dp):
    flags = f"-p gemini --accumulation_steps 3 {flags}"
    each, once = (
        run_ranks(ranks, trained, f"{flags} --exchange {exchange}", extra_dp) for exchange in ("micro_batch", "step")
    )
    assert_the_same(once, each)


@pytest.mark.parametrize("flags", ["--zero 0", "--zero 1", "--zero 1 --pp_style interleaved -g"])
def test_a_pipeline_sums_up_the_same_once_a_step(flags):
    flags = f"-p hybrid_parallel --tp 1 --pp 2 --microbatch_size 1 --accumulation_steps 4 {flags} --exchange"
    each, once = (run_ranks(4, four_layers, f"{flags} {exchange}") for exchange in ("micro_batch", "step"))
    assert_the_same(once, each)


def four_layers(flags: str) -> tuple[list[float], list[torch.Tensor]]:
    return trained(flags, num_hidden_layers=4)
