"""Start and end of a rank: joining and leaving the process group, and compiling ColossalAI's extensions."""

import contextlib
import importlib.util
import io
import os
import socket
from pathlib import Path

import torch
import torch.distributed as dist
from colossalai import launch as colossalai_launch
from colossalai.booster.plugin.plugin_base import Plugin
from colossalai.kernel.extensions.base_extension import _Extension
from colossalai.kernel.kernel_loader import CPUAdamLoader, FusedOptimizerLoader
from colossalai.logging import get_dist_logger

from engine import cpu
from engine.determinism import make_deterministic
from engine.patching import replace
from runtime import ranks
from runtime.console import InputError, local_rank, local_world_size, rank, say, world_size
from runtime.files import exclusive_lock

EXTENSIONS = {"cpu_adam_x86": CPUAdamLoader, "fused_optim_cuda": FusedOptimizerLoader}  # C++ and CUDA code for Adam


def launch_problems() -> list[str]:
    """Return one line if the environment does not describe a rank with a GPU of its own; see ranks.launch_problems."""
    gpus = torch.cuda.device_count()
    if (problems := ranks.launch_problems()) or "RANK" not in os.environ or not gpus or gpu_index() < gpus:
        return problems
    process = local_rank() + 1
    return [f"--nproc_per_node: rank {rank()} is process {process} of a machine that has {gpus} GPUs; start fewer"]


def may_share_gpus() -> bool:
    """Return True if the environment tells NCCL, from 2.31 on, to let ranks share a GPU. See CONTRIBUTING.md."""
    return os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1"


def gpu_index() -> int:
    """Return the index of this rank's GPU among those visible to it: 0 if the launcher shows each rank one GPU."""
    if may_share_gpus() and (gpus := torch.cuda.device_count()):
        return local_rank() % gpus
    return 0 if os.environ.get("CUDA_VISIBLE_DEVICES") and torch.cuda.device_count() == 1 else local_rank()


def launch(seed: int, deterministic: bool = False) -> None:
    """Join the process group that torchrun or `colossalai run` describes; without a launcher, form one of one rank.

    Args:
        deterministic: compute the same bits as any equal run.

    Raises:
        InputError: see launch_problems and ranks.assemble.
        RunError: a rank has ended.
    """
    if problems := launch_problems():
        raise InputError(*problems)
    if deterministic:
        make_deterministic()
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    use_own_cores()
    if not torch.cuda.is_available():
        cpu.install()
    get_dist_logger().set_level("ERROR")  # it warns about our defaults, and about LoRA's learning rate
    own_gpu = torch.cuda.is_available() and not may_share_gpus()
    gpu = str(torch.cuda.get_device_properties(gpu_index()).uuid) if own_gpu else ""
    ranks.assemble(gpu)
    if may_share_gpus() and local_world_size() > torch.cuda.device_count() > 0:
        say("ranks share GPUs (NCCL_MULTI_RANK_GPU_ENABLE): right results, slowly")
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    colossalai_launch(rank(), world_size(), address, port, local_rank=gpu_index(), seed=seed, verbose=False)


def use_own_cores() -> None:
    """With a GPU, compute with this rank's share of the cores; torchrun sets one thread, too few for Adam there."""
    if torch.cuda.is_available():
        threads = max(1, len(os.sched_getaffinity(0)) // local_world_size())
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)


def missing_extensions() -> list[str]:
    """Return the names of the extensions that are neither installed with ColossalAI nor compiled on this node."""
    folder = Path(_Extension.get_jit_extension_folder_path())
    return [
        name
        for name in EXTENSIONS
        if importlib.util.find_spec(f"colossalai._C.{name}") is None and not (folder / f"{name}.so").exists()
    ]


def compile_extensions() -> None:
    """Compile the extensions that are missing on this node, then load all; one process per node at a time.

    Concurrent builds would break each other, and the lock file of a killed build would block every rank.
    """
    folder = Path(_Extension.get_jit_extension_folder_path())
    folder.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(folder / "build.lock", "another process is compiling ColossalAI's extensions; waiting for it"):
        (folder / "lock").unlink(missing_ok=True)  # torch's lock, left by a killed build
        for name in missing_extensions():
            say(f"building ColossalAI's extension {name}: once per machine, about a minute")
        for loader in EXTENSIONS.values():
            with contextlib.redirect_stdout(io.StringIO()):
                loader().load()


def build_extensions() -> None:
    """Compile the missing extensions on local rank 0 of each node; the other ranks wait. Does nothing without a GPU."""
    if not torch.cuda.is_available():
        return
    if local_rank() == 0:
        compile_extensions()
    dist.barrier(device_ids=[torch.cuda.current_device()])


def shut_down(plugin: Plugin) -> None:
    """Destroy the process groups.

    Symptom: an exception when the process exits, after its last line.
    Cause: the plugin's destructor destroys its groups after Python has unloaded part of torch.
    Fix: call `destroy_mesh_process_groups` here, and leave nothing for the destructor.
    Remove when: the plugin's destructor tolerates groups that are gone.
    """
    if mesh := getattr(plugin, "pg_mesh", None):
        mesh.destroy_mesh_process_groups()
        replace(mesh, "destroy_mesh_process_groups", lambda: None)
    dist.destroy_process_group()
