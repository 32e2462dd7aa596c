"""Makes of a checkpoint a folder for AutoModelForCausalLM and AutoTokenizer, with a model card.

    python scripts/export_hf.py --checkpoint checkpoint/epoch0-step1000 --tokenizer tokenizer/ --output my_model

The checkpoint's files are verified first. It needs no GPU and no memory to speak of: weights are linked or copied.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import console
import dependencies

console.quiet_third_parties()
dependencies.require()

import argparse

import checkpoint_utils
from arguments import ArgumentParser, user_path
from console import InputError
from model_export import export
from tokenization import add_tokenizer_arg, load_tokenizer


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(prog="export_hf.py", description=__doc__)
    parser.add_argument("--checkpoint", type=user_path, required=True, help="folder epochE-stepS")
    parser.add_argument("--output", type=user_path, required=True, help="folder to make; it must not exist")
    add_tokenizer_arg(parser)
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    if not checkpoint_utils.is_complete(args.checkpoint):
        raise InputError(f"--checkpoint: {args.checkpoint} is not a complete checkpoint; give a folder epochE-stepS")
    if args.output.exists():
        raise InputError(f"--output: {args.output} exists; give another folder")
    tokenizer = load_tokenizer(args.tokenizer)
    damaged = checkpoint_utils.damaged_files(args.checkpoint)
    if damaged:
        raise InputError(*(f"--checkpoint: {args.checkpoint / name} is damaged" for name in damaged))
    try:
        export(args.checkpoint, args.output, tokenizer)
    except OSError as error:
        reason = error.strerror or "no room, or no permission"
        raise InputError(f"--output: {args.output} cannot be written ({reason}); give another folder") from error
    print(f"model: {args.output}")
    return 0


if __name__ == "__main__":
    console.run(main, "export_hf.py")
