"""Time torchtitan on the step that benchmark.py measures: the same model, batch, precision and FLOP count.

Needs torchtitan (tested with 0.2.1). It trains in float32 with autocast on one GPU and with FSDP on several; compiled,
with fused AdamW and clipping, without activation checkpointing. -b is the number of sequences of a data-parallel rank.
Flags after `--` go to torchtitan.

    torchrun --standalone --nproc_per_node 1 benchmarks/beside_torchtitan.py --layers 8 -b 4
"""

import argparse
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.config import ConfigManager, JobConfig
from torchtitan.models.llama3 import TransformerModelArgs, get_train_spec
from torchtitan.protocols.train_spec import register_train_spec
from torchtitan.train import Trainer

from model_utils import load_config
from planning.throughput import StepTimer, benchmark_figures

NAME = "llama2"


class RandomTokens(BaseDataLoader):
    """Data loader that yields random tokens without end: inputs and labels, [B, S] each."""

    def __init__(self, job_config: JobConfig, vocab_size: int) -> None:
        self.shape = (job_config.training.local_batch_size, job_config.training.seq_len + 1)
        self.vocab_size = vocab_size

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        while True:
            tokens = torch.randint(self.vocab_size, self.shape)
            yield {"input": tokens[:, :-1]}, tokens[:, 1:]

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state_dict: dict) -> None:
        pass


class TimedTrainer(Trainer):
    """Trainer of torchtitan that times each step between two synchronizations, as benchmark.py does."""

    def __init__(self, job_config: JobConfig) -> None:
        super().__init__(job_config)
        self.timer = StepTimer()

    def train_step(self, data_iterator: Iterator) -> None:
        with self.timer.step():
            super().train_step(data_iterator)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-c", "--config", default="7b")
    parser.add_argument("--layers", type=int, help="number of layers (default: the configuration's)")
    parser.add_argument("-b", "--batch_size", type=int, default=4)
    parser.add_argument("-l", "--max_length", type=int, default=4096)
    parser.add_argument("-s", "--num_steps", type=int, default=12)
    parser.add_argument("-i", "--ignore_steps", type=int, default=3)
    args, further = parser.parse_known_args()
    further = [flag for flag in further if flag != "--"]

    config = load_config(args.config)
    config.num_hidden_layers = args.layers or config.num_hidden_layers
    model = TransformerModelArgs(
        dim=config.hidden_size,
        n_layers=config.num_hidden_layers,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads,
        vocab_size=config.vocab_size,
        multiple_of=256,  # the FFN size is 8/3 of the width, rounded up to a multiple
        norm_eps=config.rms_norm_eps,
        rope_theta=config.rope_theta,
    )
    spec = get_train_spec()
    spec.model_args = {"as_configured": model}
    spec.build_tokenizer_fn = spec.build_validator_fn = None
    spec.build_dataloader_fn = lambda job_config, **_: RandomTokens(job_config, config.vocab_size)
    register_train_spec(NAME, spec)

    flags = {
        "model.name": NAME,
        "model.flavor": "as_configured",
        "training.local_batch_size": args.batch_size,
        "training.seq_len": args.max_length,
        "training.steps": args.num_steps,
        "activation_checkpoint.mode": "none",
        "metrics.log_freq": args.num_steps + 1,  # never: logging takes time and resets the memory peak
    }
    ours = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    job_config = ConfigManager().parse_args([*ours, "--compile.enable", *further])
    trainer = TimedTrainer(job_config)
    trainer.train()
    gpus, layout = torch.distributed.get_world_size(), trainer.parallel_dims
    results = benchmark_figures(
        config,
        trainer.timer.seconds[args.ignore_steps :],
        sequences=args.batch_size * layout.dp_replicate * layout.dp_shard,
        seq_length=args.max_length,
        gpus=gpus,
        recomputation=0.0,
        device_name=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    )
    if torch.distributed.get_rank() == 0:
        peak = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0
        print(
            f"torchtitan: median step {statistics.median(trainer.timer.seconds[args.ignore_steps :]) * 1000:.0f} ms, "
            f"{results['tokens_per_second']:,.0f} tokens/s, MFU {results['mfu'] or 0:.1%}, peak {peak:.1f} GB"
        )
    trainer.close()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
