"""Commands in the documentation: programs exist and accept the flags; cheap commands are run."""

import argparse
import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from colossalai.cli.launcher import run as colossalai_run
from torch.distributed.run import parse_args as parse_torchrun

import benchmark
from corpora import documents_in
from corpus.sources import TEXT_TO_JSONL, resolve_source
from launching import ROOT, start_finetune
from scripts.run_on_hosts import command_line

PAGES = sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))
DOCUMENTS = ("README.md", "SEVERAL_MACHINES.md", "CONTRIBUTING.md", "benchmarks/README.md", *PAGES)
# A shell script's own flags, or the program that it passes flags to.
SHELL_SCRIPTS = {
    "scripts/quickstart.sh": [],
    "scripts/setup.sh": ["--dev"],
    "scripts/build_extensions.sh": [],
    "benchmarks/single_gpu.sh": [],
    "scripts/test.sh": "pytest",
    "scripts/slurm/pretrain.sbatch": "pretrain.py",
    "scripts/benchmark_7B/gemini.sh": "benchmark.py",
    "scripts/benchmark_70B/3d.sh": "benchmark.py",
}
ELSEWHERE = {"source", "pip", "echo", "ssh", "ssh-keygen", "ssh-copy-id", "lm_eval", "tensorboard", "export"}


class Accepted(Exception):
    """Raised once a program's parser has accepted the flags."""


def commands() -> list[tuple[str, str]]:
    """Return every command line in a bash block or in backticks, with its document."""
    found = []
    for document in DOCUMENTS:
        text = (ROOT / document).read_text(encoding="utf-8")
        variables: dict[str, str] = {}
        for block in re.findall(r"^ *```bash\n(.*?)^ *```", text, flags=re.DOTALL | re.MULTILINE):
            for line in block.replace("\\\n", " ").splitlines():
                if assignment := re.fullmatch(r'([A-Z]+)="(.*)"', line.strip()):
                    variables[assignment[1]] = assignment[2]
                    continue
                line = re.sub(r"\$([A-Z]+)", lambda match: variables[match[1]], line)  # noqa: B023
                found.extend((document, part) for part in re.split(r"\||&&", line) if part.strip(" #"))
        prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        for line in re.findall(r"`((?:python|bash|sbatch)\s[^`]+\.(?:py|sh|sbatch)\b[^`]*)`", prose):
            found.append((document, " ".join(line.split())))
    return [(document, line.strip()) for document, line in found if not line.strip().startswith("#")]


