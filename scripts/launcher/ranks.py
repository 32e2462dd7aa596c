"""A host's side of a run: torchrun's agent in this process, and its ranks as children."""

import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time

import psutil

from runtime.process import HUNG
from scripts.launcher.hosts import CONNECTION_LOST, HUNG_HERE, RUN, how_it_ended, say

STOP, END, KILL = "stop", "end", "kill"  # orders to a host's ranks: save a checkpoint and end; end; end at once
BEAT = "beat"  # no order, but a sign that the launcher can still reach this host
BEAT_SECONDS = 10
# Without a beat for as long, a launcher that restarts runs will lose its connection (see SSH_OPTIONS) and start another
# attempt, maybe on other hosts; the ranks here must have ended by then.
SILENCE_SECONDS, LAST_SECONDS = 40, 15
KILL_SECONDS = 30  # between SIGTERM and SIGKILL to ranks that have to end
SAVE_SECONDS = 1800  # once the launcher is gone: for the ranks to save and end


class Ranks:
    """A host's side of the run: torchrun's agent in this process, and its ranks as children.

    The launcher's orders arrive on standard input, which closes when the launcher is gone. Ranks get an empty one.
    """

    def __init__(self) -> None:
        self.words = os.fdopen(os.dup(sys.stdin.fileno()))
        self.heard, self.silence = time.monotonic(), False
        with open(os.devnull) as nothing:
            os.dup2(nothing.fileno(), sys.stdin.fileno())

    def run(self) -> int:
        status = self._run()
        if not self.silence:
            return status
        say(f"no word from the launcher for {SILENCE_SECONDS} s, so the ranks here had to end")
        return CONNECTION_LOST

    def _run(self) -> int:
        order = json.loads(self.words.readline())
        os.chdir(order["folder"])
        # Otherwise torch warns about every connection to an address without a name.
        os.environ.update({"TORCH_CPP_LOG_LEVEL": "ERROR", **order["environment"], RUN: order["run"]})
        _kill_leftovers(order["run"])
        from torch.distributed.elastic.multiprocessing.api import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.run import parse_args, run

        # Its lines on each signal that it sends would hide the reason of the failure.
        logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
        threading.Thread(target=self._obey, daemon=True).start()
        if order["restarted"]:
            threading.Thread(target=self._notice_silence, daemon=True).start()
        try:
            options = parse_args(order["command"][1:])
            if options.nproc_per_node != "1":
                os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun sets it, with a four-line warning
            run(options)
        except ChildFailedError as error:
            number, failure = error.get_first_failure()
            reasons = failure.message["message"] if isinstance(failure.message, dict) else ""  # see runtime/process.py
            for reason in reasons.splitlines() or [""]:
                say(f"rank {number} {how_it_ended(failure.exitcode)}" + (f": {reason}" if reason else ""))
            killed = any(other.exitcode == -signal.SIGKILL for other in error.failures.values())
            if failure.exitcode == HUNG and killed:  # by a neighbour, since it did not answer (see runtime/watchdog.py)
                return HUNG_HERE
            return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
        except SignalException as error:
            return 128 + error.sigval
        return 0

    def _obey(self) -> None:
        for line in self.words:
            self.heard = time.monotonic()
            if (word := line.strip()) != BEAT:
                self._end({STOP: None, END: KILL_SECONDS, KILL: 0}[word])
        self._end(SAVE_SECONDS)

    def _notice_silence(self) -> None:
        while time.monotonic() < self.heard + SILENCE_SECONDS:
            time.sleep(1)
        self.silence = True
        self._end(LAST_SECONDS)

    def _end(self, seconds: float | None) -> None:
        """Send SIGTERM to the ranks, and SIGKILL after `seconds`; None: never."""
        ranks = psutil.Process().children()
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.terminate()
        if not ranks:
            os.kill(os.getpid(), signal.SIGTERM)  # the agent still waits for the other hosts
        if seconds is not None:
            timer = threading.Timer(seconds, self._kill)
            timer.daemon = True
            timer.start()

    @staticmethod
    def _kill() -> None:
        for rank in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.kill()
        time.sleep(5)  # for torchrun's agent to report the ranks
        os._exit(128 + signal.SIGKILL)


def _kill_leftovers(run: str) -> None:
    """Kill what an earlier attempt of this run has left, as when the launcher lost its connection to this host."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get(RUN) == run:
                process.kill()
