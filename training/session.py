"""A run of pretrain.py or finetune.py, from its plan to its final model."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from checkpointing.folder import LATEST, check_model
from checkpointing.pretrained import Pretrained, load_pretrained
from checkpointing.reader import is_whole, load_checkpoint
from checkpointing.writer import CheckpointWriter
from data_utils import MixtureDataset, TrainingData
from engine.boost import Engine, boost
from engine.launch import launch, shut_down
from engine.shards import initialize_weights
from runtime.collectives import on_rank_zero
from runtime.console import say
from runtime.process import INTERRUPTED, StopRequest
from training.batches import Batches, build_dataloader
from training.evaluation import MapDataset, evaluation_loader
from training.folders import claim_folders, resume_together
from training.inspection import Inspector
from training.loop import open_metrics, train
from training.plan import Plan, check_agreement, make_plan
from training.run import Run, TrainState
from training.task_evaluator import TaskEvaluator

GENERATE = Path("scripts", "generate.py")


def execute(
    run: Run,
    plan: Plan,
    state: TrainState,
    checkpoint: Path | None,
    data: tuple[Sequence[TrainingData], Sequence[Mapping[str, MapDataset]]],
    pretrained: Pretrained | None,
    export: Callable[[Path, Path], None],
) -> int:
    """Launch the ranks, build the model, train and export; return the exit status of the run.

    Args:
        checkpoint: the checkpoint to resume from, if any.
        data: for each stage, the training data, and the held-out data by name: "" if there are no others.
        pretrained: the initial weights, or those under the adapters; None: random ones.
        export: exports a checkpoint to a folder; called on rank 0.
    """
    datasets, held_out = data
    outputs = run.outputs
    claim_folders(outputs, state, checkpoint)
    launch(run.job.seed, run.job.compute.deterministic)
    check_agreement(outputs.save_dir, state, checkpoint, run.job.exchange.exchange)
    while checkpoint and not is_whole(checkpoint, outputs.load == LATEST):
        state, checkpoint = resume_together(outputs)
        if checkpoint:
            check_model(checkpoint / "model", run.job.config, "--load")
        plan = make_plan(run, datasets, state)
    tasks = TaskEvaluator(run.tasks, run.retention, outputs, plan.total_steps, state.step)
    if checkpoint and state.step >= plan.total_steps and not state.unevaluated:
        say(f"nothing is left to train: {checkpoint} is the end of the run; raise --max_steps or --num_epochs to go on")
        status = _conclude(outputs.save_dir, checkpoint, export, interrupted=False)
        if tasks.pending:
            tasks.take_over(open_metrics(run, plan, state), StopRequest())
            tasks.finish()
        return status
    with Inspector(run.inspection, outputs.tensorboard_dir) as inspector:
        engine = boost(run.job)
        writer = CheckpointWriter(outputs.save_dir, engine, run.retention, latest=checkpoint, completed=tasks.begin)
        if any(plan.saves_after(step, run.retention) for step in range(state.step + 1, plan.total_steps)):
            writer.allocate()  # while the weights are loaded, the first batches read, and the model compiled
        set_weights(engine, checkpoint, pretrained)
        if checkpoint:
            say(f"resumed: {checkpoint}, {state.tokens:,} tokens trained")
        if state.stream is not None:
            plan.legs[0].dataset.resume(state.stream)  # type: ignore[attr-defined]  # only streams have it
        loaders, evaluation = [], {}
        for leg in plan.legs:
            loaders.append((build_dataloader(engine, run, plan, leg), leg.batch.accumulation_steps, leg.steps))
            parts = held_out[leg.number].items()
            evaluation[leg.number] = {name: evaluation_loader(engine, part, leg.batch) for name, part in parts}
        batches = Batches(loaders, plan.layout)
        last, interrupted = train(engine, run, plan, state, batches, evaluation, writer, inspector, tasks)
    if isinstance(dataset := plan.leg_at(state.step - 1).dataset, MixtureDataset):
        say(f"epochs: {dataset.epochs(state.sequences)}")
    status = _conclude(outputs.save_dir, last, export, interrupted)
    shut_down(engine.plugin)
    tasks.finish(interrupted)
    return status


def set_weights(engine: Engine, checkpoint: Path | None, pretrained: Pretrained | None, newest: bool = False) -> None:
    """Load the weights of a checkpoint or of a pretrained model, or initialize them. Collective.

    Adapters need two sources: the frozen weights are the pretrained model's, the adapters a checkpoint's or initial.
    """
    adapted = engine.job.adapters is not None
    if pretrained and (adapted or not checkpoint):
        load_pretrained(pretrained, engine)
    if checkpoint:
        load_checkpoint(checkpoint, engine)
    elif adapted or not pretrained:
        initialize_weights(engine)


def _conclude(save_dir: Path, checkpoint: Path, export: Callable[[Path, Path], None], interrupted: bool) -> int:
    """Export the last checkpoint to the folder `final`, and print the next command to run. Collective."""
    final = save_dir / "final"
    on_rank_zero(
        lambda: export(checkpoint, final), f"{final} could not be made from {checkpoint}; make room and resume"
    )
    say(f"model: {final}, for AutoModelForCausalLM and AutoTokenizer")
    if interrupted:
        say(f"interrupted: run the same command with -f latest to continue from {checkpoint}")
    else:
        say(f'try it: {shlex.join(["python", str(GENERATE), "--model", str(final), "--prompt"])} "Once upon a time"')
    return INTERRUPTED if interrupted else 0
