"""A training run as the user requests it, and its state, which checkpoints keep."""

import copy
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from attn import select_attention
from checkpointing.adapters import Lora
from checkpointing.writer import Retention
from engine.job import Job
from runtime.console import below
from runtime.files import is_plain_name
from training.inspection import Inspection
from training.left_out import Range
from training.schedule import DECAY_RATIO, EXTENDED, SHAPES, WSD, Curve, Schedule
from training.spikes import SpikeRule
from training.stages import Stages
from training.tasks import Tasks
from training.wandb_run import wandb_problems

WARMUP_RATIO = 0.03  # of the steps, in fine-tuning


@dataclass(frozen=True)
class Length:
    """The length of a run and of its warm-up."""

    num_epochs: int = 1
    max_steps: int | None = None  # None: to the end of the data
    warmup_steps: int | None = None  # None: WARMUP_RATIO of the run
    warmup_given: bool = False  # True if it is on the command line

    def problems(self) -> list[str]:
        """Return a line for each number that is too small."""
        return below(1, num_epochs=self.num_epochs, max_steps=self.max_steps) + below(0, warmup_steps=self.warmup_steps)


@dataclass(frozen=True)
class Outputs:
    """Folders and intervals of a run's results, and the checkpoint to resume from."""

    save_dir: Path = Path("checkpoint")
    tensorboard_dir: Path = Path("tb_logs")
    run_name: str | None = None  # a folder of its own in --tensorboard_dir, which `tensorboard_dir` already includes
    wandb: str | None = None  # project
    log_interval: int = 10  # steps
    eval_interval: int = 1000  # steps
    eval_first: bool = False  # evaluate before the first step too
    load: str | None = None  # a checkpoint, or `latest`
    allow_changes: bool = False  # resume although data, seed, recipe or length have changed
    hang_timeout: int | None = None  # seconds without progress after which a run ends; 0: never; None: as it needs
    skip_data: tuple[int, int] | None = None  # first and last of the steps whose sequences are left out

    def problems(self) -> list[str]:
        """Return a line for each number that is too small, and for a flag without effect."""
        problems = below(1, log_interval=self.log_interval, eval_interval=self.eval_interval)
        problems += below(0, hang_timeout=self.hang_timeout) + wandb_problems(self.wandb)
        if self.run_name is not None and not is_plain_name(self.run_name):
            problems.append(f"--run_name: {self.run_name!r} is not a name for a folder; give one without slashes")
        for name in ("allow_changes", "skip_data"):
            if getattr(self, name) and not self.load:
                problems.append(f"--{name}: takes effect only with --load; give that too, or leave it out")
        return problems


