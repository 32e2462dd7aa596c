"""Launching, and the optimizer compared with plain PyTorch."""

import os
import re
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from colossalai.nn.optimizer import HybridAdam

from engine import cpu
from engine.boost import build_optimizer
from engine.job import Optimization
from engine.launch import gpu_index, launch, launch_problems
from launching import ROOT
from processes import run_ranks
from runtime import ranks, requirements

INDEPENDENT_STREAMS = """
from runtime import requirements
requirements.start_cuda()
import engine.boost
import torch
busy, waiting = torch.cuda.Stream(), torch.cuda.Stream()
ones = torch.ones(1000, device="cuda") + 1
torch.cuda.synchronize()
with torch.cuda.stream(busy):
    torch.cuda._sleep(2 * 10**9)
    done = busy.record_event()
with torch.cuda.stream(waiting):
    waiting.wait_event(done)
    ones + 1
ones + 2
torch.cuda.current_stream().synchronize()
assert not done.query()
"""


@pytest.mark.gpu
@pytest.mark.parametrize("left_by_colossalai", [None, "1"])
def test_a_stream_does_not_wait_for_work_on_other_streams(monkeypatch, left_by_colossalai):
    set_queues(monkeypatch, left_by_colossalai)
    subprocess.run([sys.executable, "-c", INDEPENDENT_STREAMS], cwd=ROOT, check=True)


def set_queues(monkeypatch, number: str | None) -> None:
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    if number:
        monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", number)


BEFORE_COLOSSALAI = """
import os
import sys
import torch
found = []
torch.cuda.is_available = lambda: found.append(
    ("colossalai" in sys.modules, os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS"))
)
import {program}
assert found[0] == (False, {queues!r}), found
"""


@pytest.mark.parametrize(
    ("program", "given", "queues"),
    [("pretrain", None, None), ("pretrain", "16", "16"), ("finetune", "1", None), ("benchmark", "1", None)],
)
def test_programs_start_cuda_before_colossalai_changes_its_environment(monkeypatch, program, given, queues):
    set_queues(monkeypatch, given)
    code = BEFORE_COLOSSALAI.format(program=program, queues=queues)
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, {"PYTORCH_ALLOC_CONF": "backend:native"}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}),
    ],
)
def test_the_allocators_segments_grow_unless_the_user_configures_it(monkeypatch, given, found):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "CUDA_DEVICE_MAX_CONNECTIONS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    requirements.start_cuda()
    assert {name: value for name, value in os.environ.items() if name.endswith("_ALLOC_CONF")} == found
    os.environ.pop("PYTORCH_ALLOC_CONF", None)  # start_cuda may have set it


@pytest.mark.parametrize(
    ("given", "found"),
    [({}, "2000"), ({"TORCH_FR_BUFFER_SIZE": "7"}, "7"), ({"TORCH_NCCL_TRACE_BUFFER_SIZE": "7"}, None)],
)
def test_the_flight_recorder_is_on_unless_the_user_configures_it(monkeypatch, given, found):
    for name in ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"):
        monkeypatch.setenv(name, given.get(name, ""))  # so that it is restored
        if name not in given:
            monkeypatch.delenv(name)
    requirements.start_cuda()
    assert os.environ.get("TORCH_FR_BUFFER_SIZE") == found


class TestLaunch:
    def test_leaves_colossalai_unchanged_with_a_gpu(self, monkeypatch):
        installed, launched = [], []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"GPU-{index}"))
        monkeypatch.setattr(cpu, "install", lambda: installed.append(True))
        monkeypatch.setattr(
            "engine.launch.colossalai_launch", lambda *place, **options: launched.append((place, options))
        )
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        values = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))
        launch(7)
        options = {"local_rank": 0, "seed": 7, "verbose": False}
        assert (installed, launched) == ([], [((0, 1, "127.0.0.1", port), options)])
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        launch(7)
        assert installed == [True]
        ranks.meeting.cache_clear()

    @pytest.mark.parametrize(("visible", "gpus", "index"), [(None, 8, 3), ("5", 1, 0), ("0,1,2,3", 4, 3), (None, 1, 3)])
    def test_a_rank_that_was_given_one_gpu_takes_it(self, monkeypatch, visible, gpus, index):
        """Cover srun --gpus-per-task=1, and a wrapper that sets CUDA_VISIBLE_DEVICES."""
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setenv("LOCAL_RANK", "3")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert gpu_index() == index

    @pytest.mark.parametrize(("gpus", "index"), [(1, 0), (2, 1), (4, 3)])
    def test_ranks_take_shared_gpus_in_turn(self, monkeypatch, gpus, index):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        place = {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
        for name, value in place.items():
            monkeypatch.setenv(name, value)
        assert bool(launch_problems()) == (gpus < 4)
        monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1")
        assert launch_problems() == []
        assert gpu_index() == index

    @pytest.mark.parametrize(
        ("environment", "problem"),
        [
            ({}, None),
            (
                {"RANK": "0"},
                "RANK is set, but not LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT; start",
            ),
            ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK is set, but not MASTER_ADDR, MASTER_PORT"),
            ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER": "a"}, "RANK 2 is not below WORLD_SIZE 2"),
            ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "2", "MASTER": "a"}, "rank 5 is process 3 .* has 2 GPUs"),
            ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER": "a"}, None),
        ],
    )
    def test_problems_of_the_environment(self, monkeypatch, environment, problem):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
            for full, text in (place if name == "MASTER" else {name: value}).items():
                monkeypatch.setenv(full, text)
        problems = launch_problems()
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        assert launch_problems() == ([] if "2 GPUs" in str(problem) else problems)
        assert not problems if problem is None else re.search(problem, *problems)


class TestAdam:
    """Host gradients in bf16, whose scale ColossalAI's path ignores; see engine.update.Adam."""

    @pytest.mark.slow
    def test_equals_pytorch_once_they_are_cast_to_float32(self):
        ours, colossalai, expected = run_ranks(1, adam_updates)[0]
        assert torch.allclose(ours, expected, rtol=0, atol=1e-6)
        # When this fails, ColossalAI has fixed its path, and the cast in Adam can go.
        assert (colossalai - expected).abs().max() > 1e-3


def adam_updates():
    """Return a weight after three updates from scaled bf16 gradients: by Adam, by HybridAdam, by torch's AdamW."""
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(64, generator=generator).bfloat16() for _ in range(3)]
    scales = [8.0, 100.0, 1.5]

    def updated(make, unscale):
        holder = torch.nn.Linear(64, 1, bias=False)
        torch.nn.init.ones_(holder.weight)
        optimizer = make(holder)
        for gradient, scale in zip(gradients, scales, strict=True):
            if unscale:
                holder.weight.grad = gradient.float().view(1, 64) / scale
                optimizer.step()
            else:
                weight, holder.weight.data = holder.weight.data, gradient.view(1, 64)
                holder.weight.grad, holder.weight.data = holder.weight.data, weight  # as Gemini sets them
                optimizer.step(div_scale=scale)
        return holder.weight.detach().flatten()

    options = dict(lr=0.1, betas=(0.9, 0.95), weight_decay=0.1)
    return (
        updated(lambda module: build_optimizer(module, Optimization(lr=0.1, weight_decay=0.1)), unscale=False),
        updated(lambda module: HybridAdam(module.parameters(), adamw_mode=True, **options), unscale=False),
        updated(lambda module: torch.optim.AdamW(module.parameters(), **options), unscale=True),
    )
