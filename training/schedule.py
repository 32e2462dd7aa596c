"""The learning rate: linear warm-up, then a cosine."""

import argparse
import math
from functools import partial

from colossalai.interface import OptimizerWrapper
from torch.optim.lr_scheduler import LambdaLR

from training.plan import Plan, TrainState

MIN_LR_RATIO = 0.1  # the cosine ends at a tenth of the peak (LLaMA, arXiv:2302.13971, section 2.3)


def cosine_with_warmup(step: int, warmup_steps: int, total_steps: int) -> float:
    """Fraction of the peak learning rate for the optimizer step of index `step`: linear up, cosine down to a tenth."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return MIN_LR_RATIO + (1 - MIN_LR_RATIO) * 0.5 * (1 + math.cos(math.pi * progress))


def build_scheduler(optimizer: OptimizerWrapper, args: argparse.Namespace, state: TrainState, plan: Plan) -> LambdaLR:
    """The schedule at the state's step; a function of the step alone, so that a resume needs nothing else."""
    for group in optimizer.optim.param_groups:
        group["initial_lr"] = args.lr
    schedule = partial(cosine_with_warmup, warmup_steps=args.warmup_steps, total_steps=plan.total_steps)
    return LambdaLR(optimizer.optim, schedule, last_epoch=state.step - 1)
