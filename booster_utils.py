"""ColossalAI's Booster: the plugins by name, launching, one training step's forward, backward and update."""

import argparse
import contextlib
import fcntl
import importlib.util
import io
import logging
import math
import os
import socket
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from colossalai import launch_from_torch
from colossalai.accelerator import get_accelerator
from colossalai.amp.naive_amp.mixed_precision_mixin import FP16MixedPrecisionMixin
from colossalai.booster import Booster
from colossalai.booster.plugin import GeminiPlugin, HybridParallelPlugin, LowLevelZeroPlugin
from colossalai.booster.plugin.plugin_base import Plugin
from colossalai.interface import ModelWrapper, OptimizerWrapper
from colossalai.kernel.extensions.base_extension import _Extension
from colossalai.kernel.kernel_loader import CPUAdamLoader, FusedOptimizerLoader
from colossalai.lazy import LazyInitContext
from colossalai.pipeline.schedule import InterleavedSchedule, PipelineSchedule
from colossalai.shardformer.layer import cross_entropy_1d
from colossalai.zero import GeminiOptimizer, LowLevelZeroOptimizer
from transformers import LlamaConfig

import fused
import gemini
import host_accelerator
import weight_update
from attn import SequenceParallelPolicy, attend_inside_documents, document_boundaries
from console import InputError, local_rank, rank, say, world_size
from data_utils import IGNORE_INDEX
from fsdp_plugin import FSDPPlugin
from fused import Fusion
from layout import Layout, resolve_layout
from model_utils import build_model, restore_rotary_precision
from recomputation import recompute, recomputed_layers, recomputed_share
from weight_update import Adam

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
ADAM_BETAS = (0.9, 0.95)  # LLaMA's (arXiv:2302.13971, section 2.3)
INITIAL_LOSS_SCALE = 2.0**16
UNPADDED_VOCABULARY = 1  # padded columns would count in the vocabulary-parallel loss


def launch_problems() -> list[str]:
    """One line where the environment does not describe a launched rank as torchrun does, though RANK is set."""
    if "RANK" not in os.environ:
        return []
    missing = [name for name in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        return [f"RANK is set, but not {', '.join(missing)}; start with torchrun or colossalai run, or unset RANK"]
    if rank() >= world_size():
        return [f"RANK {rank()} is not below WORLD_SIZE {world_size()}; start with torchrun or colossalai run"]
    gpus = torch.cuda.device_count()
    if gpus and local_rank() >= gpus:
        return [f"--nproc_per_node: rank {rank()} is process {local_rank() + 1} of a machine that has {gpus} GPUs"]
    return []


def launch(seed: int) -> None:
    """Joins the process group that torchrun or `colossalai run` describes; a plain `python` makes one of one rank.

    Raises:
        InputError: see launch_problems.
    """
    if problems := launch_problems():
        raise InputError(*problems)
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if torch.cuda.is_available():
        # torchrun sets one thread, and Adam on the host has to have its share of the cores.
        threads = max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)
    else:
        host_accelerator.install()
    launch_from_torch(seed=seed, verbose=False)


KERNELS = {"cpu_adam_x86": CPUAdamLoader, "fused_optim_cuda": FusedOptimizerLoader}


def missing_kernels() -> list[str]:
    """Those of ColossalAI's C++ and CUDA extensions for Adam that are neither installed nor compiled on this node."""
    folder = Path(_Extension.get_jit_extension_folder_path())
    return [
        name
        for name in KERNELS
        if importlib.util.find_spec(f"colossalai._C.{name}") is None and not (folder / f"{name}.so").exists()
    ]


def compile_kernels() -> None:
    """Loads ColossalAI's extensions for Adam, compiling those that are missing, one process of a node at a time.

    Two builds at once, or the lock that a killed build left behind, would break or block every rank.
    """
    folder = Path(_Extension.get_jit_extension_folder_path())
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "build.lock", "w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        (folder / "lock").unlink(missing_ok=True)  # torch's own, held only by a build that is gone
        for name in missing_kernels():
            say(f"building ColossalAI's extension {name}: the first time only, about a minute")
        for loader in KERNELS.values():
            with contextlib.redirect_stdout(io.StringIO()):
                loader().load()


