"""ColossalAI's Booster: launching, the plugins by name, model and optimizer inside them."""

import argparse
import contextlib
import io
import logging
import math

import torch
from colossalai.accelerator import get_accelerator
from colossalai.booster import Booster
from colossalai.booster.plugin import GeminiPlugin, HybridParallelPlugin, LowLevelZeroPlugin
from colossalai.booster.plugin.plugin_base import Plugin
from colossalai.interface import ModelWrapper, OptimizerWrapper
from colossalai.lazy import LazyInitContext
from colossalai.zero import GeminiOptimizer, LowLevelZeroOptimizer
from transformers import LlamaConfig

from attn import attend_inside_documents
from engine import compilation, gemini, update
from engine.adam import Adam
from engine.compilation import Fusion
from engine.fsdp import FSDPPlugin
from engine.hybrid import SequenceParallelPolicy
from engine.launch import build_extensions
from engine.layout import GEMINI_PLUGINS, Layout, resolve_layout
from engine.recomputation import recompute, recomputed_by, recomputed_layers, recomputed_share
from model_utils import build_model, restore_rotary_precision
from runtime.console import say, world_size

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
ADAM_BETAS = (0.9, 0.95)  # LLaMA's (arXiv:2302.13971, section 2.3)
INITIAL_LOSS_SCALE = 2.0**16
UNPADDED_VOCABULARY = 1  # padded columns would count in the vocabulary-parallel loss


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
    if args.plugin in GEMINI_PLUGINS:
        automatic = args.plugin == "gemini_auto" and not on_host
        if args.plugin == "gemini_auto" and on_host:
            say("gemini_auto: there is no GPU memory to balance here, so placement is static, as with gemini")
        chunk_parameters = gemini.chunk_parameters(args, config, layout)
        plugin = GeminiPlugin(
            placement_policy="auto" if automatic else "static",
            tp_size=layout.tp,
            extra_dp_size=layout.extra_dp,
            min_chunk_size_m=chunk_parameters / 2**20,
            search_range_m=0 if gemini.keeps_whole(args, layout.dp) else chunk_parameters // 8 / 2**20,
            max_prefetch=gemini.prefetched_chunks(args, config, layout),
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
            recomputed_by=recomputed_by(args),
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
        enable_metadata_cache=layout.chunks > 1 or not length_varies,  # see engine.step
        # The interleaved schedule lets go of its last send before it has ended, which Gloo then gives up.
        overlap_p2p=not on_host,
        **common,
    )


def build_optimizer(model: torch.nn.Module, lr: float, weight_decay: float, fusion: Fusion = Fusion.NONE) -> Adam:
    """ColossalAI's fused AdamW for parameters on GPU and host, with LLaMA's betas."""
    build_extensions()
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
    """Model and AdamW inside the plugin, weights not yet set: by `initialize_weights` or `load_checkpoint`.

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
        recompute(model, recomputed_layers(config, recomputed_share(args)), recomputed_by(args))
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
        gemini.keep_norm_on_device(plugin.tp_size)
        gemini.keep_memory_apart(model)
        gemini.prefetch_in_training_alone(model)
        gemini.plan_each_pass_from_its_start(model)
        if plugin.tp_size > 1:
            gemini.count_norm_over_tensor_parallel(optimizer, plugin.tp_group)
    if isinstance(optimizer, LowLevelZeroOptimizer):
        update.exchange_gradients_directly(optimizer)
    restore_rotary_precision(model, device)
    compile_layers = gemini.compile_layers if isinstance(plugin, GeminiPlugin) else compilation.compile_each_layer
    compilation.fuse(model, fusion, compile_layers)
    model.train()
    return booster, model, optimizer
