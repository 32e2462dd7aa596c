"""Shell scripts of benchmarks and recipes, run as users do, on a small model."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import benchmark
import finetune
import pretrain
from attn import select_attention
from corpora import write_jsonl
from launching import ROOT, Run
from model_utils import load_config
from planning.machines import DryRun
from planning.memory import estimate_memory, settle
from training.flags import job_of, take

SCRIPTS = ROOT / "scripts"
BENCHMARKS = sorted(path.relative_to(SCRIPTS) for path in SCRIPTS.glob("benchmark_*/*.sh"))
LAUNCHERS = [*BENCHMARKS, *(Path(f"{name}.sh") for name in ("pretrain_7B", "pretrain_70B", "finetune_7B"))]
SMALL = ["-c", "test", "-l", 64, "-b", 2]


def start_script(script: Path, *args, folder: Path, **env: str) -> Run:
    """Start a script in a folder outside the repository, with this interpreter."""
    folder.mkdir(parents=True, exist_ok=True)
    return Run(["bash", SCRIPTS / script, *args], folder, {"LLAMA_PYTHON": sys.executable, **env}, cwd=folder)


@pytest.fixture
def run_script(tmp_path):
    def run_script(script, *args, **env) -> Run:
        with start_script(Path(script), *args, folder=tmp_path / "elsewhere", **env) as run:
            run.wait()
            return run

    return run_script


@pytest.fixture
def without_program(tmp_path) -> dict[str, str]:
    """Return an environment whose interpreter prints a program's arguments instead of running it."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(
        f'#!/bin/bash\nif [[ $* == *.py* && $* != *--list_hosts* ]]; then printf "%s\\n" "$@"; '
        f'else exec {sys.executable} "$@"; fi\n'
    )
    python.chmod(0o755)
    return {"LLAMA_PYTHON": str(python)}


def test_all_benchmark_scripts_are_found():
    names = "70B/3d 70B/gemini 70B/gemini_auto 7B/gemini 7B/gemini_auto"
    assert [str(path) for path in BENCHMARKS] == [f"benchmark_{name}.sh" for name in names.split()]


@pytest.mark.parametrize("script", BENCHMARKS, ids=str)
def test_benchmark(script, run_script):
    split = ["--tp", 2, "--pp", 1, "-b", 4] if script.name == "3d.sh" else []
    run = run_script(script, *SMALL, "-s", 2, "-i", 1, *split, "--json", "a file.json", NPROC_PER_NODE="2")
    assert run.returncode == 0, run.output()
    assert "max memory usage:" in run.stdout.splitlines()[-1]
    inputs = json.loads((run.folder / "a file.json").read_text())["inputs"]
    assert inputs["plugin"] == script.stem
    assert inputs["gradient_checkpoint"]
    assert inputs["flash_attention"]


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("benchmark_7B/gemini.sh", "-c 7b -p gemini -b 16 -l 4096 -g -a"),
        ("benchmark_7B/gemini_auto.sh", "-c 7b -p gemini_auto -b 16 -l 4096 -g -a"),
        ("benchmark_70B/gemini.sh", "-c 70b -p gemini -b 2 -l 4096 -g -a"),
        ("benchmark_70B/gemini_auto.sh", "-c 70b -p gemini_auto -b 2 -l 4096 -g -a"),
        ("benchmark_70B/3d.sh", "-c 70b -p 3d --tp 4 --pp 2 --zero 1 -b 8 -l 4096 -g -a"),
    ],
)
def test_flags_of_the_benchmarks(script, flags, run_script, without_program):
    run = run_script(script, "-m", "9", **without_program)
    assert run.stdout.split()[1:] == [*flags.split(), "-m", "9"]


@pytest.mark.parametrize("script", ["pretrain_7B.sh", "pretrain_70B.sh"])
def test_pretraining(script, run_script, sample, cache_dir):
    data = ["-d", sample / "data", "--tokenizer", sample / "tokenizer", "--cache_dir", cache_dir]
    split = ["--tp", 2, "--pp", 1] if "70B" in script else []
    steps = ["-s", 1, "--max_steps", 2, "-o", "checkpoint", "-t", "logs"]
    tokens = 2 * 2 * 64 * (1 if split else 2)
    run = run_script(script, *SMALL, *data, *steps, *split, NPROC_PER_NODE="2", BATCH_TOKENS=str(tokens))
    assert run.returncode == 0, run.output()
    assert f"= {tokens} tokens" in run.stdout
    assert (run.folder / "checkpoint" / "final").is_dir()


