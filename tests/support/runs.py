"""Runs of pretrain.py on the tests' corpus, those that flags describe, and the problems that it finds in flags."""

import torch

from corpus.order import GlobalOrder
from data_utils import PackedDataset
from model_utils import load_config
from pretrain import check, parse_args
from runtime.console import InputError
from training.flags import job_of, run_of
from training.run import Run
from training.stages import read_stages

SEQUENCE_LENGTH = 64
EPOCH = 24  # sequences in `few_data`
SEED = 42  # the default
SECRET = "hf_never_to_be_written"


def batch_at(dataset: PackedDataset, start: int, stop: int) -> torch.Tensor:
    """Return the sequences between two positions in the order of a run's data, [stop - start, SEQUENCE_LENGTH]."""
    order = GlobalOrder(len(dataset), SEED)
    return torch.stack([dataset[order[position]]["input_ids"] for position in range(start, stop)])


def run_from(*flags: str) -> Run:
    """Return the run that these flags of pretrain.py describe."""
    args = parse_args(list(flags))
    return run_of(args, job_of(args, load_config(args.config)), args.config)


def problems_of(flags: str) -> list[str]:
    """Return the problems that pretrain.py finds in these flags, with the model `test` unless they name another."""
    args = parse_args(["-c", "test", "-l", "128", *flags.split()])
    try:
        stages = read_stages(args.stages, args.dataset) if args.stages else None
        check(args, run_of(args, job_of(args, load_config(args.config)), args.config, stages=stages))
    except InputError as error:
        return list(error.problems)
    return []