def build_kernels() -> None:
    """Has one rank of each node compile what is missing there, the others waiting."""
    if not torch.cuda.is_available():
        return
    if local_rank() == 0:
        compile_kernels()
    dist.barrier(device_ids=[torch.cuda.current_device()])


def shut_down(plugin: Plugin) -> None:
    """Leaves the process groups in order; the plugin's own destructor runs too late, when torch is half unloaded."""
    if mesh := getattr(plugin, "pg_mesh", None):
        mesh.destroy_mesh_process_groups()
        mesh.destroy_mesh_process_groups = lambda: None
    dist.destroy_process_group()


def build_plugin(
    args: argparse.Namespace, layout: Layout, config: LlamaConfig, length_varies: bool = False, **gemini_options: float
) -> Plugin:
    """The plugin of `args.plugin`; says in one line what a machine without a GPU does instead.

    Args:
        length_varies: batches differ in sequence length, which pipeline stages then tell each other.
        gemini_options: further arguments of GeminiPlugin, if that is the plugin.
    """
    on_host = not torch.cuda.is_available()
    common = dict(
        precision=args.mixed_precision,
        # Plugins compute the norm only to clip by it; an infinite bound gives the norm and clips nothing.
        max_norm=args.gradient_clipping or math.inf,
        initial_scale=INITIAL_LOSS_SCALE,
    )
    overlap = not on_host and world_size() > 1
    if on_host and args.mixed_precision == "fp16":
        say("fp16: it works without a GPU, slowly; -x bf16 is many times as fast")
    if args.plugin in ("zero2", "zero2_cpu"):
        offload = args.plugin == "zero2_cpu"
        return LowLevelZeroPlugin(stage=2, cpu_offload=offload, overlap_communication=overlap, **common)
    if args.plugin in ("gemini", "gemini_auto"):
        automatic = args.plugin == "gemini_auto" and not on_host
        if args.plugin == "gemini_auto" and on_host:
            say("gemini_auto: there is no GPU memory to balance here, so placement is static, as with gemini")
        whole = gemini.keeps_whole(args, layout.dp)
        chunk_parameters = gemini.chunk_parameters(config, whole)
        plugin = GeminiPlugin(
            placement_policy="auto" if automatic else "static",
            tp_size=layout.tp,
            extra_dp_size=layout.extra_dp,
            min_chunk_size_m=chunk_parameters / 2**20,
            search_range_m=0 if whole else chunk_parameters // 2**20,
            hidden_dim=config.hidden_size,
            enable_gradient_accumulation=args.accumulation_steps > 1,
            pin_memory=not on_host,
            enable_async_reduce=not on_host,
            **common,
            **gemini_options,
        )
        plugin.shard_config.make_vocab_size_divisible_by = UNPADDED_VOCABULARY
        return plugin
    if args.plugin in ("fsdp", "fsdp_cpu"):
        if args.plugin == "fsdp_cpu" and on_host:
            say("fsdp_cpu: everything is in host memory here, as with fsdp")
        return FSDPPlugin(
            DTYPES[args.mixed_precision],
            max_norm=common["max_norm"],
            offload=args.plugin == "fsdp_cpu" and not on_host,
            initial_scale=INITIAL_LOSS_SCALE,
            seed=args.seed,
            recomputed=recomputed_layers(config, recomputed_share(args)),
        )
    sequence_parallel = layout.sp > 1
    return HybridParallelPlugin(
        tp_size=layout.tp,
        pp_size=layout.pp,
        sp_size=layout.sp,
        zero_stage=layout.zero_stage,
        microbatch_size=args.microbatch_size,
        enable_sequence_parallelism=sequence_parallel,
        sequence_parallelism_mode="all_to_all" if sequence_parallel else None,
        custom_policy=SequenceParallelPolicy() if sequence_parallel else None,
        overlap_communication=overlap,
        cpu_offload=args.plugin == "3d_cpu",
        make_vocab_size_divisible_by=UNPADDED_VOCABULARY,
        pp_style="interleaved" if layout.chunks > 1 else "1f1b",
        num_model_chunks=layout.chunks,
        enable_metadata_cache=layout.chunks > 1 or not length_varies,  # see _begin_batch
        # The interleaved schedule lets go of its last send before it has ended, which Gloo then gives up.
        overlap_p2p=not on_host,
        **common,
    )


