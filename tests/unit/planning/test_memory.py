"""The estimate of memory, against the tensors of real training steps and peaks measured on GPUs."""

import os
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

import benchmark
from attn import select_attention
from engine.boost import boost
from engine.job import AUTO, MICRO_BATCH, STEP, Exchange, Job
from engine.shards import initialize_weights
from engine.step import forward_backward, optimizer_step
from model_utils import count_parameters, load_config, trained_specs
from planning.machines import DryRun
from planning.memory import MemoryEstimate, estimate_memory, settle
from processes import run_ranks
from training.checks import check_job
from training.flags import job_of, take

SMALL = "--no-compile -c tiny -b 4 -l 128"


class TensorMemory(TorchDispatchMode):
    """Mode that tracks the bytes of all live tensors created in it; `peak` is the maximum after any operation."""

    def __init__(self):
        super().__init__()
        self.storages = WeakIdKeyDictionary()
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                self.storages[tensor.untyped_storage()] = None
        self.peak = max(self.peak, sum(storage.nbytes() for storage in list(self.storages)))
        return out


def planned(flags: str, layers: int | None = None) -> Job:
    """Return benchmark.py's job for these flags, with `layers` layers if given."""
    args = benchmark.parse_args(flags.split())
    config = load_config(args.config)
    config.num_hidden_layers = layers or config.num_hidden_layers
    job = job_of(args, config)
    check_job(job, take(DryRun, args), args.given)
    select_attention(config, args.flash_attention, job.layout.sp > 1)
    return job


def accumulating(job: Job, exchange: str) -> Job:
    """Return the job with two micro-batches per step, which benchmark.py does not have."""
    return replace(job, batch=replace(job.batch, accumulation_steps=2), exchange=Exchange(exchange=exchange))


def measured_peaks(flags: str, exchange: str = "") -> tuple[float, float]:
    """Return the peak bytes of this rank's tensors in the passes and in the optimizer step of the second step.

    Args:
        exchange: accumulate gradients, and exchange them so.
    """
    os.environ["LOCAL_RANK"] = "0"  # a host for each rank: within one the exchange takes less
    job = planned(flags)
    if exchange:
        job = accumulating(job, exchange)
    label_tokens = job.batch.batch_size * job.layout.dp * (job.batch.max_length - 1)
    with TensorMemory() as memory:
        engine = boost(job)
        initialize_weights(engine)
        for batch in benchmark.batches(engine, num_steps=2):
            memory.peak = 0
            forward_backward(engine, [batch] * job.batch.accumulation_steps, label_tokens)
            passes, memory.peak = memory.peak, 0
            optimizer_step(engine)
            engine.optimizer.optim._scratch = torch.empty(0)  # Adam's buffer on the CPU; it needs none on a GPU
    return passes, memory.peak


