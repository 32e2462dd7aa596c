"""The plugins `fsdp` and `fsdp_cpu` of benchmark.py: PyTorch's FullyShardedDataParallel.

ColossalAI's plugin for it does not clip gradients, scale an fp16 loss, or run without a GPU; the one here does.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from colossalai.accelerator import get_accelerator
from colossalai.booster.plugin import TorchFSDPPlugin
from colossalai.booster.plugin.torch_fsdp_plugin import FSDPOptimizerWrapper
from colossalai.interface import ModelWrapper
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.fsdp import CPUOffload, FullyShardedDataParallel, MixedPrecision
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.optim import Optimizer
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from engine.compilation import compile_layers as compile_layers
from engine.job import Job, recomputed_layers
from engine.plugin import LocalPart, common_options
from engine.plugin import may_evaluate as may_evaluate
from engine.recomputation import checkpoint_function
from model_utils import ParameterSpec, build_model, initial_weight
from runtime.console import say


def build(job: Job) -> "FSDPPlugin":
    """Return FSDPPlugin, which sets the initial weights and checkpoints the layers itself."""
    on_gpu, common = torch.cuda.is_available(), common_options(job)
    offload = bool(job.layout.traits.on_host)
    if offload and not on_gpu:
        say("fsdp_cpu: without a GPU the same as fsdp, all in host memory")
    return FSDPPlugin(
        MixedPrecision(param_dtype=job.dtype, reduce_dtype=job.reduce_dtype),
        max_norm=common["max_norm"],
        offload=offload and on_gpu,
        initial_scale=common["initial_scale"],
        seed=job.seed,
        recomputed=recomputed_layers(job.config.num_hidden_layers, job.recomputed),
        checkpointed=checkpoint_function(job),
    )


def empty_model(job: Job, device: torch.device) -> LlamaForCausalLM:
    """Return the model on the meta device; the plugin allocates each layer when it shards it."""
    return build_model(job.config, torch.device("meta"))


def checkpoint_layers(job: Job, model: LlamaForCausalLM) -> None:
    """Do nothing: the plugin checkpoints layers after sharding them."""


def prepare(job: Job, plugin: "FSDPPlugin", model: ModelWrapper, optimizer: "FSDPOptimizer") -> None:
    """Do nothing."""


def precision_mixin(optimizer: "FSDPOptimizer") -> None:
    """Return None: the optimizer scales an fp16 loss itself."""


def step(optimizer: "FSDPOptimizer", rejects: Callable[[float], bool] | None = None) -> float:
    """Clip and update; return the gradient norm before clipping."""
    optimizer.step(rejects)
    return float(optimizer.grad_norm)


def local_part(optimizer: "FSDPOptimizer", parameter: nn.Parameter) -> LocalPart:
    """Return an empty part: the plugin sets the initial weights itself, and benchmark.py saves no checkpoints."""
    return LocalPart(0, 0, torch.empty(0), {}, replicated=False)


def update_working_weights(optimizer: "FSDPOptimizer") -> None:
    """Do nothing: FSDP casts the weights as it gathers them."""


class FSDPOptimizer(FSDPOptimizerWrapper):
    """FSDP's optimizer with clipping by the norm over all shards and, in fp16, loss scaling that skips overflows."""

    grad_norm: torch.Tensor  # of the last step, before clipping

    def __init__(self, optimizer: Optimizer, model: ModelWrapper, max_norm: float, scaler: ShardedGradScaler):
        super().__init__(optimizer, model)
        self.max_norm, self.scaler = max_norm, scaler

    def backward(self, loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        super().backward(self.scaler.scale(loss), *args, **kwargs)

    def step(self, rejects: Callable[[float], bool] | None = None) -> None:
        self.scaler.unscale_(self.optim)
        self.grad_norm = self.model.module.clip_grad_norm_(self.max_norm)
        if not (rejects and rejects(float(self.grad_norm))):
            self.scaler.step(self.optim)
        self.scaler.update()


class FSDPPlugin(TorchFSDPPlugin):
    """FSDP over decoder layers: shards parameters, gradients and optimizer states.

    The model is built on the meta device. Each layer gets its memory and initial weights when it is sharded.

    Args:
        precision: of computation and communication; shards of weights and gradients are float32.
        max_norm: largest gradient norm; infinite: no clipping.
        offload: keep shards and optimizer states in host memory.
        initial_scale: first loss scale, in fp16.
        seed: of the initial weights.
        recomputed: layers whose activations are recomputed.
        checkpointed: function that calls such a layer (recomputation.py).
    """

    def __init__(
        self,
        precision: MixedPrecision,
        max_norm: float,
        offload: bool,
        initial_scale: float,
        seed: int,
        recomputed: set[int],
        checkpointed: Callable,
    ):
        super().__init__(
            cpu_offload=CPUOffload(offload_params=offload),
            auto_wrap_policy=partial(transformer_auto_wrap_policy, transformer_layer_cls={LlamaDecoderLayer}),
            mixed_precision=precision,
        )
        self.max_norm, self.seed, self.recomputed = max_norm, seed, recomputed
        self.checkpointed = checkpointed
        self.scaling: dict[str, Any] = dict(init_scale=initial_scale, enabled=precision.param_dtype is torch.float16)

    def supported_devices(self) -> list[str]:
        return ["cuda", "npu"]

    def configure(
        self,
        model: LlamaForCausalLM,
        optimizer: Optimizer,
        criterion: Any = None,
        dataloader: Any = None,
        lr_scheduler: Any = None,
    ) -> tuple:
        device = torch.device(get_accelerator().get_current_device())
        names = {module: name for name, module in model.named_modules()}
        tied = model.config.tie_word_embeddings

        @torch.no_grad()
        def materialize(module: nn.Module) -> None:
            if tied and module is model.get_output_embeddings():
                return  # it gets the weight of the input embedding
            module.to_empty(device=device, recurse=False)
            for name, parameter in module.named_parameters(prefix=names[module], recurse=False):
                spec = ParameterSpec(name, parameter.shape)
                parameter.copy_(initial_weight(spec, model.config, self.seed, device))
            if tied and module is model.get_input_embeddings():
                model.tie_weights()

        self.fsdp_kwargs["param_init_fn"] = materialize
        wrapper = ModelWrapper(FullyShardedDataParallel(model, device_id=device, **self.fsdp_kwargs))
        # Checkpoint inside the sharded layers, so that recomputing does not gather a layer's weights a third time.
        layers = [module for module in wrapper.modules() if isinstance(module, LlamaDecoderLayer)]
        chosen = [layer for layer in layers if layer.self_attn.layer_idx in self.recomputed]
        wrap = partial(checkpoint_wrapper, checkpoint_fn=self.checkpointed)
        apply_activation_checkpointing(wrapper.module, wrap, check_fn=lambda module: module in chosen)
        optimizer.param_groups.clear()  # they hold parameters that shards have replaced
        optimizer.add_param_group({"params": list(wrapper.parameters())})
        scaler = ShardedGradScaler(device.type, **self.scaling)
        return wrapper, FSDPOptimizer(optimizer, wrapper, self.max_norm, scaler), criterion, dataloader, lr_scheduler
