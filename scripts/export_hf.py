"""Export a checkpoint to a folder that AutoModelForCausalLM and AutoTokenizer load, with a model card.

    python scripts/export_hf.py --checkpoint checkpoint/epoch0-step1000 --tokenizer tokenizer/ --output my_model

The checkpoint's checksums are verified first. No GPU and little memory is needed: weights are linked or copied, and
adapters are merged layer by layer into the model they were trained on.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from runtime import process, requirements

requirements.require()

import argparse
from collections.abc import Callable

from peft import LoraConfig
from safetensors import SafetensorError
from transformers import LlamaConfig, PreTrainedTokenizerBase

from checkpointing import folder
from checkpointing.export import export_merged, export_model
from checkpointing.folder import ADAPTER_FILE
from checkpointing.pretrained import check_pretrained, find_model, generation_config, weights_fingerprint
from checkpointing.reader import LazyTensors
from corpus.tokenizer import check_vocabulary, load_tokenizer
from model_utils import load_config
from runtime.console import InputError
from training.flags import ArgumentParser, add_flag, add_tokenizer_arg, user_name, user_path


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(prog="export_hf.py", description=__doc__)
    add_flag(parser, "--checkpoint", user_path, "folder epochE-stepS", required=True)
    add_flag(parser, "--output", user_path, "folder to create; it must not exist", required=True)
    text = "model under the adapters (default: the one they were trained on)"
    add_flag(parser, "--base_model", user_name, text)
    add_tokenizer_arg(parser)
    return parser.parse_args()


def find_base(checkpoint: Path, base_model: str | None, config: LlamaConfig) -> tuple[Path, LazyTensors]:
    """Return the folder and weights of the model on which the checkpoint's adapters were trained.

    Raises:
        InputError: the model is missing, or it is a different one.
    """
    adapters = LoraConfig.from_pretrained(checkpoint / "model")
    base = find_model(base_model or adapters.base_model_name_or_path, "--base_model")
    weights = check_pretrained(base, config, "--base_model")
    trained_on = folder.read_running_states(checkpoint)["settings"]["base_weights"]
    if weights_fingerprint(weights) != trained_on:
        raise InputError(f"--base_model: {base} is not the model that the adapters were trained on; give that model")
    return base, weights


def exporter(
    checkpoint: Path, config: LlamaConfig, tokenizer: PreTrainedTokenizerBase, base_model: str | None = None
) -> Callable[[Path], None]:
    """Return the function that exports a checkpoint to a folder, with adapters merged.

    Args:
        config: of the checkpoint.
        base_model: the model under the adapters, if it is not where it was in training.

    Raises:
        InputError: the tokenizer is not the run's, or the model under the adapters does not fit.
    """
    ends, ends_of_run = (tokenizer.bos_token_id, tokenizer.eos_token_id), (config.bos_token_id, config.eos_token_id)
    if ends != ends_of_run:
        raise InputError(
            f"--tokenizer: its BOS and EOS have the ids {ends}, and in the run they had {ends_of_run}; give the run's"
        )
    if (checkpoint / "model" / ADAPTER_FILE).is_file():
        base, weights = find_base(checkpoint, base_model, config)
        json_files = generation_config(base, tokenizer, "--base_model")
        return lambda target: export_merged(checkpoint, target, tokenizer, config, weights, json_files)
    if base_model:
        raise InputError(f"--base_model: {checkpoint} has no adapters, which this flag is for; leave it out")
    return lambda target: export_model(checkpoint, target, tokenizer)


def main() -> int:
    args = parse_args()
    if not folder.is_complete(args.checkpoint):
        raise InputError(f"--checkpoint: {args.checkpoint} is not a complete checkpoint; give a folder epochE-stepS")
    if args.output.exists():
        raise InputError(f"--output: {args.output} exists; give another folder")
    config = load_config(str(args.checkpoint / "model"), "--checkpoint")
    tokenizer = load_tokenizer(args.tokenizer)
    check_vocabulary(tokenizer, config)
    if damaged := folder.damaged_files(args.checkpoint):
        raise InputError(*(f"--checkpoint: {args.checkpoint / name} is damaged" for name in damaged))
    export = exporter(args.checkpoint, config, tokenizer, args.base_model)
    try:
        export(args.output)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or "no room, or no permission"
        raise InputError(f"--output: {args.output} cannot be written ({reason}); give another folder") from error
    print(f"model: {args.output}")
    return 0


if __name__ == "__main__":
    process.run(main, "export_hf.py")
