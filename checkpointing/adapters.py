"""LoRA: low-rank adapters on frozen weights (Hu et al. 2021, arXiv:2106.09685), in peft's layout.

A job with `adapters`, a peft LoraConfig, trains only these. `model_utils.trained_specs` then lists their parameters;
initializing, saving and loading need no more than this list.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors import safe_open
from transformers import LlamaConfig

from checkpointing.folder import ADAPTER_FILE, PEFT_PREFIX, file_names, write_model_index, write_tensors
from checkpointing.reader import LazyTensors
from engine.layout import Layout
from model_utils import parameter_specs
from runtime.console import below

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Lora:
    """Settings of the adapters; without a rank all weights are trained.

    Attributes:
        lora_alpha: adapters are scaled by alpha / rank; None: twice the rank.
        lora_modules: linear modules that get an adapter, separated by commas.
        base_weights: fingerprint of the frozen weights (pretrained.weights_fingerprint).
    """

    lora_rank: int | None = None
    lora_alpha: float | None = None
    lora_modules: str = ",".join(MODULES)
    base_weights: str | None = None

    @property
    def resolved(self) -> "Lora":
        """The same settings in one form, with defaults filled in, so that a resume can compare them."""
        if not self.lora_rank:
            return self
        alpha = 2.0 * self.lora_rank if self.lora_alpha is None else self.lora_alpha
        return replace(self, lora_alpha=alpha, lora_modules=",".join(sorted(self.lora_modules.split(","))))

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that a resume must not change, `resolved`."""
        settings = vars(self.resolved)
        return {name: value for name, value in settings.items() if name != "base_weights" or value is not None}

    def problems(self, layout: Layout) -> list[str]:
        """Return a line for each flag that is wrong, has no effect, or conflicts with the layout."""
        if self.lora_rank is None:
            given = {"alpha": self.lora_alpha is not None, "modules": self.lora_modules != ",".join(MODULES)}
            return [
                f"--lora_{name}: takes effect only with --lora_rank; give that too" for name in given if given[name]
            ]
        problems = below(1, lora_rank=self.lora_rank)
        if self.lora_alpha is not None and not 0 < self.lora_alpha < float("inf"):
            problems.append(f"--lora_alpha: {self.lora_alpha} is not a positive number")
        unknown = [name for name in self.lora_modules.split(",") if name not in MODULES]
        if unknown:
            problems.append(
                f"--lora_modules: {unknown[0]!r} is not a linear module of a layer; choose from {','.join(MODULES)}"
            )
        if layout.traits.module == "gemini":
            problems.append(
                f"--lora_rank: {layout.plugin} does not support LoRA; use -p zero2, zero2_cpu or hybrid_parallel"
            )
        if max(layout.tp, layout.pp, layout.sp) > 1:  # its pipeline does not find the layers that peft has wrapped
            problems.append(
                "--lora_rank: hybrid_parallel supports LoRA only for undivided models; use --tp 1 --pp 1 --sp 1"
            )
        return problems

    def config(self, model_path: str) -> LoraConfig | None:
        """Return peft's configuration of the adapters, if any; a model's folder gets an absolute path."""
        if not self.lora_rank:
            return None
        base, settings = Path(model_path), self.resolved
        return LoraConfig(
            task_type="CAUSAL_LM",
            base_model_name_or_path=str(base.absolute() if base.is_dir() else base),
            r=settings.lora_rank,
            lora_alpha=settings.lora_alpha,
            target_modules=settings.lora_modules.split(","),
        )


def merge(adapter: Path, weights: LazyTensors, config: LlamaConfig, folder: Path) -> None:
    """Write a model folder with the adapters merged into the frozen weights, one layer at a time.

    Args:
        adapter: folder that `write_adapter` has written.
        weights: the frozen weights on which the adapters were trained.
    """
    lora = LoraConfig.from_pretrained(adapter)
    folder.mkdir(parents=True)
    files = file_names(config, "model")
    with safe_open(adapter / ADAPTER_FILE, framework="pt") as file:
        adapted = set(file.keys())
        for group, name in files.items():
            merged = {}
            for spec in parameter_specs(config):
                if spec.group != group:
                    continue
                weight = weights[spec.name][:].float()
                key = f"{PEFT_PREFIX}{spec.name.removesuffix('.weight')}.lora_{{}}.weight"
                if key.format("A") in adapted:
                    down, up = (file.get_tensor(key.format(letter)).float() for letter in "AB")
                    weight += lora.lora_alpha / lora.r * (up @ down)
                merged[spec.name] = weight.to(config.torch_dtype)
            write_tensors(folder / name, merged)
    write_model_index(folder, config)