def build_optimizer(model: torch.nn.Module, lr: float, weight_decay: float, fusion: Fusion = Fusion.NONE) -> Adam:
    """ColossalAI's fused AdamW for parameters on GPU and host, with LLaMA's betas."""
    build_kernels()
    with contextlib.redirect_stdout(io.StringIO()):  # it reports that it loads what is built
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return Adam(
            trained,
            lr=lr,
            betas=ADAM_BETAS,
            weight_decay=weight_decay,
            adamw_mode=True,
            fused=fusion is not Fusion.NONE,
        )


def choose_fusion(args: argparse.Namespace, layout: Layout, on_gpu: bool) -> Fusion:
    """Layers are compiled where no collective operation stands inside them and nothing hooks into their parameters."""
    if not (on_gpu if args.compile is None else args.compile):
        return Fusion.NONE
    whole = not args.plugin.startswith("fsdp") and layout.tp == layout.sp == 1
    return Fusion.LAYERS if whole else Fusion.PIECES


def boost(
    args: argparse.Namespace, config: LlamaConfig, plugin: Plugin
) -> tuple[Booster, ModelWrapper, OptimizerWrapper]:
    """Model and AdamW inside the plugin, weights not yet set (sharded_state.initialize or checkpoint_utils.load).

    FSDP alone has set them: it gives each layer its initial weights when it shards it.
    """
    device = get_accelerator().get_current_device()
    if isinstance(plugin, LowLevelZeroPlugin):
        model = build_model(config, torch.device(device), DTYPES[args.mixed_precision])
    elif isinstance(plugin, FSDPPlugin):
        model = build_model(config, torch.device("meta"))
    else:
        model = build_model(config, LazyInitContext(default_device=device))
    if not isinstance(plugin, FSDPPlugin):  # which sees to it inside its sharded layers
        reentrant = isinstance(plugin, GeminiPlugin) and plugin.tp_size > 1
        recompute(model, recomputed_layers(config, recomputed_share(args)), reentrant)
    booster = Booster(plugin=plugin)
    if getattr(config, "lora", None):
        model.name_or_path = config.lora.base_model_name_or_path  # which peft notes beside the adapters
        logging.disable(logging.WARNING)  # it asks to check the learning rate
        model = booster.enable_lora(model, lora_config=config.lora)
        logging.disable(logging.NOTSET)
    attend_inside_documents(model)
    fusion = choose_fusion(args, resolve_layout(args, config), on_gpu=torch.cuda.is_available())
    optimizer = build_optimizer(model, args.lr, args.weight_decay, fusion)
    model, optimizer, *_ = booster.boost(model, optimizer)
    if isinstance(optimizer, GeminiOptimizer):
        gemini.keep_norm_on_device()
        if plugin.tp_size > 1:
            gemini.count_norm_over_tensor_parallel(optimizer, plugin.tp_group)
    if isinstance(optimizer, LowLevelZeroOptimizer):
        weight_update.keep_gradients_in_place(optimizer)
    restore_rotary_precision(model, device)
    compile_layers = gemini.compile_layers if isinstance(plugin, GeminiPlugin) else fused.compile_each_layer
    fused.fuse(model, fusion, compile_layers)
    model.train()
    return booster, model, optimizer


