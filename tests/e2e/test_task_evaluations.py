"""--eval_tasks: scores of checkpoints beside the training, against transformers; faults, signals and resumes."""

import json
import os
import signal

import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from instruction_rows import ROWS
from launching import Run, start_finetune
from runtime.process import INTERRUPTED
from scored_tasks import best_answers, scores_of, write_task
from scripts.plot_run import read_run

ANSWERS = [0, 1, 2, 0]
SCORES = "eval_tasks/code_words/"
FLAGS = ["-p", "zero2", "-x", "fp32", "-b", 8, "-s", 1]
# In a module beside a task file: write the environment, then wait until the file `go` exists.
GATE = """
import json, os, pathlib, time
folder = pathlib.Path(__file__).parent
def wait(dataset):
    (folder / "environment.json").write_text(json.dumps(dict(os.environ)))
    while not (folder / "go").exists():
        time.sleep(0.1)
    return dataset
"""


def scores(run: Run) -> dict[int, dict[str, float]]:
    """Return the scores by metric that are logged for each step, in the order of the file."""
    found = {}
    for row in run.metrics:
        named = {key.removeprefix(SCORES): value for key, value in row.items() if key.startswith("eval_tasks/")}
        if named:
            assert row.keys() == {"step", *(f"{SCORES}{name}" for name in named)}
            assert row["step"] not in found
            found[row["step"]] = named
    return found


def evaluations(run: Run) -> list[psutil.Process]:
    return [process for process in run.processes() if "evaluate_tasks.py" in " ".join(process.cmdline())]


@pytest.fixture
def gated(tmp_path):
    """A task file whose evaluation waits until the file `go` is beside it."""
    file = write_task(tmp_path / "gated", ANSWERS)
    (file.parent / "gate.py").write_text(GATE)
    text = file.read_text().removesuffix("}") + ', "process_docs": !function gate.wait}'
    file.write_text(text)
    return file


def test_scores_are_those_of_each_checkpoint_though_old_ones_are_removed(pretrain, few_data, sample, tmp_path):
    flags = ["-d", few_data, *FLAGS, "--max_steps", 3, "-i", 2]
    kept = pretrain(*flags)
    task = write_task(tmp_path / "tasks", ANSWERS)
    run = pretrain(*flags, "--keep_checkpoints", 1, "--eval_tasks", task.parent)
    expected = {
        step: scores_of(ANSWERS, kept.save_dir / f"epoch0-step{step}" / "model", sample / "tokenizer")
        for step in (2, 3)
    }
    assert scores(run) == {step: pytest.approx(values, rel=1e-4) for step, values in expected.items()}
    assert expected[2]["brier_score"] != pytest.approx(expected[3]["brier_score"], rel=1e-3)
    assert run.column("step") == [1, 2, 3, 2, 3]
    assert sorted(path.name for path in run.save_dir.iterdir()) == [".lock", "epoch0-step3", "final"]
    board = EventAccumulator(str(run.folder / "tb_logs")).Reload()
    for metric in ("acc", "brier_score"):
        events = board.Scalars(f"eval/tasks/code_words/{metric}")
        assert [event.step for event in events] == [2, 3]
        assert [event.value for event in events] == pytest.approx([expected[step][metric] for step in (2, 3)])
    columns = read_run(str(run.folder / "tb_logs")).columns
    assert columns["step"].tolist() == [1, 2, 3]
    assert columns[f"{SCORES}acc"][1:].tolist() == [expected[2]["acc"], expected[3]["acc"]]
    assert [row["loss"] for row in run.metrics[:3]] == kept.column("loss")
    results = json.loads((run.folder / "tb_logs" / "tasks" / "step2.json").read_text())
    assert results["results"]["code_words"]["acc,none"] == expected[2]["acc"]


