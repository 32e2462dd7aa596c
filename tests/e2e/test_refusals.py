"""Refused input, with the programs as processes: one line, the exit status, and nothing written."""

import sys
from pathlib import Path

import pytest

from launching import ROOT, Run, run_script, start_pretrain
from runtime.process import KEYBOARD_INTERRUPT, USAGE_ERROR


def assert_refused(run: Run, expected: str) -> None:
    (line,) = (line for line in run.stderr.splitlines() if line.startswith("pretrain.py: "))
    assert line.startswith(f"pretrain.py: error: {expected}")
    assert run.stdout == ""
    assert not run.save_dir.exists()
    assert not (run.folder / "tb_logs").exists()


def test_exit_status_and_output(tmp_path):
    """A new user may start offline and without --tokenizer."""
    with start_pretrain("-d", tmp_path / "data", folder=tmp_path / "run") as run:
        assert run.wait() == USAGE_ERROR
    assert_refused(run, "--tokenizer: hf-internal-testing/llama-tokenizer ")
    assert run.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("program", "flags", "expected"),
    [
        ("finetune.py", ["--model_path", "./none"], "--model_path: ./none does not exist"),
        ("benchmark.py", ["-c", "8b"], "--config: '8b' is neither"),
    ],
)
def test_exit_status_of_the_other_programs(tmp_path, program, flags, expected):
    run = Run([sys.executable, ROOT / program, *flags], tmp_path / "run", cwd=tmp_path)
    with run:
        assert run.wait() == USAGE_ERROR
    assert run.stderr.startswith(f"{program}: error: {expected}")
    assert (run.stdout, run.stderr.count("\n")) == ("", 1)
    assert {path.name for path in tmp_path.rglob("*")} == {"run", "stdout", "stderr"}


HIDDEN = """\
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {package!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hidden())
"""


@pytest.mark.parametrize(
    ("program", "package", "version", "expected"),
    [
        ("pretrain.py", "transformers", "5.2.0", "transformers 5.2.0 is installed, not ==4.51.3; "),
        ("finetune.py", "torch", "2.5.1", "torch 2.5.1 is installed, not <2.14,>=2.11; "),
        (
            "benchmark.py",
            "colossalai",
            "0.4.6",
            "colossalai 0.4.6 is installed, not ==0.5.0; ",
        ),
        ("scripts/prepare_dataset.py", "transformers", "4.57.1", "transformers 4.57.1 is installed, not ==4.51.3; "),
        ("pretrain.py", "peft", None, "a package cannot be imported (No module named 'peft'); "),
        ("benchmark.py", "bitsandbytes", None, "a package cannot be imported (No module named 'bitsandbytes'); "),
        ("scripts/plot_run.py", "matplotlib", None, "a package cannot be imported (No module named 'matplotlib'); "),
        ("scripts/generate.py", "packaging", None, "a package cannot be imported (No module named 'packaging'); "),
    ],
)
def test_packages_with_wrong_versions_or_missing(tmp_path, program, package, version, expected):
    """A folder ahead of the installed packages holds another version's metadata, or hides the package."""
    site = tmp_path / "site"
    site.mkdir()
    if version:
        (site / f"{package}-{version}.dist-info").mkdir()
        (site / f"{package}-{version}.dist-info" / "METADATA").write_text(f"Name: {package}\nVersion: {version}\n")
    else:
        (site / "sitecustomize.py").write_text(HIDDEN.format(package=package))
    environment = {"PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"}
    before = sorted(tmp_path.rglob("*"))
    with Run([sys.executable, ROOT / program], tmp_path / "run", environment, cwd=tmp_path) as run:
        assert run.wait() == USAGE_ERROR
    assert run.stderr.startswith(f"{Path(program).name}: error: {expected}")
    assert (run.stdout, run.stderr.count("\n")) == ("", 1)
    assert sorted(set(tmp_path.rglob("*")) - {run.folder, *run.folder.iterdir()}) == before


def test_interrupt_during_imports_is_not_a_missing_package(tmp_path):
    """A Ctrl-C during an import may surface as an ImportError."""
    (tmp_path / "peft.py").write_text(
        "try:\n    raise KeyboardInterrupt\nexcept BaseException as e:\n    raise ImportError from e"
    )
    with Run([sys.executable, ROOT / "pretrain.py"], tmp_path / "run", {"PYTHONPATH": str(tmp_path)}) as run:
        assert run.wait() == KEYBOARD_INTERRUPT
    assert run.stdout + run.stderr == ""


def test_all_ranks_end_when_the_data_cannot_be_prepared(pretrain, tmp_path):
    """The second rank waits for the data that the first one prepares."""
    (tmp_path / "file.jsonl").write_text("{")
    run = pretrain("-p", "zero2", "-d", tmp_path / "file.jsonl", processes=2, check=False)
    assert run.returncode != 0
    assert_refused(run, "--dataset: ")


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("export_hf.py", "--checkpoint {run}/epoch0-step2 --tokenizer {run}/final --output {locked}/model"),
        ("prepare_dataset.py", "-d {few} --tokenizer {run}/final --output {locked}/prepared"),
        ("prepare_dataset.py", "--verify --output {locked}/prepared"),
        ("plot_run.py", "{run}/../tb_logs --output {locked}/run.png"),
        ("report.py", "{run}/../tb_logs --output {locked}/run.html"),
        ("make_sample_data.py", "--output_dir {locked}/sample --megabytes 0.1"),
        ("make_sample_instructions.py", "--output_dir {locked}/sample --examples 10"),
    ],
)
def test_scripts_without_a_place_to_write(finished_run, few_data, script, flags):
    """A folder that cannot be created is reported in one line without a traceback."""
    places = {"run": finished_run.save_dir, "few": few_data, "locked": "/proc/none"}
    done = run_script(ROOT / "scripts" / script, *flags.format(**places).split())
    line = done.stderr.splitlines()[-1]
    assert done.returncode == USAGE_ERROR, done.stderr
    assert line.startswith(f"{script}: error: --output")
    assert "Traceback" not in done.stderr
