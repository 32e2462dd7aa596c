"""The seed of a training step."""

from training.loop import step_seed


def test_every_seed_step_and_rank_has_its_own(monkeypatch):
    seeds = set()
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        seeds |= {step_seed(seed, step) for seed in range(3) for step in range(3)}
    assert len(seeds) == 27
    assert {step_seed(seed, step) for seed in range(3) for step in range(3)} < seeds  # depends on nothing else
