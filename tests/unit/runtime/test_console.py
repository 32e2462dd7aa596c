"""Exit statuses and output, of real programs."""

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest
from torch.distributed import TCPStore

from runtime import console
from runtime.process import KEYBOARD_INTERRUPT, READER_GONE, RUN_FAILED

ROOT = Path(__file__).resolve().parents[3]


def run_program(code, **environment):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "", **environment}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def run_main(statements, **environment):
    """A program whose main() consists of `statements`."""
    body = textwrap.indent(textwrap.dedent(statements), "    ")
    imports = "from runtime import console, process\nfrom runtime.console import InputError, RunError"
    code = f"{imports}\ndef main():\n{body}\nprocess.run(main, 'train.py')"
    return run_program(code, **environment)


@pytest.mark.parametrize("error", ["KeyboardInterrupt", "ImportError('scipy') from KeyboardInterrupt()"])
def test_ctrl_c_while_libraries_are_imported(error):
    program = run_program(f"from runtime import process\nprocess.prepare()\nraise {error}")
    assert (program.returncode, program.stdout, program.stderr) == (KEYBOARD_INTERRUPT, "", "")


def test_other_errors_of_imports_have_a_traceback():
    program = run_program("from runtime import process\nprocess.prepare()\nimport no_such_module")
    assert program.returncode == 1
    assert "ModuleNotFoundError" in program.stderr