def token_loss(logits: torch.Tensor, labels: torch.Tensor, plugin: Plugin) -> torch.Tensor:
    """Cross-entropy of the next token, in float32, summed over the labels that count.

    Args:
        logits: [B, S, V], or this rank's part: V/tp columns under tensor, S/sp positions under sequence parallelism.
        labels: [B, S], unshifted and whole; IGNORE_INDEX does not count.
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    shard_config = getattr(plugin, "shard_config", None)
    if shard_config is not None and shard_config.enable_sequence_parallelism:
        group = shard_config.sequence_parallel_process_group
        targets = targets.chunk(dist.get_world_size(group), dim=1)[dist.get_rank(group)]
    # Gemini's tensors make in-place operations out-of-place, and the vocabulary-parallel loss scales its gradient in
    # place: the gradient would lose its scale.
    logits = fused.plain(logits)
    tensor_parallel = shard_config is not None and shard_config.enable_tensor_parallelism
    if tensor_parallel or fused.fusion is Fusion.NONE:
        logits = logits.float()  # and let go of the others
    logits, targets = logits.flatten(0, 1), targets.flatten()
    if tensor_parallel:
        group = shard_config.tensor_parallel_process_group
        return cross_entropy_1d(logits, targets, process_group=group, vocab_size=None, dtype=torch.float32, mode="sum")
    return fused.summed_cross_entropy(logits, targets)


def gradient_ranks(plugin: Plugin) -> int:
    """Over how many ranks the plugin averages gradients: data-parallel times sequence-parallel peers."""
    if isinstance(plugin, GeminiPlugin):
        return plugin.dp_size
    return dist.get_world_size(getattr(plugin, "mixed_dp_group", None))


def _model_inputs(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the model is called with, from a batch on the host."""
    inputs = {"input_ids": batch["input_ids"]}
    if "position_ids" in batch:
        inputs["position_ids"] = batch["position_ids"]
        inputs["attention_mask"] = document_boundaries(batch["position_ids"])
    return inputs


def _loss_of(model: ModelWrapper, batch: dict[str, torch.Tensor], plugin: Plugin) -> torch.Tensor:
    device = get_accelerator().get_current_device()
    labels = batch["labels"].to(device, non_blocking=True)
    inputs = {name: value.to(device, non_blocking=True) for name, value in _model_inputs(batch).items()}
    return token_loss(model(**inputs).logits, labels, plugin)


