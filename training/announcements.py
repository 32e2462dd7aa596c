"""Lines that a run prints before it begins: its model, data, batch and length, its stages, and its learning rates."""

from data_utils import MixtureDataset
from engine import float8
from engine.layout import describe_layout
from model_utils import count_parameters
from runtime.console import say
from training.left_out import sequences_between
from training.legs import describe
from training.plan import Plan
from training.run import Run


def say_schedule(plan: Plan, lr: float) -> None:
    """Print the learning rate at each tenth of the run, of its peak `lr`."""
    steps = [plan.total_steps * tenth // 10 for tenth in range(10)] + [plan.total_steps - 1]
    rates = " ".join(f"{lr * plan.curve(step):.2e}" for step in steps)
    say(f"learning rate ({plan.curve.lr_schedule}) from 0 to 100% of the run: {rates}")


def announce(run: Run, plan: Plan, attention: str, on_gpu: bool) -> None:
    """Print the model, data, layout, batch and length of the run, and its stages, on rank 0."""
    job, max_steps, leg = run.job, run.length.max_steps, plan.legs[0]
    parameters = count_parameters(job.config)
    say(f"model: {run.model}, {parameters:,} parameters, {float8.describe(job, on_gpu)}; {attention}")
    say(f"data: {leg.dataset.description}")
    say(describe_layout(plan.layout))
    say(
        f"global batch: {leg.batch.batch_size} x {leg.batch.accumulation_steps} accumulated x "
        f"{plan.layout.dp} data-parallel = "
        f"{leg.global_batch} sequences x {leg.dataset.mean_length:.0f} tokens = {leg.tokens_per_step:,} tokens"
    )
    if run.tasks.eval_tasks:
        say(f"tasks: {run.tasks.describe(run.retention)}")
    done = f"; {plan.trained_steps:,} steps, {plan.trained_tokens:,} tokens are done" if plan.trained_steps else ""
    say(f"length: {plan.total_steps:,} optimizer steps, {plan.total_tokens:,} tokens{done}")
    if run.stages.later:
        for line in stage_lines(plan, job.optimization.lr):
            say(line)
        return
    if max_steps and plan.total_steps < max_steps:
        say(f"--max_steps: the data end before step {max_steps:,}; {plan.flags_for(max_steps)} reaches it")
    if isinstance(leg.dataset, MixtureDataset):
        say(f"epochs at the end of the run: {leg.dataset.epochs(plan.sequences_at(plan.total_steps))}")
    rest = sequences_between(plan.sequences_at(plan.total_steps), plan.total_sequences, plan.left_out)
    if 0 < rest < plan.global_batch:
        say(f"left out: the last {rest:,} of {plan.total_sequences:,} sequences, too few for one more step")


def stage_lines(plan: Plan, lr: float) -> list[str]:
    """Return lines on the stages that are left, for people; `lr` is the peak learning rate."""
    lines = []
    for before, leg in zip([None, *plan.legs], plan.legs, strict=False):
        if leg.steps:
            rates = lr * plan.curve(leg.first_step), lr * plan.curve(leg.stop - 1)
            lines += describe(leg, before, plan.sequences_at(leg.stop), rates, plan.layout.dp)
    return lines