@pytest.fixture
def store():
    """A store as torchrun keeps it, and the variables that lead to it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    kept = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    yield {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    del kept


class TestRun:
    @pytest.mark.parametrize("status", [0, 3, 75])
    def test_status_of_main(self, status):
        program = run_main(f"print('unflushed', end=''); return {status}")
        assert (program.returncode, program.stdout, program.stderr) == (status, "unflushed", "")

    def test_input_error_is_a_line_a_problem_and_status_2(self):
        program = run_main("raise InputError('--lr: -1 is bad', '--batch_size: 0 is bad')")
        assert program.returncode == 2
        assert program.stdout == ""
        assert program.stderr == "train.py: error: --lr: -1 is bad\ntrain.py: error: --batch_size: 0 is bad\n"

    def test_run_error_is_one_message_and_status_1(self):
        program = run_main("raise RunError('loss nan at step 7')")
        assert (program.returncode, program.stderr) == (1, "train.py: loss nan at step 7\n")

    @pytest.mark.parametrize(("error", "status"), [("InputError('x')", 2)])
    def test_other_ranks_are_silent_and_end_alike(self, error, status, store):
        """They know by the store that rank 0 has said it. Where there is none, rather two lines than no line."""
        first, second = ({"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": "2"} | store for number in "01")
        assert run_main(f"raise {error}", **first).returncode == status
        program = run_main(f"raise {error}", **second)
        assert (program.returncode, program.stdout, program.stderr) == (status, "", "")
        program = run_main(f"raise {error}", **second | {"MASTER_PORT": "9"})
        assert (program.returncode, program.stderr[-4:]) == (status, ": x\n")

    def test_a_rank_that_no_launcher_describes_is_not_silent(self):
        program = run_main("raise InputError('x')", RANK="1")
        assert (program.returncode, program.stderr) == (2, "train.py: error: x\n")

    @pytest.mark.parametrize("rank", ["0", "1"])
    def test_any_other_error_is_a_traceback_on_every_rank(self, rank):
        program = run_main("raise ZeroDivisionError('why')", RANK=rank)
        assert program.returncode == 1
        assert program.stderr.startswith("Traceback")
        assert program.stderr.endswith("ZeroDivisionError: why\n")

    def test_a_node_says_what_rank_0_does_not(self):
        """Ranks 2 and 3 are those of the second node. They hear of rank 0's problems through the launcher's store."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        nodes = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        nodes["TORCHELASTIC_USE_AGENT_STORE"] = "True"

        def first_of_second_node(problem):
            return rank("2", problem)

        def rank(number, problem):
            body = f"console.quiet_third_parties(); raise InputError({problem!r})"
            return run_main(body, RANK=number, LOCAL_RANK=str(int(number) % 2), **nodes)

        there = "--tokenizer: no folder there"
        expected = f"train.py: error: on {socket.gethostname()}: {there}\n"
        assert first_of_second_node(there).stderr == expected
        assert rank("3", there).stderr == ""
        assert rank("3", "a shard is damaged").stderr.endswith(": a shard is damaged\n")
        rank_0 = run_main(f"raise InputError({there!r})", RANK="0", LOCAL_RANK="0", **nodes)
        assert rank_0.stderr == f"train.py: error: {there}\n"
        assert first_of_second_node(there).stderr == ""
        del store
        assert first_of_second_node(there).stderr == expected  # nobody to ask

    def test_variable_that_is_no_number(self):
        program = run_main("return 0", RANK="one")
        assert (program.returncode, program.stderr) == (2, "train.py: error: RANK: 'one' is not a number; unset it\n")

    @pytest.mark.parametrize("unbuffered", ["", "1"])  # as alone, and as under torchrun
    def test_end_of_the_reader_is_the_end_without_a_traceback(self, unbuffered):
        body = "for number in range(100000): console.say('a line')"
        code = f"from runtime import console, process\ndef main():\n    {body}\nprocess.run(main, 'train.py')"
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered}
        program = [sys.executable, "-c", code]
        process = subprocess.Popen(program, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(timeout=60) == READER_GONE
        assert process.stderr.read() == b""

    def test_another_broken_pipe_is_an_error_as_any(self):
        program = run_main("raise BrokenPipeError('a socket')")
        assert program.returncode == 1
        assert program.stderr.endswith("BrokenPipeError: a socket\n")

    @pytest.mark.parametrize(
        "text", ["Connection closed by peer [192.0.2.1]:27113", "Read error [::ffff:192.0.2.1]:52930: Connection reset"]
    )
    def test_end_of_a_peer_is_a_line_that_names_it(self, text):
        program = run_main(f"raise RuntimeError('[pair.cc:547] {text}')", RANK="3")
        expected = "train.py: rank 3 lost the connection to 192.0.2.1: a rank there has ended; see its own message\n"
        assert (program.returncode, program.stderr) == (1, expected)

    def test_ranks_end_with_their_launcher(self, tmp_path):
        """torchrun is killed, which it cannot pass on."""
        statements = ["import os, time", "from runtime import process", r"os.write(1, b'%d\n' % os.getpid())"]
        code = "\n".join([*statements, "process.run(lambda: time.sleep(300), 'rank.py')"])
        (tmp_path / "rank.py").write_text(code)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command.append(tmp_path / "rank.py")
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        ranks = [psutil.Process(int(process.stdout.readline())) for _ in range(2)]
        process.kill()
        _, alive = psutil.wait_procs(ranks, timeout=60)
        for rank in alive:
            rank.kill()
        assert not alive

    def test_help_exits_as_argparse_does(self):
        program = run_main("import sys; sys.exit(0)")
        assert (program.returncode, program.stderr) == (0, "")

    def test_success_does_not_wait_for_threads_or_finalisers(self):
        program = run_main(
            """
            import atexit, threading, time
            atexit.register(print, "finalised")
            threading.Thread(target=time.sleep, args=(300,)).start()
            return 0
            """
        )
        assert (program.returncode, program.stdout) == (0, "")


class TestStreams:
    """Whatever is printed does not end a program; `printed` has what no ASCII, Latin-1 or UTF-8 has."""

    printed = "naïve \u65e5 \U0001f600 \udcff"

    @pytest.mark.parametrize(
        ("environment", "expected"),
        [
            ({"PYTHONIOENCODING": "ascii"}, b"na\\xefve \\u65e5 \\U0001f600 \\udcff"),
            ({"PYTHONIOENCODING": "latin-1", "PYTHONUNBUFFERED": "1"}, b"na\xefve \\u65e5 \\U0001f600 \\udcff"),
            ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, b"na\\xefve \\u65e5 \\U0001f600 \\udcff"),
            ({"PYTHONIOENCODING": "utf-8"}, "naïve \u65e5 \U0001f600 \\udcff".encode()),
        ],
    )
    def test_encodings(self, environment, expected):
        """Of print, bars, warnings and argparse's help; and files that a library opens without an encoding."""
        text = ascii(self.printed)
        code = f"""
            import sys
            from runtime import console, process
            console.quiet_third_parties()
            import argparse, pathlib, tempfile, warnings, tqdm
            def main():
                with tempfile.NamedTemporaryFile() as file:
                    pathlib.Path(file.name).write_text("\\u65e5", encoding="utf-8")
                    assert pathlib.Path(file.name).read_text() == "\\u65e5"
                print({text})
                argparse.ArgumentParser(description={text}).print_help()
                tqdm.tqdm.write({text}, file=sys.stdout)
                warnings.warn({text})
                for _ in tqdm.tqdm([0], desc={text}): pass
                return 0
            process.run(main, "train.py")
            """
        program = self.run(code, subprocess.PIPE, **environment)
        assert program.returncode == 0, program.stderr
        assert program.stdout.splitlines().count(expected) == 3
        assert program.stderr.count(expected) >= 2

    def run(self, code, stdout, **environment):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
        command = [sys.executable, "-c", textwrap.dedent(code)]
        return subprocess.run(command, env=environment, stdout=stdout, stderr=subprocess.PIPE, timeout=120)

    LONG = """
        from runtime import console, process
        console.quiet_third_parties()
        def main():
            for number in range(3000): console.say("a line of a run that goes on")
            open(MARK, "w").write("done")
            return 0
        process.run(main, "train.py")
        """

    @pytest.mark.parametrize("unbuffered", ["", "1"])
    def test_full_disk(self, tmp_path, unbuffered):
        """The work is done, one line says why its output is not there, and so does the status."""
        mark = tmp_path / "mark"
        with open("/dev/full", "wb") as full:
            program = self.run(f"MARK = {str(mark)!r}\n{textwrap.dedent(self.LONG)}", full, PYTHONUNBUFFERED=unbuffered)
        assert mark.read_text() == "done"
        line = b"standard output cannot be written (No space left on device); continuing without it\n"
        assert (program.returncode, program.stderr) == (RUN_FAILED, line)

    def test_closed(self, tmp_path):
        """A file that is opened does not become standard output."""
        path = tmp_path / "shard"
        code = f"""
            import os
            from runtime import console, process
            console.quiet_third_parties()
            def main():
                with open({str(path)!r}, "w") as file:
                    console.say("said")
                    os.write(1, b"by a library in C")
                    file.write("done")
                return 0
            process.run(main, "train.py")
            """
        command = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", textwrap.dedent(code)]
        assert subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=120).returncode == 0
        assert path.read_text() == "done"


