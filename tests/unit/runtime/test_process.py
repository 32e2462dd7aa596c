"""Exit statuses, error reports and signals of real programs."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
from torch.distributed import TCPStore
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from launching import ROOT, free_port
from programs import main_program, program, run_main, run_program
from runtime.process import INTERRUPTED, KEYBOARD_INTERRUPT, READER_GONE, RUN_FAILED, USAGE_ERROR, StopRequest

pytestmark = pytest.mark.slow


@contextlib.contextmanager
def started(code, **environment):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(**program(code, **environment), **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


class TestPrepare:
    @pytest.mark.parametrize("error", ["KeyboardInterrupt", "ImportError('scipy') from KeyboardInterrupt()"])
    def test_ctrl_c_while_libraries_are_imported(self, error):
        done = run_program(f"from runtime import process\nprocess.prepare()\nraise {error}")
        assert (done.returncode, done.stdout, done.stderr) == (KEYBOARD_INTERRUPT, "", "")

    def test_other_errors_have_a_traceback(self):
        done = run_program("from runtime import process\nprocess.prepare()\nimport no_such_module")
        assert done.returncode == 1
        assert "ModuleNotFoundError" in done.stderr


class TestRun:
    @pytest.mark.parametrize("status", [0, 3, INTERRUPTED])
    def test_status_of_main(self, status):
        done = run_main(f"print('unflushed', end=''); return {status}")
        assert (done.returncode, done.stdout, done.stderr) == (status, "unflushed", "")

    def test_input_error_is_a_line_per_problem(self):
        done = run_main("raise InputError('--lr: -1 is bad', '--batch_size: 0 is bad')")
        assert (done.returncode, done.stdout) == (USAGE_ERROR, "")
        assert done.stderr == "train.py: error: --lr: -1 is bad\ntrain.py: error: --batch_size: 0 is bad\n"

    def test_run_error_is_one_message(self):
        done = run_main("raise RunError('loss nan at step 7')")
        assert (done.returncode, done.stderr) == (RUN_FAILED, "train.py: loss nan at step 7\n")

    @pytest.mark.parametrize("rank", ["0", "1"])
    def test_any_other_error_is_a_traceback_on_every_rank(self, rank):
        done = run_main("raise ZeroDivisionError('why')", RANK=rank)
        assert done.returncode == RUN_FAILED
        assert done.stderr.startswith("Traceback")
        assert done.stderr.endswith("ZeroDivisionError: why\n")

    @pytest.mark.parametrize(
        ("statement", "reason", "trace"),
        [
            ("raise InputError('--lr: x', '--b: y')", "train.py: error: --lr: x\ntrain.py: error: --b: y", None),
            ("raise RunError('loss nan at step 7')", "train.py: loss nan at step 7", None),
            ("raise ZeroDivisionError('why')", "ZeroDivisionError: why", "ZeroDivisionError: why\n"),
            (f"return {INTERRUPTED}", "train.py: a signal ended the run after its checkpoint was saved", None),
        ],
    )
    def test_torchrun_reads_why_a_rank_ended(self, tmp_path, statement, reason, trace):
        """torch's own class reads the file, as torchrun does."""
        path = tmp_path / "error.json"
        run_main(statement, TORCHELASTIC_ERROR_FILE=str(path))
        failure = ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=str(path))
        assert failure.message["message"] == reason
        assert failure.message["extraInfo"]["py_callstack"].endswith(trace or reason)

    def test_an_end_that_another_rank_caused_counts_as_later(self, tmp_path):
        """torchrun names the earliest end, in whole seconds, as the root cause."""
        path = tmp_path / "error.json"
        run_main("raise RuntimeError('Connection closed by peer [192.0.2.1]:1')", TORCHELASTIC_ERROR_FILE=str(path))
        assert ProcessFailure(0, 1, 1, error_file=str(path)).timestamp > path.stat().st_mtime

    def test_variable_that_is_no_number(self):
        done = run_main("return 0", RANK="one")
        assert done.returncode == USAGE_ERROR
        assert done.stderr == "train.py: error: RANK: 'one' is not a number; unset it\n"

    @pytest.mark.parametrize("unbuffered", ["", "1"])  # alone, and under torchrun
    def test_a_reader_that_goes_ends_the_program_silently(self, unbuffered):
        code = main_program("for _ in range(100000): console.say('a line')")
        with started(code, PYTHONUNBUFFERED=unbuffered) as process:
            process.stdout.readline()
            process.stdout.close()
            assert process.wait(timeout=60) == READER_GONE
            assert process.stderr.read() == ""

    def test_another_broken_pipe_is_an_ordinary_error(self):
        done = run_main("raise BrokenPipeError('a socket')")
        assert done.returncode == RUN_FAILED
        assert done.stderr.endswith("BrokenPipeError: a socket\n")

    @pytest.mark.parametrize(
        "text", ["Connection closed by peer [192.0.2.1]:27113", "Read error [::ffff:192.0.2.1]:52930: Connection reset"]
    )
    def test_a_lost_peer_is_a_line_that_names_it(self, text):
        done = run_main(f"raise RuntimeError('[pair.cc:547] {text}')", RANK="3")
        expected = "train.py: rank 3 lost the connection to 192.0.2.1: a rank there has ended; see its own message\n"
        assert (done.returncode, done.stderr) == (RUN_FAILED, expected)

    def test_help_exits_as_argparse_does(self):
        done = run_main("import sys; sys.exit(0)")
        assert (done.returncode, done.stderr) == (0, "")

    def test_success_does_not_wait_for_threads_or_finalizers(self):
        done = run_main(
            """
            import atexit, threading, time
            atexit.register(print, "finalized")
            threading.Thread(target=time.sleep, args=(300,)).start()
            return 0
            """
        )
        assert (done.returncode, done.stdout) == (0, "")


