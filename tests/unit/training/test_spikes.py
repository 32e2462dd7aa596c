"""The rule that finds spikes, compared with NumPy's mean and standard deviation."""

import numpy as np
import pytest

from runs import problems_of
from training.spikes import WINDOW, SpikeRule, remember


def window_of(steps: int, level: float = 1.0) -> list[list[float]]:
    chance, window = np.random.default_rng(0), []
    for loss, norm in chance.normal(level, 0.1, (steps, 2)).tolist():
        remember(window, loss, norm)
    return window


class TestSpikeRule:
    @pytest.mark.parametrize("column", [0, 1])
    def test_a_value_above_the_bound_is_a_spike(self, column):
        window = window_of(1000)
        assert len(window) == WINDOW == 128
        means, deviations = np.mean(window, axis=0), np.std(window, axis=0, ddof=1)
        for sigmas, expected in ((5.999, False), (6.001, True), (-100.0, False)):
            values = means.copy()
            values[column] += sigmas * deviations[column]
            assert SpikeRule(6).spikes(window, *values) is expected

    def test_without_the_flag_or_half_a_window_none_is(self):
        assert not SpikeRule().spikes(window_of(200), 1e9, 1e9)
        assert not SpikeRule(6).spikes(window_of(63), 1e9, 1e9)
        assert SpikeRule(6).spikes(window_of(64), 1e9, 1.0)

    def test_an_infinite_value_is_none_since_it_ends_the_run(self):
        assert not SpikeRule(6).spikes(window_of(128), 1.0, float("inf"))

    @pytest.mark.parametrize(("sigmas", "skips"), [(6, 4), (3, 13)])
    def test_a_lasting_change_of_level_is_accepted(self, sigmas, skips):
        """After k of n steps at the new level it is sqrt((n - k) / k) deviations above the mean: k < n / (1 + s^2)."""
        window, skipped = window_of(200), 0
        for loss, norm in window_of(100, level=1000.0):
            skipped += SpikeRule(sigmas).spikes(window, loss, norm)
            remember(window, loss, norm)
        assert skipped == pytest.approx(skips, abs=1)

    @pytest.mark.parametrize("value", ["0", "-6", "0.5", "nan"])
    def test_a_bound_that_would_skip_half_of_all_steps_is_refused(self, value):
        (problem,) = problems_of(f"--skip_spikes {value}")
        assert problem.startswith("--skip_spikes: must be at least 1 standard deviation, not ")
