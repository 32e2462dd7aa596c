"""Compute the gradient of the same batch again and again, and print how much its norm varies.

    python benchmarks/repeated_gradients.py -c tiny -p zero2 -x bf16 -a -b 2 -l 1024 --accumulation_steps 8

Weights never change, so a norm that is off by more than the last digits shows a kernel with a race, or a faulty GPU.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from runtime import process, requirements

process.prepare()
requirements.start_cuda()

import statistics

import torch

from attn import select_attention
from engine.boost import boost
from engine.embedding import FEW_TOKENS
from engine.launch import launch, shut_down
from engine.shards import initialize_weights
from engine.step import forward_backward, optimizer_step
from model_utils import load_config
from runtime.console import rank, say
from training.flags import ArgumentParser, add_flag, add_plugin_args, add_training_args, job_of


def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("-c", "--config", default="tiny")
    add_flag(parser, "--rounds", 200, "number of times that the gradient is computed")
    add_flag(parser, "--tolerance", 1e-3, "deviation from the median, relative, that is counted")
    add_flag(parser, "--unpadded", False, "do not pad small micro-batches for the embedding; see engine/embedding.py")
    add_plugin_args(parser)
    add_training_args(parser)
    args = parser.parse_args()
    if args.unpadded:
        FEW_TOKENS.clear()
    config = load_config(args.config)
    say(select_attention(config, args.flash_attention, args.sp > 1, deterministic=args.deterministic))
    job = job_of(args, config)
    launch(args.seed, args.deterministic)
    engine = boost(job)
    initialize_weights(engine)

    torch.manual_seed(rank() // (job.layout.ranks // job.layout.dp))
    shape = (args.batch_size, args.max_length)
    batches = [torch.randint(config.vocab_size, shape) for _ in range(args.accumulation_steps)]
    label_tokens = job.layout.dp * len(batches) * args.batch_size * (args.max_length - 1)
    norms = []
    for number in range(args.rounds):
        forward_backward(engine, [{"input_ids": ids, "labels": ids} for ids in batches], label_tokens)
        norms.append(optimizer_step(engine, rejects=lambda norm: True)[0])
        if (number + 1) % 50 == 0:
            say(f"{number + 1} of {args.rounds}")
    usual = statistics.median(norms)
    off = [abs(norm / usual - 1) for norm in norms]
    count = sum(each > args.tolerance for each in off)
    say(f"norm {usual:.6f}; largest deviation {max(off):.2e}; {count} of {len(off)} above {args.tolerance:g}")
    shut_down(engine.plugin)
    return 0


if __name__ == "__main__":
    process.run(main, Path(__file__).name)