def test_training_neither_waits_for_an_evaluation_nor_fails_with_it(start, few_data, gated, tmp_path):
    """The evaluation of step 2 hangs and is killed; on two ranks, whose variables it must not see."""
    flags = ["-d", few_data, *FLAGS, "-b", 2, "--max_steps", 6, "-i", 2, "--eval_tasks_interval", 2]
    with start(*flags, "--eval_tasks", gated, processes=2, folder=tmp_path / "run") as run:
        run.wait_until(lambda: "tasks: waiting for the evaluation of step 2" in run.stdout, "the end of training")
        assert (run.save_dir / "final" / "config.json").is_file()
        assert "tasks: step 4 is left out: the evaluation of step 2 still runs" in run.stdout
        run.wait_until((gated.parent / "environment.json").exists, "the task")
        (evaluation,) = evaluations(run)
        assert evaluation.nice() == 19
        run.wait_until(lambda: not list(run.save_dir.glob(".evaluated*")), "the removal of files that are not needed")
        names = json.loads((gated.parent / "environment.json").read_text()).keys()
        assert not names & {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
        (gated.parent / "go").touch()
        evaluation.kill()
        assert run.wait() == 0, run.output()
    log = run.folder / "tb_logs" / "tasks" / "step2.log"
    assert f"tasks: step 2 has no scores: it was ended by SIGKILL; see {log}" in run.stdout
    assert list(scores(run)) == [6]
    assert not list(run.save_dir.glob(".evaluated*"))


def test_no_evaluation_outlives_the_run_and_a_resume_makes_up_for_it_once(start, few_data, gated, tmp_path):
    flags = ["-d", few_data, *FLAGS, "--max_steps", 3, "-i", 2, "--eval_tasks", gated, "-f", "latest"]
    for number in (signal.SIGKILL, signal.SIGINT):
        with start(*flags, folder=tmp_path / "run") as run:
            run.wait_until(lambda run=run: run.stdout.count("tasks: waiting") == 1, "the end of training")
            run.wait_until(lambda run=run: len(evaluations(run)) == 1, "the evaluation")
            (trainer,) = {process.ppid() for process in evaluations(run)}
            os.kill(trainer, number)
            assert run.wait() == (0 if number == signal.SIGINT else -number), run.output()
        assert scores(run) == {}
        (run.folder / "stdout").unlink()
    (gated.parent / "go").touch()
    for told in (True, False):
        with start(*flags, folder=tmp_path / "run") as run:
            assert run.wait() == 0, run.output()
        assert "nothing is left to train" in run.stdout
        assert ("tasks: waiting for the evaluation of step 3" in run.stdout) == told
        assert list(scores(run)) == [3]
        assert run.column("step") == [1, 2, 3, 3]


def test_a_signal_ends_the_evaluation_with_the_run(start, few_data, gated, tmp_path):
    flags = ["-d", few_data, *FLAGS, "-e", 100, "-i", 2, "--eval_tasks_interval", 2, "--eval_tasks", gated]
    with start(*flags, folder=tmp_path / "run") as run:
        run.wait_until(lambda: len(evaluations(run)) == 1, "the evaluation")
        os.kill(evaluations(run)[0].ppid(), signal.SIGTERM)
        assert run.wait() == INTERRUPTED, run.output()
    assert "tasks: the evaluation of step 2 was ended by the signal" in run.stdout


def test_a_failure_is_one_line_and_adapters_are_merged(finished_run, cache_dir, tmp_path):
    """One task file is damaged during the run; then the merged model has the scores of `final`."""
    final = finished_run.save_dir / "final"
    task = write_task(tmp_path / "tasks", best_answers(final))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS * 4))
    flags = ["--model_path", final, "-d", rows, "--cache_dir", cache_dir, "-p", "zero2", "-x", "fp32", "-b", 8]
    flags += ["--lora_rank", 4, "--lr", 1e-2, "-i", 0, "--max_steps", 3, "--eval_tasks", task]
    questions = task.with_suffix(".jsonl").read_text()
    task.with_suffix(".jsonl").write_text("{")
    with start_finetune(*flags, folder=tmp_path / "run") as run:
        assert run.wait() == 0, run.output()
    (line,) = (line for line in run.stdout.splitlines() if line.startswith("tasks: step"))
    log = run.folder / "tb_logs" / "tasks" / "step3.log"
    assert line.startswith("tasks: step 3 has no scores: ")
    assert line.endswith(f"; see {log}")
    assert "Traceback" in log.read_text()
    task.with_suffix(".jsonl").write_text(questions)
    with start_finetune(*flags, "-f", "latest", folder=tmp_path / "run") as run:
        assert run.wait() == 0, run.output()
    answers = [json.loads(row)["answer"] for row in questions.splitlines()]
    assert scores(run) == {3: pytest.approx(scores_of(answers, run.save_dir / "final"), rel=1e-4)}
    assert scores_of(answers, final)["brier_score"] != pytest.approx(scores(run)[3]["brier_score"], rel=1e-3)
