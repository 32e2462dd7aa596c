"""Run `colossalai run` with its own connections to the hosts replaced by ones that report failures.

    python scripts/run_on_hosts.py --nproc_per_node 8 --hostfile hosts.txt pretrain.py -c 7b -p zero2 ...

It takes the options of `colossalai run`, and passes the program's flags on unchanged. Before anything starts, it checks
that every host allows a login and has this folder and this Python. It connects with OpenSSH's ssh, using your keys and
~/.ssh/config.

Only environment variables that concern training are sent to the hosts (FORWARDED below), never on a command line.
Tokens, keys and passwords, such as HF_TOKEN, are sent only if LAUNCH_ENV names them.

If a host fails, one line names it and says how, the other hosts stop too, and the exit status is the program's.
SIGTERM, SIGINT, SIGUSR1 and SIGHUP make the run save a checkpoint and end, and so does the death of this launcher. A
second SIGINT ends the run at once.

With --max_restarts N, a run that fails, hangs or loses a host is started again from its newest checkpoint, up to N
times; also on this machine alone, without a hosts file. --spare_hosts K keeps the file's last K hosts for the place of
those that fail twice or cannot be reached. It gives up when the program has failed three times at the same step.

Exit status: 0; 2 if nothing was started or the program refused its flags; 70 if the run hung; 74 if a resume found no
room for its next checkpoint; 75 if a signal ended the run after its checkpoint was saved; 255 if the connection to a
host was lost; else that of the first process that failed (128 + the signal's number if a signal killed it).

Environment:
    LAUNCH_SSH='ssh -p 2222 -i key'   the command that connects (default: ssh)
    LAUNCH_ENV='NAME OTHER'           more variables to send
"""

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from runtime.console import below
from scripts.launcher.attempt import NOTHING_STARTED, Fleet, attempts
from scripts.launcher.hosts import SERVE, name_of, read_hostfile, say
from scripts.launcher.ranks import Ranks
from scripts.launcher.restarts import Restarts, last_step, logs_of

LIST_HOSTS = "--list_hosts"  # internal flag, for the shell scripts: print the names in a hosts file
LAST_STEP = "--last_step"  # the same: print the folder of the program's logs, and the last step in it


def list_hosts(hostfile: str) -> int:
    try:
        print(*map(name_of, read_hostfile(Path(hostfile))), sep="\n")
    except ValueError as error:
        print(error)
        return NOTHING_STARTED
    return 0


def print_last_step(program: list[str]) -> int:
    logs = logs_of(program)
    print(logs, last_step(logs) or 0, sep="\n")
    return 0


def as_one_word(argument: str) -> str:
    """Quote an argument for shlex.split, but keep its end, where ColossalAI looks for `.py`."""
    return re.sub(r"([^\w@%+=:,./-])", r"\\\1", argument, flags=re.ASCII) or "''"


def launch(max_restarts: int, spare_hosts: int, **options: Any) -> int:
    """Make attempts of the run until one ends well or another would not help; return the status of the last."""
    fleet = Fleet(spare_hosts, restarted=max_restarts > 0)
    restarts = Restarts(max_restarts, list(options["user_args"]), fleet)
    problem = restarts.problem()
    if spare_hosts and not options["hostfile"]:
        problem = "--spare_hosts: takes effect only with --hostfile; give that too, or leave it out"
    if spare_hosts and not max_restarts:
        problem = "--spare_hosts: takes effect only with --max_restarts; give that too, or leave it out"
    for name in ("include", "exclude", "num_nodes"):
        if spare_hosts and options[name] not in (None, -1):
            problem = f"--spare_hosts: the last hosts of the file cannot be spared with --{name}; leave one out"
    problem = next(iter(below(0, max_restarts=max_restarts, spare_hosts=spare_hosts)), problem)
    if problem:
        say(f"error: {problem}")
        return NOTHING_STARTED
    if note := restarts.note():
        say(note)
    attempt = attempts(fleet)
    options["user_script"] = options["user_script"] and as_one_word(options["user_script"])
    while True:
        status = attempt(**options | {"user_args": tuple(map(as_one_word, restarts.arguments()))})
        if not restarts.again(status):
            return status


def command_line() -> Any:
    """Return the click.Command of `colossalai run` with our own options."""
    theirs = importlib.import_module("colossalai.cli.launcher").run
    number: dict[str, Any] = {"type": int, "default": 0}
    text = "after a failure, start the run again from its newest checkpoint, up to this often (default: 0)"
    options = [click.Option(["--max_restarts"], help=text, **number)]
    text = "the last hosts of the file, to take the place of those that fail twice or cannot be reached (default: 0)"
    options.append(click.Option(["--spare_hosts"], help=text, **number))
    params = [*theirs.params, *options]

    def start(**given: Any) -> None:
        script = given["user_script"] or ""
        if script.startswith("-") and not given["m"]:  # an unknown option; after -m MODULE, one of the module's
            known = [name for param in params for name in param.opts]
            raise click.NoSuchOption(script.partition("=")[0], possibilities=known)
        sys.exit(launch(**given))

    return click.Command(
        None,
        params=params,
        callback=start,
        help=theirs.help,
        # The program's flags stay its own, also those that are spelled like ours, such as -m.
        context_settings=theirs.context_settings | {"allow_interspersed_args": False},
    )


def main() -> int:
    try:
        return command_line().main(prog_name="run_on_hosts.py", standalone_mode=False)
    except SystemExit as end:
        return int(end.code or 0)
    except click.ClickException as error:
        say(f"error: {error.format_message()}")
    except click.Abort:
        say("SIGINT: nothing was started")
    except Exception as error:
        if not str(error).startswith("Hostname "):  # --include or --exclude names an unknown host
            raise
        say(f"error: --hostfile: {error}; --include and --exclude take names that are in it")
    return NOTHING_STARTED


if __name__ == "__main__":
    if sys.argv[1:2] == [LIST_HOSTS]:
        sys.exit(list_hosts(sys.argv[2]))
    if sys.argv[1:2] == [LAST_STEP]:
        sys.exit(print_last_step(sys.argv[2:]))
    sys.exit(Ranks().run() if sys.argv[1:] == [SERVE] else main())