def test_fine_tuning(run_script, finished_run, cache_dir, tmp_path):
    rows = [{"prompt": f"row {number}", "completion": "an answer"} for number in range(16)]
    data = ["-d", write_jsonl(tmp_path / "rows.jsonl", rows), "--cache_dir", cache_dir, "-l", 64, "-b", 2]
    model = ["--model_path", finished_run.save_dir / "final", "--max_steps", 2, "-o", "tuned", "-t", "logs"]
    run = run_script("finetune_7B.sh", *data, *model, NPROC_PER_NODE="2", BATCH_TOKENS="512")
    assert run.returncode == 0, run.output()
    assert "2 x 2 accumulated x 2 data-parallel" in run.stdout
    assert (run.folder / "tuned" / "final").is_dir()


@pytest.mark.parametrize(
    ("script", "gpus", "flags", "steps"),
    [
        ("pretrain_7B.sh", 8, "", 32),
        ("pretrain_7B.sh", 32, "", 8),
        ("pretrain_7B.sh", 64, "", 4),
        ("pretrain_7B.sh", 8, "-b 2", 64),
        ("pretrain_7B.sh", 8, "--batch_size=16 -l 2048", 16),
        ("pretrain_7B.sh", 8, "-b16 -l=2048", 16),
        ("pretrain_70B.sh", 32, "", 64),
        ("pretrain_70B.sh", 64, "", 32),
        ("pretrain_70B.sh", 64, "--tp 8", 64),
        ("pretrain_70B.sh", 64, "--pp=2 --pp_style 1f1b", 32),
        ("pretrain_70B.sh", 1, "", 256),
        ("finetune_7B.sh", 8, "", 32),
    ],
)
def test_accumulation_reaches_the_batch_of_the_recipe(script, gpus, flags, steps, run_script, without_program):
    run = run_script(script, *flags.split(), NPROC_PER_NODE=str(gpus), **without_program)
    passed = run.stdout.split()
    assert passed[passed.index("--accumulation_steps") + 1] == str(steps), run.output()
    assert run.stderr == ""


@pytest.mark.parametrize(
    ("script", "gpus", "config"),
    [
        *((script, 32, "70b" if "70B" in str(script) else "7b") for script in BENCHMARKS),
        ("pretrain_7B.sh", 8, "7b"),
        ("pretrain_70B.sh", 32, "70b"),
        ("finetune_7B.sh", 8, "7b"),
    ],
    ids=str,
)
def test_every_script_fits_gpus_of_80_gb(script, gpus, config, run_script, without_program):
    command = run_script(script, NPROC_PER_NODE=str(gpus), **without_program).stdout
    program, flags = re.search(r"(\S+\.py)\n(.*)", command, re.DOTALL).groups()
    parse_args = {"benchmark": benchmark, "pretrain": pretrain, "finetune": finetune}[Path(program).stem].parse_args
    model = ["--model_path", "."] if "finetune" in program else []
    args = parse_args([*flags.split(), *model, "--dry_run", "--gpus", str(gpus), "--gpu", "H100"])
    llama = load_config(config)
    select_attention(llama, args.flash_attention)
    job = settle(job_of(args, llama), take(DryRun, args))
    assert job.problems() == []
    assert estimate_memory(job).peak.total < 80e9


def test_an_indivisible_batch_is_rounded_and_reported(run_script, without_program):
    run = run_script("pretrain_7B.sh", NPROC_PER_NODE="12", **without_program)
    assert "--accumulation_steps\n21\n" in run.stdout
    assert run.stderr == "pretrain_7B: 4128768 tokens per step, as close to 4194304 as GPUs and flags allow\n"


