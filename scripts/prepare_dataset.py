"""Tokenizes a data set once, into a folder that pretrain.py reads with -d.

    python scripts/prepare_dataset.py -d data/ --tokenizer tokenizer/ --output prepared/
    python scripts/prepare_dataset.py -d togethercomputer/RedPajama-Data-1T --dataset_slices arxiv c4 --output prepared/
Four machines on one file system, each with its own part; the last one to finish writes the manifest:
    python scripts/prepare_dataset.py -d data/ --tokenizer tokenizer/ --output prepared/ --part 2/4

After an interruption, the same command continues; finished shards are kept. The result does not depend on
interruptions, cores or machines, and serves every --max_length.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from runtime import process, requirements

requirements.require()

import argparse
import os
import re
import shlex

from corpus.encoder import TextEncoder
from corpus.manifest import read_manifest
from corpus.prepare import Part, prepare_folder, verify
from corpus.sources import REDPAJAMA_SAMPLE, resolve_source
from corpus.tokenizer import load_tokenizer
from runtime.console import InputError, say
from training.flags import ArgumentParser, add_flag, add_source_args, add_tokenizer_arg, user_name, user_path


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(prog="prepare_dataset.py", description=__doc__)
    add_flag(parser, "-d --dataset", REDPAJAMA_SAMPLE, "as in pretrain.py", type=user_name)
    add_source_args(parser)
    add_tokenizer_arg(parser)
    add_flag(parser, "--output", user_path, "folder for the shards and the manifest", required=True)
    add_flag(parser, "--num_workers", int, "tokenizing processes (default: one per core)")
    text = "do the K-th of N parts (default: 1/1, everything)"
    add_flag(parser, "--part", _part, text, default=Part(), metavar="K/N")
    add_flag(parser, "--eval_fraction", 0.0, "fraction of the documents held out of training (default: 0)")
    add_flag(parser, "--verify", False, "only compare every shard of a finished folder with its checksum")
    args = parser.parse_args()
    if args.num_workers is not None and args.num_workers < 1:
        raise InputError(f"--num_workers: must be at least 1, not {args.num_workers}")
    if not 0 <= args.eval_fraction < 1:
        raise InputError(f"--eval_fraction: must be at least 0 and below 1, not {args.eval_fraction}")
    return args


def _part(text: str) -> Part:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"'{text}' is not K/N with K from 1 to N, such as 2/4")
    return Part(int(match[1]), int(match[2]))


def main() -> int:
    args = parse_args()
    if args.verify:
        verify(args.output, args.num_workers or len(os.sched_getaffinity(0)), "--output")
        say(f"{args.output}: every shard matches its checksum")
    else:
        encoder = TextEncoder(load_tokenizer(args.tokenizer))
        source = resolve_source(args.dataset, revision=args.dataset_revision, slices=args.dataset_slices)
        if source.remark:
            say(source.remark)
        request = [args.dataset, args.dataset_revision, *args.dataset_slices]
        options = {"part": args.part, "eval_fraction": args.eval_fraction, "request": request}
        if not prepare_folder(source, encoder, args.output, args.num_workers, **options):
            return 0
        say(f"train on it: pretrain.py -d {shlex.quote(str(args.output))} --tokenizer {shlex.quote(args.tokenizer)}")
    for name, counts in read_manifest(args.output)["slices"].items():
        say(f"{name}: {counts['documents']:,} documents, {counts['tokens']:,} tokens")
    return 0


if __name__ == "__main__":
    process.run(main, "prepare_dataset.py")
