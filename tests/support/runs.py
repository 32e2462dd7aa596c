"""Runs described by flags of pretrain.py, and the problems that it finds in flags."""

from model_utils import load_config
from pretrain import check, parse_args
from runtime.console import InputError
from training.flags import job_of, run_of
from training.plan import Run


def run_from(*flags: str) -> Run:
    """Return the run that these flags of pretrain.py describe."""
    args = parse_args(list(flags))
    return run_of(args, job_of(args, load_config(args.config)), args.config)


def problems_of(flags: str) -> list[str]:
    """Return the problems that pretrain.py finds in these flags, with the model `test` unless they name another."""
    args = parse_args(["-c", "test", "-l", "128", *flags.split()])
    try:
        check(args, run_of(args, job_of(args, load_config(args.config)), args.config))
    except InputError as error:
        return list(error.problems)
    return []
