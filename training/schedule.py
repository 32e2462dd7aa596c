"""The learning rate: linear warm-up, then a cosine."""

import math
from functools import partial

from torch.optim.lr_scheduler import LambdaLR

from engine.boost import Engine


def cosine_with_warmup(step: int, warmup_steps: int, total_steps: int, min_ratio: float = 0.1) -> float:
    """Return the fraction of the peak learning rate at a step, counted from 0: linear up, cosine down to a fraction."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def build_scheduler(engine: Engine, step: int, warmup_steps: int, total_steps: int) -> LambdaLR:
    """Return the schedule positioned at `step`; it depends only on the step, so a resume needs no other state."""
    optimizer = engine.optimizer.optim
    for group in optimizer.param_groups:
        group["initial_lr"] = engine.job.optimization.lr
    ratio = engine.job.optimization.min_lr_ratio
    schedule = partial(cosine_with_warmup, warmup_steps=warmup_steps, total_steps=total_steps, min_ratio=ratio)
    return LambdaLR(optimizer, schedule, last_epoch=step - 1)
