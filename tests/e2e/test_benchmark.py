"""Flags, arithmetic and output of benchmark.py, and every plugin in two processes on the CPU."""

import json
import re
import subprocess
import sys
from argparse import Namespace

import pytest
import torch
from colossalai.legacy.utils import memory

import benchmark
from data_utils import RandomDataset
from engine import device
from engine.layout import Layout
from launching import ROOT, ForkedRun
from model_utils import load_config
from planning import throughput
from planning.throughput import StepTimer, benchmark_figures
from runtime.console import InputError
from training.flags import job_of

CLOSING_LINE = re.compile(
    r"max memory usage:  (\d+\.\d\d) MB, throughput:  (\d+\.\d\d) samples/s, TFLOPS/GPU:  (\d+\.\d\d)"
)
GRAD_NORM = 1.162  # in the third step of all layouts
TENSOR_PARALLEL = ("--tp", "2", "-b", "4")  # two processes; same global batch as data-parallel


# --------------------------------------------------------------------------------------------------------------- flags


def test_defaults():
    defaults = {
        "config": "7b",
        "plugin": "gemini",
        "batch_size": 2,
        "max_length": 4096,
        "num_steps": 5,
        "ignore_steps": 2,
        "gradient_checkpoint": False,
        "flash_attention": False,
        "mixed_precision": "bf16",
        "warmup_ratio": 0.8,
        "memory_limit": None,
        "shard_param_frac": 1.0,
        "offload_optim_frac": 0.0,
        "offload_param_frac": 0.0,
        "extra_dp": 1,
        "microbatch_size": 1,
        "gradient_clipping": 1.0,
    }
    args = vars(benchmark.parse_args([]))
    assert {name: args[name] for name in defaults} == defaults


@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        ("-s 9", "num_steps", 9),
        ("-i 1", "ignore_steps", 1),
        ("-x", "flash_attention", True),
        ("--xformers", "flash_attention", True),
        ("-a", "flash_attention", True),
        ("-g", "gradient_checkpoint", True),
        ("-w 0.5", "warmup_ratio", 0.5),
        ("-m 20000", "memory_limit", 20000),
        ("--mbs 4", "microbatch_size", 4),
        ("--zero 1", "zero", 1),
    ],
)
def test_flag(flags, name, value):
    assert getattr(benchmark.parse_args(flags.split()), name) == value


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("-s 2", "--num_steps: 2 leaves no step to count after --ignore_steps 2"),
        ("--shard_param_frac 2", "--shard_param_frac: must be between 0 and 1, not 2.0"),
        ("--warmup_ratio -0.1", "--warmup_ratio: must be between 0 and 1, not -0.1"),
        ("--json /nowhere/file.json", "--json: folder /nowhere does not exist"),
        ("--json /", "--json: / is a folder; give a file"),
        ("-p fsdp --tp 2", "--tp: takes effect only with -p"),
        ("-w 0.5", "--warmup_ratio: takes effect only with -p gemini_auto, not with -p gemini"),
        ("-p gemini_auto --shard_param_frac 0", "--shard_param_frac: takes effect only with -p gemini"),
        ("-p zero2 --offload_optim_frac 1", "--offload_optim_frac: takes effect only with -p gemini"),
        ("--offload_param_frac 1", "--offload_param_frac: takes effect where all weights are sharded"),
        ("-p zero2 --extra_dp 2", "--extra_dp: takes effect only with -p gemini, not with -p zero2"),
        ("-p gemini --tp 3", "--tp/--extra_dp: 3 x 1 = 3 does not divide the 8 ranks"),
        ("-p gemini --tp 2 --extra_dp 8", "2 x 8 = 16 does not divide the 8 ranks"),
        ("-p gemini --pp 2", "--pp: takes effect only with -p hybrid_parallel, not with -p gemini"),
        ("-p gemini --mixed_precision fp32", "--mixed_precision: gemini trains only in fp16 or bf16"),
        ("-l 8192", "--max_length: 8192 is above the model's context of 4096 tokens; give at most that"),
    ],
)
def test_mistakes_are_found_before_anything_is_allocated(flags, message, become_rank_0):
    become_rank_0(8)
    args = benchmark.parse_args(["--dry_run", *flags.split()])
    job = job_of(args, load_config("7b"))
    with pytest.raises(InputError, match=re.escape(message)):
        benchmark.check(args, job)