@pytest.mark.parametrize(
    ("hosts", "env", "message"),
    [
        (None, {"HOSTFILE": "missing.txt"}, "HOSTFILE: there is no file 'missing.txt'"),
        ("", {}, "names no host"),
        ("node1 slots=8\n", {}, "has the line 'node1 slots=8', which is not one host name"),
        ("node1\nnode2\nuser@Node1\n", {}, "names the host 'node1' twice"),
        ("node1,node2\n", {}, "has the line 'node1,node2', which is not one host name"),
        ("node1:2222\n", {}, "has the line 'node1:2222'; ssh's port is not part of a name: see --help"),
        ("# none yet\n", {}, "names no host"),
        (None, {"HOSTFILE": "."}, "HOSTFILE: there is no file '.'"),
        ("-oProxyCommand=true\n", {}, "has the line '-oProxyCommand=true', which is not one host name"),
        ("node1\n", {}, "NPROC_PER_NODE: cannot be derived, since this machine has no GPU; set it"),
        (None, {"LLAMA_PYTHON": "/nowhere/python"}, "LLAMA_PYTHON='/nowhere/python' is not a Python that runs"),
    ],
)
def test_mistakes_are_one_line(hosts, env, message, run_script, tmp_path):
    if hosts is not None:
        (tmp_path / "hosts.txt").write_text(hosts)
        env = {"HOSTFILE": str(tmp_path / "hosts.txt"), **env}
    run = run_script("benchmark_7B/gemini.sh", *SMALL, **env)
    assert run.returncode == 1
    assert run.stdout == ""
    (line,) = run.stderr.splitlines()
    assert line.startswith("gemini: error: ")
    assert message in line


@pytest.mark.parametrize("value", ["abc", "1.5", "-1", "08"])
@pytest.mark.parametrize(
    ("name", "least"), [("NPROC_PER_NODE", 1), ("BATCH_TOKENS", 1), ("SPARE_HOSTS", 0), ("MAX_RESTARTS", 0)]
)
def test_variables_that_are_no_whole_numbers(name, least, value, run_script, without_program):
    run = run_script("pretrain_7B.sh", **{"NPROC_PER_NODE": "1", **without_program, name: value})
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr == f"pretrain_7B: error: {name}: must be a whole number of at least {least}, not '{value}'\n"


@pytest.mark.parametrize(("flag", "value"), [("--tp", "abc"), ("--pp", "0")])
def test_ranks_of_a_replica_that_are_no_whole_numbers(flag, value, run_script, without_program):
    run = run_script("pretrain_70B.sh", flag, value, NPROC_PER_NODE="8", **without_program)
    assert run.returncode == 2
    assert run.stderr == f"pretrain_70B: error: {flag}: must be a whole number of at least 1, not '{value}'\n"


