"""LoRA: low-rank adapters beside frozen weights (Hu et al. 2021, arXiv:2106.09685), in peft's layout.

`config.lora`, a peft LoraConfig, marks a configuration whose adapters alone are trained; `model_utils.trained_specs`
then gives their parameters, and what initialises, saves and loads the trained parameters needs to know no more.
"""

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors import safe_open
from transformers import LlamaConfig

from checkpointing.folder import ADAPTER_FILE, PEFT_PREFIX, file_names, write_model_index, write_tensors
from checkpointing.reader import LazyTensors
from engine.layout import GEMINI_PLUGINS, Layout
from model_utils import parameter_specs
from runtime.console import below

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Lora:
    """Adapters beside frozen weights; without a rank all weights are trained.

    Attributes:
        lora_alpha: adapters count alpha / rank times; None: twice the rank.
        lora_modules: linear modules that get one, with commas between.
        base_weights: fingerprint of the frozen weights (pretrained.weights_fingerprint).
    """

    lora_rank: int | None = None
    lora_alpha: float | None = None
    lora_modules: str = ",".join(MODULES)
    base_weights: str | None = None

    @property
    def resolved(self) -> "Lora":
        """The same with defaults written out, so that a resume in other words is known for the same run."""
        if not self.lora_rank:
            return self
        alpha = 2.0 * self.lora_rank if self.lora_alpha is None else self.lora_alpha
        return replace(self, lora_alpha=alpha, lora_modules=",".join(sorted(self.lora_modules.split(","))))

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that no resume may change."""
        return {name: value for name, value in vars(self).items() if name != "base_weights" or value is not None}

    def problems(self, layout: Layout) -> list[str]:
        """Return a line for each reason that the flags cannot work together."""
        if self.lora_rank is None:
            given = {"alpha": self.lora_alpha is not None, "modules": self.lora_modules != ",".join(MODULES)}
            return [
                f"--lora_{name}: takes effect with --lora_rank alone; give that too" for name in given if given[name]
            ]
        problems = below(1, lora_rank=self.lora_rank)
        if self.lora_alpha is not None and not 0 < self.lora_alpha < float("inf"):
            problems.append(f"--lora_alpha: {self.lora_alpha} is not a positive number")
        unknown = [name for name in self.lora_modules.split(",") if name not in MODULES]
        if unknown:
            problems.append(
                f"--lora_modules: {unknown[0]!r} is no linear module of a layer; choose from {','.join(MODULES)}"
            )
        if layout.plugin in GEMINI_PLUGINS:
            problems.append(f"--lora_rank: {layout.plugin} has no LoRA; use -p zero2, zero2_cpu or hybrid_parallel")
        if max(layout.tp, layout.pp, layout.sp) > 1:  # its pipeline looks for layers where peft has moved them
            problems.append(
                "--lora_rank: hybrid_parallel has LoRA for undivided models alone; use --tp 1 --pp 1 --sp 1"
            )
        return problems

    def config(self, model_path: str) -> LoraConfig:
        """Return peft's description of the adapters, which names the model by an absolute path where it is a folder."""
        base = Path(model_path)
        return LoraConfig(
            task_type="CAUSAL_LM",
            base_model_name_or_path=str(base.absolute() if base.is_dir() else base),
            r=self.lora_rank,
            lora_alpha=self.lora_alpha,
            target_modules=self.lora_modules.split(","),
        )


def merge(adapter: Path, weights: LazyTensors, config: LlamaConfig, folder: Path) -> None:
    """Writes a model folder whose weights are those frozen plus the adapters' products, one layer at a time.

    Args:
        adapter: what `write_adapter` has written.
        weights: of the model that the adapters were trained beside.
    """
    lora, plain = config.lora, copy.deepcopy(config)
    del plain.lora
    folder.mkdir(parents=True)
    files = file_names(plain, "model")
    with safe_open(adapter / ADAPTER_FILE, framework="pt") as file:
        adapted = set(file.keys())
        for group, name in files.items():
            merged = {}
            for spec in parameter_specs(plain):
                if spec.group != group:
                    continue
                weight = weights[spec.name][:].float()
                key = f"{PEFT_PREFIX}{spec.name.removesuffix('.weight')}.lora_{{}}.weight"
                if key.format("A") in adapted:
                    down, up = (file.get_tensor(key.format(letter)).float() for letter in "AB")
                    weight += lora.lora_alpha / lora.r * (up @ down)
                merged[spec.name] = weight.to(config.torch_dtype)
            write_tensors(folder / name, merged)
    write_model_index(folder, plain)