@pytest.mark.skipif(shutil.which("jq") is None, reason="needs jq")
def test_plain_text_becomes_documents(tmp_path):
    files = {"first.txt": "One,\ntwo.\n\nThree.\n", "second.txt": "Four.\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    each, split = re.findall(r"`([^`]*jq -Rsc[^`]*)`", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert split == TEXT_TO_JSONL  # an error message quotes it too
    subprocess.run(["bash", "-c", each], cwd=tmp_path, check=True)
    subprocess.run(["bash", "-c", split.replace("FILE", "first.txt")], cwd=tmp_path, check=True)
    made = [resolve_source(str(tmp_path / name)) for name in ("texts.jsonl", "first.txt.jsonl")]
    assert [[document.text for document in documents_in(source)] for source in made] == [
        list(files.values()),
        ["One,\ntwo.", "Three.\n"],
    ]


@pytest.fixture
def accept(monkeypatch):
    """Return a function that runs one of the programs until it has parsed the given flags."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, *args, **kwargs):
        parse(self, *args, **kwargs)
        raise Accepted

    def accept(program: str, flags: list[str]) -> None:
        assert (ROOT / program).is_file(), program
        monkeypatch.syspath_prepend((ROOT / program).parent)
        module = importlib.import_module(program.removesuffix(".py").replace("/", "."))
        monkeypatch.setattr(sys, "argv", [program, *flags])
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        with pytest.raises(Accepted):
            getattr(module, "parse_args", module.main)()

    return accept


def launched(words: list[str]) -> tuple[str, list[str]]:
    """Return the program that a command starts, and its flags without a launcher's."""
    if words[0] == "torchrun":
        taken = parse_torchrun(words[1:])
        return taken.training_script, taken.training_script_args
    if words[:2] in (["colossalai", "run"], ["python", "scripts/run_on_hosts.py"]):
        script = next(place for place, word in enumerate(words) if word.endswith(".py") and place > 1)
        launcher = colossalai_run if words[0] == "colossalai" else command_line()
        options = launcher.make_context("run", [*words[2:script], words[script]]).params
        assert options["user_script"] == words[script], options  # and not an unknown option
        return words[script], words[script + 1 :]
    return words[1], words[2:]


def test_commands_are_found():
    lines = [line for _, line in commands()]
    assert len(lines) > 50
    assert sum("-d /data/redpajama" in line for line in lines) == 11


@pytest.mark.parametrize(("document", "line"), commands())
def test_programs_and_flags_exist(document, line, accept):
    words = shlex.split(line, comments=True)
    words = [word for before, word in zip(["", *words], words, strict=False) if word != "..." or before.startswith("-")]
    while re.match(r"[A-Z_]+=", words[0]):
        words.pop(0)
    if words[0] in ELSEWHERE:
        for place, word in enumerate(words[:-1]):
            assert word != "-r" or (ROOT / words[place + 1]).is_file()
        return
    program, flags = launched(words)
    if not program.endswith(".py"):
        assert (ROOT / program).is_file()
        takes = SHELL_SCRIPTS[program]
        if takes == "pytest":
            assert all((ROOT / flag).is_file() for flag in flags if flag.startswith("tests/"))
            return
        if not isinstance(takes, str):
            assert set(flags) <= set(takes)
            return
        program = takes
    if flags == ["--help"]:
        return
    accept(program, flags)


@pytest.mark.parametrize(
    ("command", "output"),
    re.findall(r"^\$ (python .*)\n((?:.+\n)+?)```", (ROOT / "README.md").read_text(), re.MULTILINE),
)
def test_dry_runs_print_what_the_readme_says(monkeypatch, capsys, command, output):
    program, *flags = shlex.split(command)[1:]
    assert program == "benchmark.py"
    monkeypatch.setattr(sys, "argv", [program, *flags])
    assert benchmark.main() == 0
    assert output in capsys.readouterr().out


def test_the_fine_tuning_example(sample, start, tmp_path):
    """Follow the README: pretrain, fine-tune `final` on questions, evaluate, and ask a question that it memorized."""
    with start("-p", "zero2", "-x", "bf16", "-b", 8, "--max_steps", 4, folder=tmp_path / "pretrained") as run:
        assert run.wait() == 0, run.output()
    program, questions = ROOT / "scripts" / "make_sample_instructions.py", tmp_path / "instructions"
    subprocess.run([sys.executable, program, "--output_dir", questions, "--examples", "20"], check=True)
    flags = ["--model_path", run.save_dir / "final", "-d", questions, "--cache_dir", tmp_path / "cache"]
    flags += ["-p", "zero2", "-x", "bf16", "-b", 18, "-e", 150, "--lr", "1e-2"]
    with start_finetune(*flags, folder=tmp_path / "finetuned") as run:
        assert run.wait() == 0, run.output()
    assert run.column("loss")[-1] < 0.2 < run.column("loss")[0]
    assert "eval_loss" in run.metrics[-1]
    assert "left out" not in run.stdout  # both train.jsonl and test.jsonl are used
    row = json.loads((questions / "train.jsonl").read_text(encoding="utf-8").splitlines()[0])
    ask = [sys.executable, ROOT / "scripts" / "generate.py", "--model", run.save_dir / "final", "--temperature", "0"]
    answer = subprocess.run([*ask, "--prompt", row["prompt"]], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == f"{row['prompt']} {row['completion']}"


def test_the_example_of_continued_pretraining(sample, start, tmp_path):
    """Follow the README with a smaller model: pretrain, then continue on its own pages and some of the first data."""
    with start("-p", "zero2", "-x", "fp32", "-b", 8, "--max_steps", 20, folder=tmp_path / "pretrained") as run:
        assert run.wait() == 0, run.output()
    with open(tmp_path / "pages.jsonl", "w", encoding="utf-8") as pages:
        for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
            pages.write(json.dumps({"text": page.read_text(encoding="utf-8")}) + "\n")
    (command,) = (line for _, line in commands() if "--init_from quickstart" in line)
    places = {
        "quickstart/checkpoint/final": run.save_dir / "final",
        "quickstart/tokenizer": sample / "tokenizer",
        "quickstart/data": sample / "data",
        "pages.jsonl": tmp_path / "pages.jsonl",
        "-o continued -t continued/logs": "",
    }
    for name, place in places.items():
        command = command.replace(name, str(place))
    smaller = ["-l", 64, "--max_steps", 20, "--eval_fraction", 0.3, "--cache_dir", tmp_path / "cache"]
    with start(*launched(shlex.split(command))[1], *smaller, folder=tmp_path / "continued") as run:
        assert run.wait() == 0, run.output()
    before = float(re.search(r"before the first step: loss ([\d.]+)", run.stdout)[1])
    assert run.metrics[-1]["eval_loss"] < before
    assert {"eval_loss/pages", "eval_loss/data"} <= set(run.metrics[-1]), run.metrics[-1]


def test_the_example_of_annealing(sample, start, tmp_path):
    """Follow the README with a smaller model: the file as it stands, and the command."""
    (stages,) = re.findall(r"^```toml\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL | re.M)
    pages = tmp_path / "pages.jsonl"
    with open(pages, "w", encoding="utf-8") as file:
        for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
            file.write(json.dumps({"text": page.read_text(encoding="utf-8")}) + "\n")
    places = {"quickstart/data": str(sample / "data"), "pages.jsonl": str(pages)}
    for name, place in places.items():
        stages = stages.replace(name, place)
    (tmp_path / "anneal.toml").write_text(stages)
    (command,) = (line for _, line in commands() if "--stages anneal.toml" in line)
    places |= {"quickstart/tokenizer": sample / "tokenizer", "anneal.toml": tmp_path / "anneal.toml"}
    for name, place in (places | {"-o annealed -t annealed/logs": ""}).items():
        command = command.replace(name, str(place))
    smaller = ["-c", "test", "-l", 64, "--max_steps", 40, "-s", 2, "--cache_dir", tmp_path / "cache"]
    with start(*launched(shlex.split(command))[1], *smaller, folder=tmp_path / "annealed") as run:
        assert run.wait() == 0, run.output()
    assert run.column("stage") == [0] * 30 + [1] * 10
    assert run.column("lr")[29:31] == [1e-3, 1e-3]
    assert run.column("lr")[-1] == pytest.approx(1e-4)
    assert re.search(r"^epochs: data \d\.\d\d, pages \d\.\d\d$", run.stdout, re.MULTILINE)


def test_paths_in_links_and_tables_exist():
    for document in DOCUMENTS:
        text = (ROOT / document).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            assert (ROOT / document).parent.joinpath(target).exists() or target.startswith("https:"), target
        for name in re.findall(r"`((?:\w+/)+[\w.]*|\w+\.py)`", text):
            folder = ROOT / name.partition("/")[0]
            if not name.endswith((".py", ".sh", ".sbatch")) and not list(folder.glob("*.py")):
                continue  # a folder that a program creates
            assert any((place / name).exists() for place in (ROOT, ROOT / "scripts", ROOT / "tests")), name


def test_every_room_is_in_the_tree():
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("## The code")[2]
    names = [
        *(path.name for path in ROOT.glob("*.py")),
        *(f"{path.parent.name}/" for path in ROOT.glob("*/__init__.py")),
    ]
    assert not [name for name in names if name not in text]