def test_hosts_file_next_to_the_script_is_used(tmp_path, without_program):
    """Use a copy of the scripts, so that no hosts.txt is left in the repository."""
    for room in ("scripts", "runtime"):
        shutil.copytree(ROOT / room, tmp_path / room)
    content = "\ufeff# the cluster\r\nroot@node1 # rank 0\r\n\r\nnode2"
    (tmp_path / "scripts" / "benchmark_7B" / "hosts.txt").write_text(content, encoding="utf-8", newline="")
    environment = {**os.environ, **without_program, "NPROC_PER_NODE": "8", "SSH_PORT": "2222"}
    command = ["bash", str(tmp_path / "scripts" / "benchmark_7B" / "gemini.sh"), "-c", "a b"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/", check=True)
    assert f"--hostfile\n{tmp_path}/scripts/benchmark_7B/hosts.txt\n" in done.stdout
    assert "--nproc_per_node\n8\n" in done.stdout
    assert "--master_addr\nnode1\n--master_port\n29500\n--ssh-port\n2222\n" in done.stdout
    assert "\na b\n" in done.stdout


def test_restarts(tmp_path, run_script, without_program):
    """They need run_on_hosts.py on one machine too. Spare hosts do not count in the batch."""
    flags = ["-o", tmp_path / "run", "-b", 1, "-l", 4096]
    environment = {**without_program, "NPROC_PER_NODE": "2", "MAX_RESTARTS": "9"}
    words = run_script("pretrain_7B.sh", *flags, **environment).stdout.split()
    assert words[0] == f"{SCRIPTS}/run_on_hosts.py"
    assert words[1:7] == ["--nproc_per_node", "2", "--max_restarts", "9", "--master_port", "29500"]
    assert words[words.index("--accumulation_steps") + 1] == "512"
    (tmp_path / "hosts.txt").write_text("a\nb\nc\n")
    environment |= {"SPARE_HOSTS": "1", "HOSTFILE": str(tmp_path / "hosts.txt")}
    words = run_script("pretrain_7B.sh", *flags, **environment).stdout.split()
    assert words[1:9] == f"--nproc_per_node 2 --max_restarts 9 --spare_hosts 1 --hostfile {tmp_path}/hosts.txt".split()
    assert words[words.index("--accumulation_steps") + 1] == "256"


@pytest.mark.parametrize("script", LAUNCHERS, ids=str)
def test_help(script, run_script):
    run = run_script(script, "--help")
    assert run.returncode == 0
    assert f"bash {script.name}" in run.stdout
    assert "NPROC_PER_NODE=" in run.stdout


SLURM_COMMANDS = {
    "scontrol": 'if [[ $1 == requeue ]]; then echo "requeued $2"; else echo localhost; fi',
    "srun": """\
shift
for ((rank = 0; rank < SLURM_NTASKS; rank++)); do SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" & pids+=($!); done
trap 'kill -USR1 "${pids[@]}"' USR1
status=0
for pid in "${pids[@]}"; do
    one=138 # wait was interrupted by USR1
    while ((one == 138)); do wait "$pid" && one=0 || one=$?; done
    ((one <= status)) || status=$one
done
exit "$status"
""",
}


@pytest.fixture
def slurm(tmp_path) -> dict[str, str]:
    """Replace Slurm's commands by ones that start two ranks here; return the environment of a job."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    for name, text in SLURM_COMMANDS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    return {
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_NTASKS": "2",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "localhost",
        "BATCH_TOKENS": "256",
    }


def test_slurm_job_saves_when_its_time_is_up_requeues_and_resumes(tmp_path, sample, cache_dir, slurm):
    """Slurm sends the signal."""
    data = ["-d", sample / "data", "--tokenizer", sample / "tokenizer", "--cache_dir", cache_dir]
    folders = ["-o", tmp_path / "checkpoint", "-t", tmp_path / "logs"]
    flags = [*SMALL, *data, *folders, "-s", 1, "--max_steps", 40, "--log_interval", 1]
    job = Path("slurm") / "pretrain.sbatch"
    with start_script(job, *flags, folder=tmp_path / "first", **slurm) as run:
        run.wait_until(lambda: "step 2/40" in run.stdout, "step 2")
        for process in run.processes():
            if "srun" in " ".join(process.cmdline()):
                process.send_signal(10)
        run.wait()
    assert run.returncode == 75, run.output()
    assert f"requeued {os.getpid()}" in run.stdout
    with start_script(job, *flags, folder=tmp_path / "second", **slurm) as run:
        run.wait()
    assert run.returncode == 0, run.output()
    assert "resumed: " in run.stdout


def test_slurm_job_is_requeued_after_failures_until_one_step_has_failed_three_times(tmp_path, slurm):
    """Each job counts its own failures."""
    program = tmp_path / "bin" / "program"
    program.write_text(f'#!/bin/bash\n[[ $1 != pretrain.py ]] || exit "$STATUS"\nexec {sys.executable} "$@"\n')
    program.chmod(0o755)
    logs = tmp_path / "logs" / "first"
    logs.mkdir(parents=True)

    def requeued(status: int, step: int, restarts: int = 0, job: int = 1) -> bool:
        (logs / "metrics.jsonl").write_text(f'{{"step": {step}, "loss": 7.0}}\n')
        env = {**slurm, "LLAMA_PYTHON": str(program), "STATUS": str(status), "SLURM_RESTART_COUNT": str(restarts)}
        env |= {"HOME": str(tmp_path), "SLURM_JOB_ID": str(job)}
        flags = ["--tensorboard_dir=~/logs", "--run_name", "first"]
        with start_script(Path("slurm") / "pretrain.sbatch", *flags, folder=tmp_path / "job", **env) as run:
            assert run.wait() == status, run.output()
        ended = status in (0, 75) or (status == 2 and not restarts)
        assert ("giving up: " in run.stderr) == (not ended and "requeued" not in run.stdout)
        return "requeued" in run.stdout

    assert not requeued(0, 8)
    assert not requeued(2, 8)
    assert requeued(75, 8)
    assert [requeued(1, step) for step in (8, 8, 9, 9, 9)] == [True, True, True, True, False]
    assert [requeued(1, 9, job=job) for job in (2, 3, 2, 3, 2)] == [True, True, True, True, False]
    assert [requeued(74, 20) for _ in range(4)] == [True] * 4
    assert [requeued(2, 30, restarts=1) for _ in range(3)] == [True, True, False]