def _as_one(batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """All batches in one, padded on the right to the longest of them."""
    longest = max(batch["input_ids"].shape[1] for batch in batches)

    def joined(name: str, filler: int) -> torch.Tensor:
        return torch.cat([F.pad(batch[name], (0, longest - batch[name].shape[1]), value=filler) for batch in batches])

    fillers = {"input_ids": 0, "labels": IGNORE_INDEX, "position_ids": 0}
    return {name: joined(name, filler) for name, filler in fillers.items() if name in batches[0]}


def _begin_batch(schedule: PipelineSchedule, batch: dict[str, torch.Tensor]) -> None:
    """Has an interleaved schedule forget what stages told each other of tensors unlike those of this batch.

    Once it has evaluated it would refuse a batch of another size. With its cache off, so that lengths may vary, a stage
    that has just ended the last range of layers would not say what it sends next, and the next one wait for it.
    """
    if not isinstance(schedule, InterleavedSchedule):
        return
    kind = (batch["input_ids"].shape, torch.is_grad_enabled())
    if kind == getattr(schedule, "kind_of_batch", None):
        return
    schedule.kind_of_batch = kind
    schedule.num_microbatch, schedule.last_batch_size = None, len(batch["input_ids"])
    schedule.tensor_metadata_recv = schedule.grad_metadata_recv = None
    schedule.send_tensor_metadata = schedule.send_grad_metadata = True


def _pipeline_loss(
    booster: Booster,
    model: ModelWrapper,
    optimizer: OptimizerWrapper | None,
    micro_batches: list[dict[str, torch.Tensor]],
    scale: float,
) -> torch.Tensor:
    """The sum of token losses, times `scale`, of all the batches as one; zero on stages before the last."""
    plugin = booster.plugin
    batch = _as_one(micro_batches)
    _begin_batch(plugin.scheduler, batch)
    # Under the name `labels` the model would compute a loss of its own beside the criterion's.
    inputs = {**_model_inputs(batch), "criterion_labels": batch["labels"]}
    microbatches = len(batch["input_ids"]) // plugin.scheduler.microbatch_size

    def criterion(outputs, inputs):  # the schedule divides by the number of microbatches
        return token_loss(outputs.logits, inputs["criterion_labels"], plugin) * scale * microbatches

    loss = booster.execute_pipeline(iter([inputs]), model, criterion, optimizer, return_loss=True)["loss"]
    return torch.zeros((), device=get_accelerator().get_current_device()) if loss is None else loss.detach()


def forward_backward(
    booster: Booster,
    model: ModelWrapper,
    optimizer: OptimizerWrapper,
    micro_batches: list[dict[str, torch.Tensor]],
    label_tokens: int,
) -> torch.Tensor:
    """Accumulates the gradient of the mean loss over one optimizer step's tokens.

    Args:
        micro_batches: this rank's batches of the step, on the host: `input_ids` and `labels`, [B, S], and where several
            documents share a sequence `position_ids`, [B, S], which restart at 0 with each (see attn.py).
        label_tokens: labels that count in the whole step, over all ranks and micro-batches. The loss is the sum over
            tokens divided by this one number, so no layout and no accumulation changes it.

    Returns:
        This rank's sum of token losses, a scalar; zero on pipeline stages before the last.
    """
    plugin = booster.plugin
    scale = gradient_ranks(plugin) / label_tokens

    if getattr(plugin, "enable_pipeline_parallelism", False):
        return _pipeline_loss(booster, model, optimizer, micro_batches, scale) / scale

    total = torch.zeros((), device=get_accelerator().get_current_device())
    can_defer = plugin.support_no_sync() and getattr(plugin, "zero_stage", 0) < 2
    for index, micro in enumerate(micro_batches):
        last = index == len(micro_batches) - 1
        deferred = contextlib.nullcontext() if last or not can_defer else booster.no_sync(model, optimizer)
        with deferred:
            loss = _loss_of(model, micro, plugin)
            booster.backward(loss * scale, optimizer)
        total += loss.detach()
    return total


def forward_loss(booster: Booster, model: ModelWrapper, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """This rank's sum of token losses in a batch as of `forward_backward`, without gradients."""
    with torch.no_grad():
        if not getattr(booster.plugin, "enable_pipeline_parallelism", False):
            return _loss_of(model, batch, booster.plugin)
        with model.no_sync():  # else the plugin would exchange gradients, of which there are none
            return _pipeline_loss(booster, model, None, [batch], 1.0)


def loss_scaler(optimizer: OptimizerWrapper) -> FP16MixedPrecisionMixin | None:
    """The optimizer's dynamic loss scale under fp16; None under bf16 and fp32."""
    for name in ("mixed_precision_mixin", "mix_precision_mixin", "mixed_precision"):  # one name a plugin
        mixin = getattr(optimizer, name, None)
        if isinstance(mixin, FP16MixedPrecisionMixin):
            return mixin
    return None


def optimizer_step(model: ModelWrapper, optimizer: OptimizerWrapper) -> tuple[float, bool]:
    """Clips and updates; returns the gradient norm before clipping and whether fp16 overflowed, skipping the update."""
    scaler = loss_scaler(optimizer)
    scale = scaler.loss_scale if scaler else 1.0
    if weight_update.supports(optimizer):
        weight_update.update(optimizer)
    else:
        optimizer.step()
    skipped = bool(scaler.found_overflow.item()) if scaler else False
    if skipped and hasattr(model, "chunk_manager"):
        # Gemini leaves this on after a skipped step, and would add the next gradients to the overflowed ones.
        model.chunk_manager.accumulating_grads = False
    optimizer.zero_grad()
    return (math.inf if skipped else float(optimizer.get_grad_norm()) / scale), skipped
