"""Comparison of an uninterrupted run with its resume, and changes of pretrain.py for tests of both."""

import json
from pathlib import Path

TIMES = {  # metrics that vary between runs
    *("tokens_per_second", "tflops", "mfu", "data_wait", "memory_gb", "hours", "goodput"),
    *("slowest_rank", "rank_spread", "waiting"),
}

# Writes the first micro-batch of each step to a file.
RECORD = """
import json
forward_backward = training.loop.forward_backward
def record(engine, micro_batches, *args):
    with open({path!r}, "a") as file:
        print(json.dumps(torch.cat([batch["input_ids"] for batch in micro_batches]).tolist()), file=file)
    return forward_backward(engine, micro_batches, *args)
import torch
training.loop.forward_backward = record
"""

# Sends a signal to one rank after a step is logged.
SIGNAL = """
log = metrics.Metrics.log
def log_and_signal(self, values):
    log(self, values)
    if values["step"] == {step} and console.rank() == {rank}:
        os.kill(os.getpid(), signal.{name})
metrics.Metrics.log = log_and_signal
"""


def curve(run, after: int = 0) -> list[dict]:
    """Return the metrics of each step after `after` that two equal runs share exactly."""
    rows = [{key: value for key, value in row.items() if key not in TIMES} for row in run.metrics]
    return [row for row in rows if row["step"] > after]


def states_of(checkpoint: Path) -> dict:
    """Return the saved states that two equal runs share."""
    states = json.loads((checkpoint / "running_states.json").read_text())
    return {name: value for name, value in states.items() if name not in ("started", "spent")}