class TestRanks:
    def test_without_a_launcher(self, monkeypatch):
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        assert (console.rank(), console.local_rank(), console.world_size()) == (0, 0, 1)

    def test_with_one(self, monkeypatch):
        for name, value in (("RANK", "9"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "16")):
            monkeypatch.setenv(name, value)
        assert (console.rank(), console.local_rank(), console.world_size()) == (9, 1, 16)

    def test_say_prints_on_rank_0_alone(self, monkeypatch, capsys):
        monkeypatch.setenv("RANK", "0")
        console.say("one line")
        monkeypatch.setenv("RANK", "1")
        console.say("not this")
        assert capsys.readouterr() == ("one line\n", "")


class TestQuietThirdParties:
    LOUD = """
        import logging, warnings
        import colossalai.booster
        import bitsandbytes, transformers
        transformers.logging.get_logger("transformers.models").warning("advice")
        """

    def test_imports_and_advice_print_nothing(self):
        program = run_program("from runtime import console; console.quiet_third_parties()" + textwrap.dedent(self.LOUD))
        assert (program.returncode, program.stdout, program.stderr) == (0, "", "")
        assert run_program(self.LOUD).stderr  # or there is nothing to silence any more

    def test_modules_of_the_programs_print_nothing(self):
        program = run_program("import pretrain")
        assert (program.returncode, program.stdout, program.stderr) == (0, "", "")

    def test_errors_and_warnings_of_others_are_still_seen(self):
        program = run_program(
            """
            from runtime import console
            console.quiet_third_parties()
            import logging, warnings
            import transformers
            warnings.warn("mine")
            transformers.logging.get_logger("transformers.models").error("theirs")
            """
        )
        assert "mine" in program.stderr
        assert "theirs" in program.stderr

    def test_settings_of_the_user_are_kept(self):
        show = "print(os.environ['TRANSFORMERS_VERBOSITY'])"
        code = f"import os; from runtime import console; console.quiet_third_parties(); {show}"
        assert run_program(code, TRANSFORMERS_VERBOSITY="info").stdout == "info\n"