@pytest.mark.parametrize(("megabytes", "capacity"), [(20_000, 20_000 * 2**20), (10**9, 80 * 10**9)])
def test_memory_limit_applies_to_torch_and_to_geminis_plan(monkeypatch, megabytes, capacity):
    fractions = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Namespace(total_memory=80 * 10**9))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *args: fractions.append(args[0]))
    accelerator = Namespace(get_current_device=lambda: torch.device("cuda", 0))
    monkeypatch.setattr(device, "get_accelerator", lambda: accelerator)
    monkeypatch.setattr(memory, "get_accelerator", lambda: accelerator)
    monkeypatch.setattr(memory, "_GLOBAL_CUDA_MEM_FRACTION", 1.0)
    assert device.limit_memory(megabytes)
    assert fractions == [pytest.approx(capacity / (80 * 10**9))]
    assert memory.colo_device_memory_capacity(torch.device("cuda", 0)) == pytest.approx(capacity)


def test_memory_limit_without_a_gpu_is_reported(tmp_path):
    flags = "-c test -p zero2 -l 64 -s 1 -i 0 -m 20000"
    with ForkedRun([ROOT / "benchmark.py", *flags.split()], tmp_path) as run:
        assert run.wait() == 0, run.output()
    assert "--memory_limit: no effect without a GPU\n" in run.stdout


# ---------------------------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize(
    ("flags", "layout"),
    [
        ("-p zero2", Layout("zero2", tp=1, pp=1, sp=1, dp=16, zero_stage=2)),
        ("-p fsdp_cpu", Layout("fsdp_cpu", tp=1, pp=1, sp=1, dp=16, zero_stage=3)),
        ("-p gemini", Layout("gemini", tp=1, pp=1, sp=1, dp=16, zero_stage=3)),
        ("-p gemini --tp 4", Layout("gemini", tp=4, pp=1, sp=1, dp=4, zero_stage=3)),
        ("-p gemini_auto --tp 2 --extra_dp 4", Layout("gemini_auto", tp=2, pp=1, sp=1, dp=8, zero_stage=3, extra_dp=4)),
        ("-p 3d", Layout("3d", tp=1, pp=1, sp=1, dp=16, zero_stage=0)),
        ("-p 3d --tp 4 --pp 2 --zero 1", Layout("3d", tp=4, pp=2, sp=1, dp=2, zero_stage=1)),
        ("-p 3d --sp 4 --tp 2", Layout("3d", tp=2, pp=1, sp=4, dp=2, zero_stage=0)),
        ("-p 3d_cpu --tp 8", Layout("3d_cpu", tp=8, pp=1, sp=1, dp=2, zero_stage=1)),
        ("-p hybrid_parallel", Layout("hybrid_parallel", tp=4, pp=2, sp=1, dp=2, zero_stage=1)),
    ],
)
def test_data_parallel_ranks_of_each_layout(flags, layout, become_rank_0):
    become_rank_0(16)
    assert job_of(benchmark.parse_args(flags.split()), load_config("7b")).layout == layout
    assert layout.ranks == 16


def test_published_figures():
    """ColossalAI published 7B on 32 A800, batch 16 per GPU: 53.7% of the peak with recomputation, 40.2% without."""
    sequences = 16 * 32
    seconds = sequences / 24.26
    figures = benchmark_figures(load_config("7b"), [seconds], sequences, 4096, 32, True, "NVIDIA A800-SXM4-80GB")
    assert figures["samples_per_second"] == pytest.approx(24.26)
    assert figures["tflops_per_gpu"] == pytest.approx(167.43, abs=0.05)
    assert figures["tflops_per_gpu"] / 312 == pytest.approx(0.537, abs=5e-4)
    without = benchmark_figures(load_config("7b"), [seconds], sequences, 4096, 32, False, "NVIDIA A800-SXM4-80GB")
    assert without["tflops_per_gpu"] / 312 == pytest.approx(0.402, abs=5e-4)
    # FLOPs per token: 6 per weight without the input embedding; attention 12 x 32 layers x 4096 x 4096
    flops = 6 * (6_738_415_616 - 32000 * 4096) + 12 * 32 * 4096 * 4096
    assert figures["mfu"] == without["mfu"] == pytest.approx(24.26 * 4096 * flops / 32 / 312e12)


def test_step_times():
    seconds = [1.0, 2.0, 3.0, 4.0, 10.0]
    figures = benchmark_figures(load_config("test"), seconds, 8, 64, 2, False, "cpu")
    assert (figures["step_seconds_median"], figures["step_seconds_mean"]) == (3.0, 4.0)
    assert (figures["step_seconds_p10"], figures["step_seconds_p90"]) == (pytest.approx(1.4), pytest.approx(7.6))
    assert (figures["samples_per_second"], figures["tokens_per_second"]) == (2.0, 128.0)
    assert figures["mfu"] is None


class Device:
    """A clock, and an asynchronous device whose pending work advances it in synchronize()."""

    now = 0.0
    pending = 0.0

    def perf_counter(self) -> float:
        return self.now

    def synchronize(self) -> None:
        self.now, self.pending = self.now + self.pending, 0.0


