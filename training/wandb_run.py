"""A run's metrics in Weights & Biases, an optional package, beside TensorBoard and metrics.jsonl."""

import hashlib
import importlib
import importlib.util
from pathlib import Path
from typing import Any

from runtime.console import first_line, say

PACKAGE = "wandb"
LONGEST_NAME, FORBIDDEN = 128, set("/\\#?%:")  # of a project (wandb.Settings)
OFFLINE = "WANDB_MODE=offline keeps them in files, for `wandb sync`"


def wandb_problems(project: str | None) -> list[str]:
    """Return a line if W&B would refuse the project's name, or if the package is not installed."""
    if project is None:
        return []
    if not project.strip() or len(project) > LONGEST_NAME or set(project) & FORBIDDEN:
        letters = " ".join(sorted(FORBIDDEN))
        return [f"--wandb: {project!r} is not a project of W&B; give 1 to {LONGEST_NAME} letters, none of {letters}"]
    if importlib.util.find_spec(PACKAGE):
        return []
    return ["--wandb: the package wandb is not installed; install it with `pip install wandb`, or leave the flag out"]


class WandbRun:
    """A run of W&B, which a resume continues. If W&B fails, a line says so and training goes on without it."""

    def __init__(self, project: str, name: str, folder: Path, started: float, settings: dict[str, Any]):
        """
        Args:
            folder: for W&B's own files.
            started: seconds since 1970 at the run's first start, which identify it.
            settings: flags, as hyperparameters.
        """
        self.run: Any = None
        try:
            wandb = importlib.import_module(PACKAGE)
            self.run = wandb.init(
                project=project,
                name=name,
                id=hashlib.sha256(repr(started).encode()).hexdigest()[:12],
                dir=folder,
                resume="allow",
                config=settings,
                # It logs neither output nor the machine nor sources, which may hold secrets.
                settings=wandb.Settings(
                    silent=True,
                    console="off",
                    disable_git=True,
                    save_code=False,
                    x_disable_stats=True,
                    x_disable_meta=True,
                ),
            )
            self.run.define_metric("*", step_metric="step")  # a resume repeats steps, which W&B's own count must not
        except Exception as error:  # of many kinds, such as no login and no network
            self._give_up(error)

    def log(self, values: dict[str, Any]) -> None:
        """Log the metrics of a step."""
        if self.run is not None:
            try:
                self.run.log({name: value for name, value in values.items() if value is not None})
            except Exception as error:
                self._give_up(error)

    def close(self) -> None:
        """Write what is left, and wait until it is sent."""
        if self.run is not None:
            try:
                self.run.finish()
            except Exception as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self.run = None
        say(f"--wandb: metrics do not reach W&B ({first_line(error)}); training goes on without it. {OFFLINE}")
