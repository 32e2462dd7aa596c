"""LoRA: low-rank adapters beside frozen weights (Hu et al. 2021, arXiv:2106.09685), in peft's layout.

`config.lora`, a peft LoraConfig, marks a configuration whose adapters alone are trained; `model_utils.trained_specs`
then gives their parameters, and what initialises, saves and loads the trained parameters needs to know no more.
"""

import argparse
import copy
from pathlib import Path

from peft import LoraConfig
from safetensors import safe_open
from transformers import LlamaConfig

from checkpointing.folder import ADAPTER_FILE, PEFT_PREFIX, file_names, write_model_index, write_tensors
from checkpointing.reader import LazyTensors
from engine.layout import Layout
from model_utils import parameter_specs

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def fill_lora_args(args: argparse.Namespace) -> None:
    """Writes out what was left to defaults, so that a resume which says the same in other words is the same run."""
    if args.lora_alpha is None:
        args.lora_alpha = 2.0 * args.lora_rank
    args.lora_modules = ",".join(sorted(args.lora_modules.split(",")))
    if args.plugin == "hybrid_parallel":  # which divides no model with adapters
        args.tp, args.pp = args.tp or 1, args.pp or 1


def lora_problems(args: argparse.Namespace, layout: Layout) -> list[str]:
    """Return one line for each reason that the flags cannot work together."""
    if args.lora_rank is None:
        given = {"alpha": args.lora_alpha is not None, "modules": args.lora_modules != ",".join(MODULES)}
        return [f"--lora_{name}: takes effect with --lora_rank alone; give that too" for name in given if given[name]]
    problems = []
    if args.lora_rank < 1:
        problems.append(f"--lora_rank: {args.lora_rank} is below the least possible, 1")
    if args.lora_alpha is not None and not 0 < args.lora_alpha < float("inf"):
        problems.append(f"--lora_alpha: {args.lora_alpha} is not a positive number")
    unknown = [name for name in args.lora_modules.split(",") if name not in MODULES]
    if unknown:
        problems.append(f"--lora_modules: {unknown[0]!r} is no linear module of a layer; choose of {','.join(MODULES)}")
    if args.plugin.startswith("gemini"):
        problems.append(f"--lora_rank: {args.plugin} has no LoRA; use -p zero2, zero2_cpu or hybrid_parallel")
    if max(layout.tp, layout.pp, layout.sp) > 1:  # its pipeline looks for layers where peft has put no longer any
        problems.append("--lora_rank: hybrid_parallel has LoRA for undivided models alone; use --tp 1 --pp 1 --sp 1")
    return problems


def lora_config(args: argparse.Namespace) -> LoraConfig:
    """peft's description of the adapters, which names the model beside them for programs in any working directory."""
    base = Path(args.model_path)
    return LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(base.absolute() if base.is_dir() else base),
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        target_modules=args.lora_modules.split(","),
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