def test_a_step_is_timed_to_the_end_of_its_own_work_and_without_earlier_work(monkeypatch):
    clock = Device()
    monkeypatch.setattr(throughput, "synchronize", clock.synchronize)
    monkeypatch.setattr(throughput.time, "perf_counter", clock.perf_counter)
    timer = StepTimer()
    for work in (2.0, 3.0):
        clock.pending += 100.0
        with timer.step():
            clock.now += 0.5
            clock.pending += work
    assert timer.seconds == [2.5, 3.5]


def test_random_sequences_are_a_function_of_seed_and_position():
    dataset = RandomDataset(num_sequences=8, max_length=512, vocab_size=10, seed=1)
    assert len(dataset) == 8
    assert dataset[3]["input_ids"].shape == (512,)
    assert set(dataset[3]["input_ids"].tolist()) == set(range(10))
    assert torch.equal(dataset[3]["input_ids"], dataset[3]["labels"])
    assert torch.equal(dataset[3]["input_ids"], RandomDataset(8, 512, 10, 1)[3]["input_ids"])
    others = [dataset[4], RandomDataset(8, 512, 10, 2)[3]]
    assert not any(torch.equal(dataset[3]["input_ids"], other["input_ids"]) for other in others)


# ------------------------------------------------------------------------------------------------------------- runs


def test_the_benchmark_loads_neither_checkpointing_nor_the_training_loop():
    program = "import sys, benchmark; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {name for name in done.stdout.split() if name.partition(".")[0] in ("training", "checkpointing")}
    modules = ("checks", "flags", "schedule", "stages")  # of flags and their checks
    assert loaded == {"training", *(f"training.{name}" for name in modules)}


OUT_OF_MEMORY = """\
import benchmark, torch
from runtime import process
def allocate(*args):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\\nSee documentation")
benchmark.{where} = allocate
process.run(benchmark.main, "benchmark.py")
"""


