"""Steps whose loss or gradient norm spikes: found, and left out of the training."""

import math
import statistics
from dataclasses import dataclass

WINDOW = 128  # steps


@dataclass(frozen=True)
class SpikeRule:
    """The rule by which a step is skipped: OLMo-core's (SkipStepOptimizer, src/olmo_core/optim/skip_step_optimizer.py).

    It compares the loss and the gradient norm with their mean over the last WINDOW steps, in standard deviations. As
    there, it needs half a window to begin, and skipped steps enter the window too: they raise mean and deviation, so a
    lasting change of level is soon accepted. Unlike there, a value far below the mean is no spike, and an infinite one
    ends the run.

    Attributes:
        skip_spikes: standard deviations above the mean; None: no step is skipped.
    """

    skip_spikes: float | None = None

    def problems(self) -> list[str]:
        """Return a line if the number is too small."""
        if self.skip_spikes is None or 1 <= self.skip_spikes < math.inf:
            return []
        return [f"--skip_spikes: must be at least 1 standard deviation, not {self.skip_spikes}; OLMo uses 6"]

    def spikes(self, window: list[list[float]], loss: float, grad_norm: float) -> bool:
        """Return True if a step is to be skipped.

        Args:
            window: loss and gradient norm of each of the last steps; see `remember`.
        """
        if self.skip_spikes is None or len(window) < WINDOW // 2:
            return False
        return any(
            statistics.fmean(before) + self.skip_spikes * statistics.stdev(before) < value < math.inf
            for value, before in zip((loss, grad_norm), zip(*window, strict=True), strict=True)
        )


def remember(window: list[list[float]], loss: float, grad_norm: float) -> None:
    """Add a step to the window, and drop the oldest if it is full."""
    window.append([loss, grad_norm])
    del window[:-WINDOW]
