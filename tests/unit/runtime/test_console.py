"""Output of real programs: streams, lines of rank 0, quiet libraries."""

import subprocess
import textwrap

import pytest

from programs import main_program, program, run_program
from runtime import console
from runtime.process import RUN_FAILED


def run_bytes(code, stdout, **environment):
    return subprocess.run(**program(code, **environment), stdout=stdout, stderr=subprocess.PIPE, timeout=120)


class TestStreams:
    """No text and no full disk ends a program; PRINTED has characters outside ASCII, Latin-1 and UTF-8."""

    PRINTED = "naïve \u65e5 \U0001f600 \udcff"

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
        """Of print, progress bars, warnings and argparse's help; and of files opened without an encoding."""
        text = ascii(self.PRINTED)
        done = run_bytes(
            f"""
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
            """,
            subprocess.PIPE,
            **environment,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines().count(expected) == 3
        assert done.stderr.count(expected) >= 2

    @pytest.mark.parametrize("unbuffered", ["", "1"])
    def test_full_disk(self, tmp_path, unbuffered):
        """The program completes its work; one line reports the lost output, and so does the exit status."""
        mark = tmp_path / "mark"
        body = f"for _ in range(3000): console.say('a line')\nopen({str(mark)!r}, 'w').write('done')\nreturn 0"
        with open("/dev/full", "wb") as full:
            done = run_bytes(main_program(body), full, PYTHONUNBUFFERED=unbuffered)
        assert mark.read_text() == "done"
        line = b"standard output cannot be written (No space left on device); continuing without it\n"
        assert (done.returncode, done.stderr) == (RUN_FAILED, line)

    def test_closed(self, tmp_path):
        """The next file that is opened does not become standard output."""
        path = tmp_path / "shard"
        arguments = program(
            main_program(
                f"""
                import os
                with open({str(path)!r}, "w") as file:
                    console.say("a line")
                    os.write(1, b"from a library in C")
                    file.write("done")
                return 0
                """
            )
        )
        closed = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"]
        assert subprocess.run([*closed, *arguments["args"]], env=arguments["env"], timeout=120).returncode == 0
        assert path.read_text() == "done"


class TestRanks:
    def test_without_a_launcher(self, monkeypatch):
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        assert (console.rank(), console.local_rank(), console.world_size()) == (0, 0, 1)

    def test_with_a_launcher(self, monkeypatch):
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

    @pytest.mark.slow
    def test_imports_and_advice_print_nothing(self):
        done = run_program("from runtime import console; console.quiet_third_parties()" + textwrap.dedent(self.LOUD))
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert run_program(self.LOUD).stderr  # else nothing is left to silence

    @pytest.mark.slow
    def test_modules_of_the_programs_print_nothing(self):
        done = run_program("import pretrain")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    @pytest.mark.slow
    def test_errors_and_other_warnings_are_still_printed(self):
        done = run_program(
            """
            from runtime import console
            console.quiet_third_parties()
            import logging, warnings
            import transformers
            warnings.warn("mine")
            transformers.logging.get_logger("transformers.models").error("theirs")
            """
        )
        assert "mine" in done.stderr
        assert "theirs" in done.stderr

    @pytest.mark.slow
    def test_the_users_settings_are_kept(self):
        show = "print(os.environ['TRANSFORMERS_VERBOSITY'])"
        code = f"import os; from runtime import console; console.quiet_third_parties(); {show}"
        assert run_program(code, TRANSFORMERS_VERBOSITY="info").stdout == "info\n"


@pytest.mark.slow
def test_importing_the_room_changes_nothing():
    """Importing a module sets no signal handler, hook, stream or variable."""
    done = run_program(
        """
        import os, signal, sys
        def state():
            handlers = [signal.getsignal(number) for number in signal.valid_signals()]
            return handlers, sys.excepthook, sys.stdout, sys.stderr, dict(os.environ)
        before = state()
        from runtime import collectives, console, files, hub, process, ranks, requirements
        assert state() == before
        """
    )
    assert done.returncode == 0, done.stderr
