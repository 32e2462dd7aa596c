"""The engine: ColossalAI's Booster with its plugin, the model and the optimizer."""

import contextlib
import io
from dataclasses import dataclass, field

import torch
from colossalai.accelerator import get_accelerator
from colossalai.booster import Booster
from colossalai.booster.plugin.plugin_base import Plugin
from colossalai.interface import ModelWrapper, OptimizerWrapper
from transformers import LlamaConfig

from attn import attend_inside_documents
from engine import float8, fsdp, gemini, hybrid, zero
from engine.compilation import Fusion, choose_fusion, fuse
from engine.device import HostCopies
from engine.embedding import pad_few_tokens
from engine.job import Job, Optimization
from engine.launch import build_extensions
from engine.layout import Layout
from engine.plugin import PluginModule
from engine.update import Adam, let_gemini_take_adam, patch_loss_scaling
from model_utils import restore_rotary_precision
from runtime.console import say

MODULES: dict[str, PluginModule] = {"zero": zero, "gemini": gemini, "hybrid": hybrid, "fsdp": fsdp}


@dataclass(frozen=True)
class Engine:
    """A model and its optimizer inside a plugin, ready to train."""

    job: Job
    booster: Booster
    model: ModelWrapper
    optimizer: OptimizerWrapper
    fusion: Fusion
    copies: HostCopies = field(default_factory=HostCopies)  # of its state, for checkpoints

    @property
    def plugin(self) -> Plugin:
        return self.booster.plugin

    @property
    def module(self) -> PluginModule:
        """The plugin's own functions."""
        return MODULES[self.layout.traits.module]

    @property
    def layout(self) -> Layout:
        return self.job.layout

    @property
    def config(self) -> LlamaConfig:
        return self.job.config

    @property
    def may_evaluate(self) -> bool:
        """True if a pass without gradients may run now."""
        return self.module.may_evaluate(self.model)


def build_optimizer(model: torch.nn.Module, optimization: Optimization, fused: bool = False) -> Adam:
    """Return ColossalAI's AdamW for parameters on the GPU and in host memory.

    Args:
        fused: update states on the GPU and their working weights in one compiled pass.
    """
    build_extensions()
    with contextlib.redirect_stdout(io.StringIO()):  # it prints that it loads the extensions
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return Adam(
            trained,
            lr=optimization.lr,
            betas=optimization.adam_betas,
            eps=optimization.adam_eps,
            weight_decay=optimization.weight_decay,
            adamw_mode=True,
            fused=fused,
        )


def boost(job: Job) -> Engine:
    """Build the engine; set its weights with `initialize_weights`, `load_checkpoint` or `load_pretrained`."""
    let_gemini_take_adam()
    patch_loss_scaling()
    module = MODULES[job.layout.traits.module]
    if job.compute.mixed_precision == "fp16" and not torch.cuda.is_available():
        say("fp16: slow without a GPU; -x bf16 is many times faster")
    plugin, device = module.build(job), torch.device(get_accelerator().get_current_device())
    model = module.empty_model(job, device)
    module.checkpoint_layers(job, model)
    booster = Booster(plugin=plugin)
    if lora := job.adapters:
        model.name_or_path = lora.base_model_name_or_path  # peft saves it with the adapters
        model = booster.enable_lora(model, lora_config=lora)
    attend_inside_documents(model)
    fusion = choose_fusion(job, on_gpu=torch.cuda.is_available())
    optimizer = build_optimizer(model, job.optimization, fused=fusion is not Fusion.NONE)
    model, optimizer, *_ = booster.boost(model, optimizer)
    float8.convert(model, job.compute)
    module.prepare(job, plugin, model, optimizer)
    restore_rotary_precision(model, device)
    pad_few_tokens(model)
    fuse(model, fusion, module.compile_layers)
    model.train()
    return Engine(job, booster, model, optimizer, fusion)
