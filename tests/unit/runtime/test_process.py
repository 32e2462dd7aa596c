"""Signals that end a run."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runtime.process import KEYBOARD_INTERRUPT, StopRequest

ROOT = Path(__file__).resolve().parents[3]


class TestStopRequest:
    @pytest.fixture(autouse=True)
    def _handlers(self):
        numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        before = [signal.getsignal(number) for number in numbers]
        yield
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
    def test_is_set_by_a_signal(self, number):
        stop = StopRequest()
        assert not stop.received
        os.kill(os.getpid(), number)
        assert stop.received

    @pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
    def test_an_interrupt_after_a_signal_ends_the_process_in_a_call_into_c_too(self, first):
        lock_twice = (
            "lock = ctypes.create_string_buffer(64); [ctypes.CDLL(None).pthread_mutex_lock(lock) for _ in 'ab']"
        )
        stop = "import ctypes; from runtime import process; process.StopRequest()"
        with program(f"{stop}; print('ready', flush=True); {lock_twice}") as run:
            assert run.stdout.readline() == "ready\n"
            run.send_signal(first)
            time.sleep(0.2)
            assert run.poll() is None
            run.send_signal(signal.SIGINT)
            assert run.wait(timeout=60) == KEYBOARD_INTERRUPT

    @pytest.mark.parametrize("ignored", [True, False])
    def test_hang_up_is_ignored_where_it_was(self, ignored):
        """As under nohup."""
        before = "signal.signal(signal.SIGHUP, signal.SIG_IGN);" if ignored else ""
        hang_up = "stop = process.StopRequest(); os.kill(os.getpid(), signal.SIGHUP); print(stop.received)"
        with program(f"import os, signal; from runtime import process; {before} {hang_up}") as run:
            assert run.stdout.read() == f"{not ignored}\n"


@contextlib.contextmanager
def program(code):
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()
