"""Signals that end a run after a last checkpoint."""

import os
import signal
import threading

from console import KEYBOARD_INTERRUPT, end_with_parent

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
INTERRUPTED = 75  # exit status of a run that a signal ended after its checkpoint was saved (EX_TEMPFAIL)


class StopRequest:
    """Set by any of STOP_SIGNALS on any rank; the ranks agree on it at the next step.

    An interrupt after that ends the process at once. A thread sees to it, since Python's handlers do not run during a
    call into C, such as an exchange with a rank that is gone. A SIGHUP that is ignored, as under nohup, stays so.
    """

    def __init__(self) -> None:
        self.received = False
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._receive)
        numbers, written = os.pipe()
        os.set_blocking(written, False)
        signal.set_wakeup_fd(written, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(numbers,), name="signals", daemon=True).start()

    def __call__(self) -> bool:
        return self.received

    def _receive(self, number: int, frame: object) -> None:
        self.received = True

    def _watch(self, numbers: int) -> None:
        """Reads the number of each signal, which Python writes to a pipe the moment that it comes."""
        stopping = False
        while True:
            number = os.read(numbers, 1)[0]
            if stopping and number == signal.SIGINT:
                os._exit(KEYBOARD_INTERRUPT)
            stopping = stopping or number in STOP_SIGNALS


def follow_rank(worker: int) -> None:
    """Launchers signal a rank's loader processes with it; they are to last until the rank has saved, and no longer."""
    end_with_parent()
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
