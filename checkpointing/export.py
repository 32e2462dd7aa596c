"""Export of checkpoints to folders that AutoModelForCausalLM and AutoTokenizer load."""

import os
import shutil
import tempfile
from pathlib import Path

from transformers import LlamaConfig, PreTrainedTokenizerBase

from checkpointing.adapters import merge
from checkpointing.folder import incomplete_files, read_running_states
from checkpointing.reader import LazyTensors
from model_utils import count_parameters, load_config
from runtime.console import RunError
from runtime.files import replace_folder, write_json


def export_model(
    checkpoint: Path,
    target: Path,
    tokenizer: PreTrainedTokenizerBase,
    model: Path | None = None,
    json_files: dict[str, dict] | None = None,
) -> None:
    """Export a checkpoint's model to a folder that AutoModelForCausalLM and AutoTokenizer load, with a model card.

    If the file system allows, weights are hard links and take no space; all other files are copies.

    Args:
        model: the model's folder, if not the checkpoint's own.
        json_files: further JSON files, by name.

    Raises:
        RunError: the checkpoint lacks a file.
    """
    if incomplete := incomplete_files(checkpoint):
        raise RunError(f"{checkpoint / incomplete[0]} is missing or cut short")
    model = model or checkpoint / "model"
    temporary = target.with_name(f".{target.name}.incomplete")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        try:
            shutil.copytree(model, temporary, copy_function=_link_weights)
        except (OSError, shutil.Error):
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.copytree(model, temporary, copy_function=shutil.copyfile)
        tokenizer.save_pretrained(temporary)
        for name, content in (json_files or {}).items():
            write_json(temporary / name, content)
        (temporary / "README.md").write_text(_model_card(checkpoint), encoding="utf-8")
        replace_folder(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def export_merged(
    checkpoint: Path,
    target: Path,
    tokenizer: PreTrainedTokenizerBase,
    config: LlamaConfig,
    weights: LazyTensors,
    json_files: dict[str, dict],
) -> None:
    """Export a checkpoint's adapters, merged into their frozen `weights`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".merged-") as folder:
        merge(checkpoint / "model", weights, config, Path(folder, "model"))
        export_model(checkpoint, target, tokenizer, Path(folder, "model"), json_files)


def _link_weights(source: str, target: str) -> None:
    (os.link if source.endswith(".safetensors") else shutil.copyfile)(source, target)


def _model_card(checkpoint: Path) -> str:
    """Return a model card with the facts of the run that made a checkpoint."""
    states, config = read_running_states(checkpoint), load_config(str(checkpoint / "model"))
    facts = {
        "parameters": f"{count_parameters(config):,}",
        "layers, hidden size, heads, key-value heads": f"{config.num_hidden_layers}, {config.hidden_size}, "
        f"{config.num_attention_heads}, {config.num_key_value_heads}",
        "weights": str(config.torch_dtype).removeprefix("torch."),
        "optimizer steps": f"{states['step']:,} of {states['settings']['schedule_steps']:,}",
        "tokens": f"{states['tokens']:,}",
    }
    facts |= {name.replace("_", " "): value for name, value in states["settings"].items() if name != "schedule_steps"}
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- llama\n---\n\n"
        f"# LLaMA, {checkpoint.name}\n\nA causal language model in Hugging Face's layout.\n\n"
        f"| of the run | |\n|---|---|\n{rows}\n"
    )