def estimate(flags: str, layers: int | None = None) -> MemoryEstimate:
    return estimate_memory(planned(flags, layers))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (1, "-p zero2 -a"),
        (1, "-p zero2 -a -g"),
        (1, "-p zero2"),  # with the S x S matrices of attention
        (1, "-p zero2 --mixed_precision fp32 -a"),
        (1, "-p gemini -a"),
        (1, "-p gemini -a -g"),
        (1, "-p gemini -a -g --keep_attention"),
        (1, "-p hybrid_parallel -a -g"),
        (1, "-p fsdp -a"),
        (2, "-p zero2 -a -g"),
        (2, "-p gemini -a"),
        (2, "-p gemini -a -g -b 8"),
        (2, "-p gemini --tp 2 -a"),
        (2, "-p gemini --tp 2 -a -g"),
        (2, "-p fsdp -a -g -b 8"),  # with fewer tokens the largest are buffers of Gloo
        (2, "-p fsdp -a -g --keep_attention -b 8"),
        (2, "-p 3d --tp 2 -a"),
        (2, "-p 3d --tp 2 -a -g --keep_attention"),
        (2, "-p 3d --pp 2 --mbs 2 -a"),
        (2, "-p 3d --pp 2 --pp_style interleaved -a"),
        (2, "-p 3d --sp 2 -a"),
        (2, "-p 3d --zero 1 -a"),
    ],
)
def test_estimate_matches_the_tensors_of_real_steps(ranks, flags):
    flags = f"{SMALL} {flags}"
    peaks = run_ranks(ranks, measured_peaks, flags)
    predicted = estimate(f"{flags} --dry_run --gpus {ranks}")
    fullest = max(passes for passes, _ in peaks)
    assert max(phase.total for phase in predicted.phases[:-1]) == pytest.approx(fullest, rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (1, "-p zero2 -b 8"),  # more logits than the eager loss computes at a time
        (1, "-p zero2 -b 1"),
        (2, "-p zero2 -b 1"),
        (2, "-p 3d --tp 2 -b 1"),
    ],
)
def test_estimate_matches_with_a_large_vocabulary_tied_embeddings_and_wide_heads(tmp_path, ranks, flags):
    config = load_config("tiny")
    config.vocab_size, config.head_dim, config.tie_word_embeddings = 32768, 96, True
    config.save_pretrained(tmp_path)
    flags = f"--no-compile -c {tmp_path} -l 128 -a {flags}"
    fullest = max(passes for passes, _ in run_ranks(ranks, measured_peaks, flags))
    predicted = estimate(f"{flags} --dry_run --gpus {ranks}")
    assert max(phase.total for phase in predicted.phases[:-1]) == pytest.approx(fullest, rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("exchange", [MICRO_BATCH, STEP])
@pytest.mark.parametrize("plugin", ["gemini", "zero2"])
def test_estimate_matches_the_tensors_of_accumulating_steps(plugin, exchange):
    flags = f"{SMALL} -p {plugin} -a"
    fullest = max(passes for passes, _ in run_ranks(2, measured_peaks, flags, exchange))
    predicted = estimate_memory(accumulating(planned(f"{flags} --dry_run --gpus 2"), exchange))
    assert max(phase.total for phase in predicted.phases[:3]) == pytest.approx(fullest, rel=0.03)


@pytest.mark.parametrize(
    ("flags", "settled"),
    [
        ("-c 7b -p gemini --gpus 8", STEP),
        ("-c 13b -p gemini --gpus 8", AUTO),  # 52 GB of sums do not fit
        ("-c 7b -p gemini --gpus 1", AUTO),
        ("-c 7b -p gemini_auto --gpus 8", AUTO),
        ("-c 7b -p zero2 --gpus 8", STEP),
    ],
)
def test_gradients_are_exchanged_once_a_step_if_their_sums_fit(flags, settled):
    asked = accumulating(planned(f"{flags} -a -g --dry_run"), AUTO)
    assert settle(asked, DryRun(dry_run=True, gpu="H100")).exchange.exchange == settled


def test_adapters_with_frozen_weights():
    job = planned("-c tiny -l 128 -p zero2 -a --dry_run --gpus 1")
    job = replace(job, adapters=LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    trained = sum(spec.shape.numel() for spec in trained_specs(job.config, job.adapters))
    first = estimate_memory(job).phases[0]
    assert first.weights == 2 * (count_parameters(job.config) + trained)
    assert first.optimizer == 12 * trained


def peak_gb(flags: str, bytes_per_logit: int, layers: int | None = None, micro_batches: int = 1) -> float:
    """Return the estimated peak of a loss that takes so much memory, as it did when the peaks below were measured.

    Eagerly it took 14 bytes. Compiled it stored logits and their gradient, 4 bytes; now one overwrites the other.
    """
    job = planned(flags, layers)
    job = replace(job, batch=replace(job.batch, accumulation_steps=micro_batches))
    predicted, batch, layout = estimate_memory(job), job.batch, job.layout
    loss = predicted.phases[0]
    sequences = batch.batch_size if layout.pp == 1 else layout.microbatch_size
    logits = sequences * batch.max_length * job.config.vocab_size // (layout.tp * layout.sp) if loss.logits else 0
    return max(predicted.peak.total, loss.total - loss.logits + bytes_per_logit * logits) / 1e9


# Peak GB allocated by torch on an H100: width of 7B, 4 layers, 2 sequences of 4096, no recomputation.
MEASURED = {"zero2": 25.4, "zero2_cpu": 12.5, "gemini_auto": 12.7}
# Compiled, on an H100 or H200: layers, flags, GB, and the fraction by which the estimate may exceed it.
MEASURED_COMPILED = [
    (8, "-p zero2 -b 4", 47.38, 0.01),
    (8, "-p gemini -b 4", 47.38, 0.01),
    (8, "-p hybrid_parallel --tp 1 --pp 1 -b 4", 47.38, 0.01),
    (8, "-p gemini_auto -b 4", 25.2, 0.01),
    (32, "-p zero2 -b 2", 132.4, 0.01),
    (32, "-p gemini -b 2", 132.4, 0.01),
    (32, "-p zero2 -b 2 --fp8", 113.71, 0.01),
    (32, "-p zero2 -b 3 --fp8", 126.60, 0.01),
    (32, "-p zero2 -b 4 --fp8", 139.49, 0.01),
    (32, "-p zero2 -b 2 --fp8 --fp8_recipe rowwise", 120.23, 0.01),
    (8, "-p zero2 -b 1", 30.22, 0.05),
    (8, "-p zero2 -b 8", 65.19, 0.05),
    (8, "-p gemini -b 4 -g", 30.85, 0.01),
    (8, "-p gemini -b 16 -g --keep_attention", 45.87, 0.01),
    (8, "-p zero2 -b 4 -g", 33.01, 0.02),
    (8, "-p zero2 -b 4 -g --keep_attention", 32.47, 0.02),
    (8, "-p zero2 -b 8 -g", 36.52, 0.02),
    (8, "-p zero2 -b 16 -g", 44.46, 0.01),
    (32, "-p zero2 -b 16 -g", 125.35, 0.01),
    (32, "-p zero2 -b 16 -g --keep_attention", 140.1, 0.01),
    (32, "-p zero2_cpu -b 4 -g", 29.86, 0.03),
    (32, "-p zero2_cpu -b 8 -g --keep_attention", 36.58, 0.03),
]


# Compiled, two H100 or H200 and NCCL, gradients reduced in bf16 or as the flags say: layers, flags, GB.
MEASURED_ON_TWO = [
    (8, "-p zero2 -b 4", 36.09),
    (8, "-p zero2 -b 4 -g", 20.6),
    (8, "-p zero2 -b 4 -g --keep_attention", 20.5),
    (8, "-p gemini -b 4", 35.8),
    (32, "-p gemini -b 16 -g", 79.73),
    (8, "-p fsdp -b 4", 34.87),
    (8, "-p fsdp -b 8", 57.9),
    (8, "-p 3d --zero 1 -b 4", 36.09),
    (8, "-p zero2 -b 4 --reduce_dtype fp32", 36.09),
    (8, "-p gemini -b 4 --reduce_dtype fp32", 35.82),
    (8, "-p zero2 -b 4 --fp8 --reduce_dtype fp32", 28.37),
    (8, "-p 3d --tp 2 --pp 1 -b 8 --reduce_dtype fp32", 35.06),
    (8, "-p 3d --tp 1 --pp 1 --sp 2 --zero 1 -b 8 --reduce_dtype fp32", 36.09),
    (8, "-p 3d --tp 1 --pp 2 -b 16 --microbatch_size 2 --reduce_dtype fp32", 26.64),
    (8, "-p 3d --tp 1 --pp 2 -b 16 --microbatch_size 2 --pp_style interleaved --reduce_dtype fp32", 29.28),
]


@pytest.mark.parametrize("plugin", MEASURED)
def test_measured_on_a_gpu(plugin):
    assert peak_gb(f"-c 7b -p {plugin} -b 2 -a --no-compile", 14, 4) == pytest.approx(MEASURED[plugin], rel=0.01)


@pytest.mark.parametrize(("layers", "flags", "measured", "off"), MEASURED_COMPILED)
def test_measured_compiled(layers, flags, measured, off):
    assert measured * 0.99 <= peak_gb(f"-c 7b -a {flags}", 4, layers) <= measured * (1 + off)


@pytest.mark.parametrize("plugin", ["zero2", "gemini", "hybrid_parallel"])
def test_measured_with_accumulation(plugin):
    """Compiled on an H200: 8 micro-batches of 2 sequences, summed in float32."""
    predicted = peak_gb(f"-c 7b -a -p {plugin} -b 2 --dry_run --gpus 1", 4, layers=8, micro_batches=8)
    assert predicted == pytest.approx(44.42, rel=0.01)


@pytest.mark.parametrize(("layers", "flags", "measured"), MEASURED_ON_TWO)
def test_measured_on_two_gpus(layers, flags, measured):
    predicted = peak_gb(f"-c 7b -a --compile --reduce_dtype bf16 {flags} --dry_run --gpus 2", 4, layers)
    assert predicted == pytest.approx(measured, rel=0.03)


def test_large_layouts_by_bytes_per_parameter():
    """70B on 512 GPUs: 14 bytes per parameter, with hardly any unused room in chunks; tp 4 x pp 2 with ZeRO over 64."""
    flags = "-c 70b -b 8 -g -a --dry_run --gpus 512"
    step = estimate(f"{flags} -p gemini").phases[-1]
    assert step.weights + step.optimizer == pytest.approx(14 * 68.98e9 / 512, rel=0.02)
    step = estimate(f"{flags} -p 3d --tp 4 --pp 2 --zero 1").phases[-1]
    assert step.weights == pytest.approx(2 * 68.98e9 / 8, rel=0.01)
    assert step.optimizer == pytest.approx(12 * 68.98e9 / 8 / 64, rel=0.01)


def test_offloaded_state_counts_as_host_memory():
    flags = "-c 7b -b 1 -g -a --dry_run --gpus 4"
    assert estimate(f"{flags} -p zero2_cpu").host == pytest.approx(12 * 6.738e9 / 4, rel=0.01)
    assert estimate(f"{flags} -p zero2").host == 0
    half = estimate(f"{flags} -p gemini --offload_optim_frac 0.5")
    assert half.host == pytest.approx(half.peak.optimizer)
    assert half.host == pytest.approx(6 * 6.738e9 / 4, rel=0.05)  # its smaller chunks have more unused room


@pytest.mark.parametrize(("sequences", "sums"), [(2, 3), (16, 1)])
def test_deterministic_attention(sequences, sums):
    """32 heads of 2 sequences leave multiprocessors idle, so flash-attn has 3 sums [B, S, H, D]; of 16 it has one."""
    flags = f"-c 7b -p zero2 -a -g -l 4096 -b {sequences}"
    plain, deterministic = (
        next(phase.total for phase in estimate(f"{flags}{more}").phases if phase.name == "the last layer's backward")
        for more in ("", " --deterministic")
    )
    tokens = sequences * 4096
    attention = tokens * 32 * 128 * (4 * 2 + 4 * sums)  # bytes: gradients of output, query, key and value, and the sums
    ffn = tokens * 2 * (4096 + 2 * 11008)
    assert deterministic - plain == pytest.approx(max(0, attention - ffn))