@pytest.mark.parametrize(
    ("where", "flags", "remedies"),
    [
        ("boost", "-p zero2 -b 4", "-a, -g, -b 2, -p gemini, -p zero2_cpu, -p gemini_auto, 2 GPUs"),
        ("train_step", "-p gemini_auto -b 1 -g -a -m 900", "a larger --memory_limit"),
    ],
)
def test_out_of_memory_is_one_line_with_what_helps(where, flags, remedies, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(OUT_OF_MEMORY.format(where=where))
    with ForkedRun([program, "-c", "test", "-l", 64, *flags.split()], tmp_path) as run:
        assert run.wait() == 1
    (line,) = run.stderr.splitlines()
    pattern = (
        rf"benchmark.py: out of GPU memory after \d+\.\d\d MB at the peak; what helps: {remedies}; --dry_run shows .*"
    )
    assert re.fullmatch(pattern, line)


ON_H200 = """\
import benchmark
from runtime import process
benchmark.device.device_name = lambda: "NVIDIA H200"
process.run(benchmark.main, "benchmark.py")
"""


def test_float8_has_two_peaks_and_the_same_loss_with_fsdp(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(ON_H200)
    losses = []
    for plugin, flags in (("zero2", ()), ("zero2", ("--fp8",)), ("fsdp", ("--fp8", "--fp8_recipe", "rowwise"))):
        small = ["-c", "test", "-l", 37, "-s", 2, "-i", 1, "-p", plugin, "--json", "result.json", *flags]
        with ForkedRun([program, *small], tmp_path / str(len(losses)), ranks=2, cwd=tmp_path) as run:
            assert run.wait() == 0, run.output()
        result = json.loads((tmp_path / "result.json").read_text())
        losses.append(result["loss"])
        assert result["mfu"] / result["float8_utilization"] == pytest.approx(1979 / 989)
        assert result["inputs"]["fp8"] == bool(flags)
        assert re.search(r", MFU \d\.\d%( of the bf16 peak, \d\.\d% of the float8 peak)?\n", run.stdout)[1] or not flags
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-3)
    assert len(set(losses)) == 3


@pytest.mark.parametrize("plugin", ["3d_cpu", "3d --zero 1"])
def test_no_warning_about_flags_that_were_given(plugin, tmp_path):
    """Without our filter ColossalAI warns about ZeRO on one rank."""
    small = f"-c test -l 64 -s 2 -i 1 -p {plugin}"
    with ForkedRun([ROOT / "benchmark.py", *small.split()], tmp_path) as run:
        assert run.wait() == 0
    assert "WARNING" not in run.output()


@pytest.mark.parametrize(
    ("plugin", "flags"),
    [
        ("zero2", ("--profile", "traces")),
        ("zero2_cpu", ()),
        ("gemini", TENSOR_PARALLEL),
        ("gemini", (*TENSOR_PARALLEL, "-g")),
        ("gemini", ("--extra_dp", "2", "-g")),
        ("fsdp", ("-g",)),
        ("fsdp_cpu", ()),
        ("3d", ("--pp", "2", "-b", "4", "--mbs", "2", "-g")),
        ("3d_cpu", ()),
        ("3d", ("--pp", "2", "-b", "4", "--pp_style", "interleaved")),
        ("hybrid_parallel", TENSOR_PARALLEL),
    ],
)
def test_two_processes(plugin, flags, tmp_path):
    """All layouts train one model on the same global batch, so loss and gradient norm agree."""
    small = ["-c", "test", "-l", 64, "-b", 2, "-s", 3, "-i", 1, "-a", "-p", plugin, "--json", "result.json"]
    with ForkedRun([ROOT / "benchmark.py", *small, *flags], tmp_path, ranks=2, cwd=tmp_path) as run:
        run.wait()
    assert run.returncode == 0, run.output()

    result = json.loads((tmp_path / "result.json").read_text())
    assert result["loss"] == pytest.approx(6.9602, abs=3e-4)
    assert result["grad_norm"] == pytest.approx(GRAD_NORM, rel=0.01)
    assert result["inputs"]["plugin"] == plugin
    assert result["layout"]["gpus"] == 2
    assert len(result["step_seconds"]) == 2
    assert result["step_seconds_p10"] <= result["step_seconds_median"] <= result["step_seconds_p90"]
    assert result["samples_per_second"] == pytest.approx(4 * 2 / sum(result["step_seconds"]))
    assert result["tokens_per_second"] == pytest.approx(64 * result["samples_per_second"])
    counted = (8 if "-g" in flags else 6) * 315_968 * result["tokens_per_second"] / 2 / 1e12
    assert result["tflops_per_gpu"] == pytest.approx(counted)
    assert result["device"] == "cpu"
    assert result["mfu"] is None
    assert result["peak_host_memory_bytes"] > 1e8
    assert {"torch", "colossalai", "transformers", "python", "cuda", "commit"} <= set(result)

    lines = run.stdout.splitlines()
    closing = [line for line in lines if line.startswith("max memory usage")]
    assert closing == lines[-1:]  # printed once, at the end
    memory, samples, _ = map(float, CLOSING_LINE.fullmatch(closing[0]).groups())
    assert memory == pytest.approx(result["peak_device_memory_bytes"] / 2**20, abs=0.01)
    assert samples == pytest.approx(result["samples_per_second"], abs=0.01)
    assert "step 1/3" in run.stdout
    if "--profile" in flags:
        for rank in range(2):
            events = json.loads((tmp_path / "traces" / f"rank{rank}.json").read_text())["traceEvents"]
            assert any("aten::mm" in event.get("name", "") for event in events)


def test_tied_embeddings_are_one_weight_under_every_plugin(tmp_path):
    """A second copy would change the gradient norm by 10%, and under FSDP once did."""
    config = load_config("test")
    config.tie_word_embeddings = True
    config.save_pretrained(tmp_path)
    norms = []
    for plugin, flags in (
        ("zero2", ()),
        ("gemini", ()),
        ("gemini", TENSOR_PARALLEL),
        ("fsdp", ()),
        ("3d", TENSOR_PARALLEL),
    ):
        small = ["-c", tmp_path, "-l", 64, "-b", 2, "-s", 2, "-i", 1, "-p", plugin, "--json", "result.json", *flags]
        with ForkedRun([ROOT / "benchmark.py", *small], tmp_path / str(len(norms)), ranks=2, cwd=tmp_path) as run:
            assert run.wait() == 0, run.output()
        norms.append(json.loads((tmp_path / "result.json").read_text())["grad_norm"])
    assert norms[1:] == pytest.approx(norms[:1] * 4, rel=0.01)


def test_checkpoint_stall(tmp_path):
    """benchmarks/checkpoint_stall.py trains, saves in the foreground and in the background, and cleans up."""
    flags = ["-c", "test", "-p", "zero2", "-x", "fp32", "-b", 1, "-l", 32, "--rounds", 1, "-o", tmp_path / "stall"]
    with ForkedRun([ROOT / "benchmarks" / "checkpoint_stall.py", *flags], tmp_path) as run:
        assert run.wait() == 0, run.output()
    rows = re.findall(r"^\| (foreground|background) \| \d+ \(\d+\) \| [\d.]+ \|$", run.stdout, re.MULTILINE)
    assert rows == ["foreground", "background"]
    assert not (tmp_path / "stall").exists()