@dataclass(frozen=True)
class Run:
    """A training run as the user requests it."""

    model: str  # name, for messages
    job: Job
    length: Length = field(default_factory=Length)
    outputs: Outputs = field(default_factory=Outputs)
    retention: Retention = field(default_factory=Retention)
    schedule: Schedule = field(default_factory=Schedule)
    spikes: SpikeRule = field(default_factory=SpikeRule)
    inspection: Inspection = field(default_factory=Inspection)
    tasks: Tasks = field(default_factory=Tasks)
    lora: Lora | None = None  # None: a program without adapters
    num_workers: int = 1  # loader processes per rank
    flags: dict[str, Any] = field(default_factory=dict)  # all flags, for TensorBoard
    stages: Stages = field(default_factory=Stages)

    def settings(self, curve: Curve) -> dict[str, Any]:
        """Return the flags that a resume must not change unnoticed; `make_plan` adds the data."""
        optimization = self.job.optimization
        return {
            "seed": self.job.seed,
            "max_length": self.job.batch.max_length,
            "lr": optimization.lr,
            "weight_decay": optimization.weight_decay,
            "gradient_clipping": optimization.gradient_clipping,
            "adam_betas": list(optimization.adam_betas),
            "adam_eps": optimization.adam_eps,
            "deterministic": self.job.compute.deterministic,
            **asdict(self.spikes),
            **curve.settings,
            **(self.lora.settings if self.lora else {}),
        }

    def curve(self, total_steps: int, before: dict[str, Any]) -> Curve:
        """Return the learning rate of a run of this many steps.

        Args:
            before: settings of the checkpoint, if there is one. A run that is made longer keeps its warm-up.
        """
        warmup_steps, schedule = self.length.warmup_steps, self.schedule
        if warmup_steps is None and schedule.lr_schedule in EXTENDED:
            warmup_steps = before.get("warmup_steps")
        if warmup_steps is None:
            warmup_steps = math.ceil(WARMUP_RATIO * total_steps)
        decay_steps = schedule.decay_steps
        if schedule.lr_schedule == WSD and decay_steps is None:
            decay_steps = math.ceil(DECAY_RATIO * total_steps)
        return Curve(
            warmup_steps,
            total_steps,
            self.job.optimization.min_lr_ratio,
            schedule.lr_schedule,
            decay_steps,
            schedule.decay_shape or SHAPES[0],
        )

    def problems(self) -> list[str]:
        """Return a line for each mistake in the flags other than the job's."""
        return (
            self.length.problems()
            + self.schedule.problems()
            + self.spikes.problems()
            + self.inspection.problems()
            + self.outputs.problems()
            + self.retention.problems()
            + self.tasks.problems(self.retention)
            + self.stages.problems(self.schedule, self.length.max_steps, self.length.num_epochs)
            + below(0, num_workers=self.num_workers)
        )


@dataclass
class TrainState:
    """The state of a run besides weights and optimizer; checkpoints save it as a whole."""

    epoch: int = 0
    step: int = 0  # optimizer steps since the start of training
    sequences: int = 0  # trained on, over all ranks and epochs: the position in the global order
    tokens: int = 0
    skipped_steps: int = 0  # that updated nothing: fp16 gradients overflowed, no label counted, or --skip_spikes
    settings: dict[str, Any] = field(default_factory=dict)  # a resume must not change them unnoticed
    stream: dict[str, Any] | None = None  # position in a data set that is streamed
    unevaluated: dict[str, Any] | None = None  # the last step's metrics, if a signal interrupted its evaluation
    global_batch: int = 0  # sequences in the last step; 0 in older checkpoints
    fp8: str = ""  # recipe with which the last step multiplied in float8
    spikes: int = 0  # of the skipped steps, those that --skip_spikes skipped
    window: list[list[float]] = field(default_factory=list)  # loss and gradient norm of each of the last steps
    left_out: dict[str, Range] = field(default_factory=dict)  # ranges of the global order, by steps (--skip_data)
    started: float = 0.0  # seconds since 1970 at the run's first start; 0 in older checkpoints
    spent: dict[str, float] = field(default_factory=dict)  # seconds, by purpose; see `training.goodput`
    mixture: dict[str, Any] | None = None  # of several data sets; see `MixtureDataset.settle`

    @property
    def adam_steps(self) -> int:
        """The number of updates, for Adam's bias correction."""
        return self.step - self.skipped_steps

    def saved(self) -> dict[str, Any]:
        """Return the state as a checkpoint holds it."""
        return asdict(self) | {"adam_steps": self.adam_steps}


def complete(run: Run, tokenizer: PreTrainedTokenizerBase, inside_documents: bool) -> tuple[Run, str]:
    """Return the run with the model's configuration as it is trained and saved, and a line on its attention.

    Args:
        inside_documents: attention stays inside each document of a sequence (see `select_attention`).
    """
    job, config = run.job, copy.deepcopy(run.job.config)
    config.torch_dtype = job.dtype
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    compute = job.compute
    attention = select_attention(
        config, compute.flash_attention, job.layout.sp > 1, inside_documents, compute.deterministic
    )
    return replace(run, job=replace(job, config=config)), attention