class TestReportsOfSeveralRanks:
    @pytest.fixture
    def store(self):
        """The variables that lead to a store as torchrun keeps it, and a function that ends it."""
        port = free_port()
        kept = [TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)]
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        return place, kept.clear

    def test_other_ranks_are_silent_and_end_alike(self, store):
        """They read in the store that rank 0 has printed it. Without a store, two lines are better than none."""
        place, _ = store
        first, second = ({"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": "2"} | place for number in "01")
        assert run_main("raise InputError('x')", **first).returncode == USAGE_ERROR
        done = run_main("raise InputError('x')", **second)
        assert (done.returncode, done.stdout, done.stderr) == (USAGE_ERROR, "", "")
        done = run_main("raise InputError('x')", **second | {"MASTER_PORT": "9"})
        assert (done.returncode, done.stderr[-4:]) == (USAGE_ERROR, ": x\n")

    def test_a_rank_that_no_launcher_describes_is_not_silent(self):
        done = run_main("raise InputError('x')", RANK="1")
        assert (done.returncode, done.stderr) == (USAGE_ERROR, "train.py: error: x\n")

    def test_a_node_prints_what_rank_0_does_not(self, store):
        """Ranks 2 and 3 are on the second node."""
        place, stop = store

        def stderr(number, problem):
            variables = {"RANK": number, "LOCAL_RANK": str(int(number) % 2), "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
            return run_main(f"raise InputError({problem!r})", **variables | place).stderr

        problem = "--tokenizer: no folder there"
        expected = f"train.py: error: on {socket.gethostname()}: {problem}\n"
        assert stderr("2", problem) == expected
        assert stderr("3", problem) == ""
        assert stderr("3", "a shard is damaged").endswith(": a shard is damaged\n")
        assert stderr("0", problem) == f"train.py: error: {problem}\n"
        assert stderr("2", problem) == ""
        stop()
        assert stderr("2", problem) == expected


def test_ranks_end_with_their_launcher(tmp_path):
    """SIGKILL ends torchrun, which cannot pass it on."""
    statements = ["import os, time", "from runtime import process", r"os.write(1, b'%d\n' % os.getpid())"]
    (tmp_path / "rank.py").write_text("\n".join([*statements, "process.run(lambda: time.sleep(300), 'rank.py')"]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, tmp_path / "rank.py"], env=environment, stdout=subprocess.PIPE, text=True)
    ranks = [psutil.Process(int(process.stdout.readline())) for _ in range(2)]
    process.kill()
    _, alive = psutil.wait_procs(ranks, timeout=60)
    for rank in alive:
        rank.kill()
    assert not alive


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
    def test_an_interrupt_after_a_signal_ends_the_process_even_in_a_call_into_c(self, first):
        lock_twice = (
            "lock = ctypes.create_string_buffer(64); [ctypes.CDLL(None).pthread_mutex_lock(lock) for _ in 'ab']"
        )
        stop = "import ctypes; from runtime import process; process.StopRequest()"
        with started(f"{stop}; print('ready', flush=True); {lock_twice}") as process:
            assert process.stdout.readline() == "ready\n"
            process.send_signal(first)
            time.sleep(0.2)
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=60) == KEYBOARD_INTERRUPT

    @pytest.mark.parametrize("ignored", [True, False])
    def test_a_hang_up_that_is_ignored_stays_ignored(self, ignored):
        """As under nohup."""
        before = "signal.signal(signal.SIGHUP, signal.SIG_IGN);" if ignored else ""
        hang_up = "stop = process.StopRequest(); os.kill(os.getpid(), signal.SIGHUP); print(stop.received)"
        with started(f"import os, signal; from runtime import process; {before} {hang_up}") as process:
            assert process.stdout.read() == f"{not ignored}\n"
