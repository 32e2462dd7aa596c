"""Flags and names of the tasks that checkpoints are evaluated on, and what an evaluation gets of the run around it."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from checkpoints import make_checkpoint
from launching import ROOT
from runs import problems_of
from runtime.console import InputError
from runtime.process import PARENT
from scored_tasks import write_task
from scripts import evaluate_tasks
from training import task_evaluator, tasks
from training.tasks import Tasks, check_tasks, inside, resolve

ANSWERS = [0, 0, 0, 0]


def group_file(folder, members, name="both"):
    (folder / f"{name}.yaml").write_text(json.dumps({"group": name, "task": members}))
    return str(folder / f"{name}.yaml")


def refusals(*items) -> list[str]:
    with pytest.raises(InputError) as raised:
        resolve([str(item) for item in items])
    return list(raised.value.problems)


class TestFlags:
    @pytest.mark.parametrize(
        ("flags", "expected"),
        [
            ("--eval_tasks_interval 5", "--eval_tasks_interval: takes effect only with --eval_tasks; give that too"),
            ("--eval_tasks_device cpu", "--eval_tasks_device: takes effect only with --eval_tasks; give that too"),
            ("--eval_tasks a --eval_tasks_interval 0", "--eval_tasks_interval: must be at least 1, not 0"),
            (
                "--eval_tasks a --eval_tasks_interval 30 -i 20",
                "saved checkpoints can be evaluated; give 40, or give -i 30",
            ),
            ("--eval_tasks a --eval_tasks_interval 9 -i 0", "leave it out, as only the end is saved, or give -i 9"),
            ("--eval_tasks a --eval_tasks_device cuda", "--eval_tasks_device: 'cuda' is neither cpu nor cuda:N"),
            ("--eval_tasks a --eval_tasks_device=", "--eval_tasks_device: '' is neither cpu nor cuda:N"),
        ],
    )
    def test_mistakes(self, flags, expected):
        (problem,) = problems_of(f"-p zero2 {flags}")
        assert expected in problem

    def test_right_ones(self):
        for flags in ("", "--eval_tasks_interval 2000", "-i 0", "-i 7 --eval_tasks_interval 21"):
            assert problems_of(f"-p zero2 --eval_tasks hellaswag,arc_easy {flags}") == []

    def test_without_the_package(self, monkeypatch):
        monkeypatch.setattr(tasks, "PACKAGE", "no_such_package")
        with pytest.raises(InputError, match=r"--eval_tasks: the package no_such_package is not installed; install it"):
            check_tasks(Tasks(("hellaswag",)), dry_run=True)
        check_tasks(Tasks(), dry_run=False)

    def test_another_version(self, monkeypatch):
        monkeypatch.setattr(tasks, "PACKAGE", "json")  # a package without tasks
        assert "json None cannot list its tasks (No module named 'json.tasks'); install 0.4.13" in refusals("a")[0]

    def test_the_named_version_is_the_tested_one(self):
        requirements = (ROOT / "requirements-dev.txt").read_text()
        assert re.search(rf"^{tasks.PACKAGE}=={re.escape(tasks.VERSION)} ", requirements, re.MULTILINE)

    @pytest.mark.parametrize(
        ("device", "gpus", "ranks", "expected"),
        [
            ("cpu", 0, 1, None),
            ("cuda:7", 8, 7, None),
            ("cuda:6", 8, 7, "the run trains on cuda:6; give cuda:7 or cpu"),
            ("cuda:0", 1, 1, r"the run trains on cuda:0; start fewer ranks \(--nproc_per_node\), or give cpu"),
            ("cuda:8", 8, 7, "cuda:8 is none of the 8 visible GPUs; give cuda:7 or cpu"),
            ("cuda:0", 0, 1, "cuda:0 is none of the 0 visible GPUs; give cpu"),
        ],
    )
    def test_gpus_on_which_ranks_train_are_refused(self, monkeypatch, device, gpus, ranks, expected, tmp_path):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        chosen = Tasks((str(write_task(tmp_path, ANSWERS)),), eval_tasks_device=device)
        check_tasks(chosen, dry_run=True)
        if expected:
            with pytest.raises(InputError, match=f"--eval_tasks_device: {expected}"):
                check_tasks(chosen, dry_run=False)
        else:
            check_tasks(chosen, dry_run=False)

    def test_ranks_of_a_launcher_that_does_not_count_them_on_this_machine(self, monkeypatch, tmp_path):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
        monkeypatch.setattr(tasks, "once_per_node", lambda check: check())
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
        task = (str(write_task(tmp_path, ANSWERS)),)
        check_tasks(Tasks(task, eval_tasks_device="cuda:2"), dry_run=False)
        with pytest.raises(InputError, match="the run trains on cuda:1"):
            check_tasks(Tasks(task, eval_tasks_device="cuda:1"), dry_run=False)

    @pytest.mark.parametrize("device", ["cuda", "cuda:1", "gpu", "cuda:-1", "mps"])
    def test_the_script_takes_no_other_device(self, monkeypatch, device, tmp_path):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        flags = ["--eval_tasks=a", f"--checkpoint={tmp_path}", f"--output={tmp_path}/a.json"]
        monkeypatch.setattr(sys, "argv", ["evaluate_tasks.py", *flags, f"--eval_tasks_device={device}"])
        with pytest.raises(InputError, match=f"^--eval_tasks_device: '?{device}'? is "):
            evaluate_tasks.main()


class TestNames:
    def test_files_and_folders_of_them(self, tmp_path):
        file = write_task(tmp_path, ANSWERS)
        assert resolve([str(file)])[1] == ["code_words"]
        write_task(tmp_path / "deep", ANSWERS, "others")
        (tmp_path / "for_include.yaml").write_text('{"output_type": "multiple_choice"}')
        assert resolve([f"{tmp_path}/"])[1] == ["code_words", "others"]
        assert resolve([f"{tmp_path}/", str(file)])[1] == ["code_words", "others"]

    def test_a_group_stands_for_its_tasks(self, tmp_path):
        for name in ("first", "second", "third"):
            write_task(tmp_path, ANSWERS, name)
        group_file(tmp_path, ["first", {"task": "second", "num_fewshot": 1}])
        manager, names = resolve([f"{tmp_path}/"])
        assert names == ["both", "third"]
        assert inside(names, manager.task_index) == {"first", "second"}

    @pytest.mark.slow
    def test_names_of_the_package(self, monkeypatch, tmp_path):
        group = group_file(tmp_path, ["hellaswag", {"task": "arc_easy", "num_fewshot": 2}])
        manager, names = resolve([group, "mmlu", "mmlu_anatomy", "arc_chal*lenge"])
        assert names == ["both", "mmlu", "mmlu_anatomy", "arc_challenge"]
        assert {"mmlu_anatomy", "mmlu_stem", "hellaswag", "arc_easy"} <= inside(names, manager.task_index)
        monkeypatch.chdir(tmp_path)
        (tmp_path / "folder").mkdir()
        missing = group_file(tmp_path, ["no_such_task"], "missing")
        assert refusals("helaswag", "xyzzy", "folder", missing, "humaneval") == [
            "--eval_tasks: lm_eval has no task 'helaswag'; did you mean hellaswag? `lm_eval ls tasks` lists all",
            "--eval_tasks: lm_eval has no task 'xyzzy'; `lm_eval ls tasks` lists all",
            "--eval_tasks: lm_eval has no task 'folder'; for the folder of that name give folder/",
            "--eval_tasks: a group of yours has 'no_such_task', which is no task; give its file too, or their folder",
            "--eval_tasks: humaneval runs programs that the model writes, which is not supported; leave it out",
        ]

    def test_unreadable_files(self, tmp_path):
        write_task(tmp_path, ANSWERS)
        (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00task")
        (tmp_path / "include.yaml").write_text("include: gone.yaml\ntask: second")
        (tmp_path / "list.yaml").write_text("- task: third")
        (tmp_path / "syntax.yaml").write_text("task: [")
        problems = refusals(f"{tmp_path}/")
        assert [problem.partition(" cannot be read (")[0] for problem in problems] == [
            f"--eval_tasks: {tmp_path / name}.yaml" for name in ("bytes", "include", "list", "syntax")
        ]
        assert all("\n" not in problem for problem in problems)

    def test_paths_without_a_task(self, tmp_path):
        (tmp_path / "empty").mkdir()
        (tmp_path / "words.yaml").write_text("output_type: multiple_choice")
        assert refusals(tmp_path / "none.yaml", f"{tmp_path}/empty/", tmp_path / "words.yaml") == [
            f"--eval_tasks: {tmp_path}/none.yaml does not exist; give a task file (.yaml), a folder of them, or a name",
            f"--eval_tasks: {tmp_path}/empty describes no task: no .yaml file in it has a line `task: NAME`",
            f"--eval_tasks: {tmp_path}/words.yaml describes no task: it lacks a line `task: NAME`",
        ]

    def test_two_files_of_one_name(self, tmp_path):
        files = [write_task(tmp_path / folder, ANSWERS) for folder in ("a", "b")]
        assert refusals(*files) == [f"--eval_tasks: {files[1]} and {files[0]} both describe code_words; rename one"]


class TestEvaluation:
    def test_its_environment(self, monkeypatch):
        for name in ("RANK", "WORLD_SIZE", "GROUP_RANK", "ROLE_NAME", "TORCHELASTIC_ERROR_FILE", "OMP_NUM_THREADS"):
            monkeypatch.setenv(name, "1")
        monkeypatch.setenv("HF_TOKEN", "kept")
        monkeypatch.setenv("MY_RANK", "kept")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        found = task_evaluator.environment("cuda:7")
        assert [found[name] for name in ("CUDA_VISIBLE_DEVICES", "HF_TOKEN", "MY_RANK")] == ["7", "kept", "kept"]
        assert found[PARENT] == str(os.getpid())
        assert not [name for name in found if "WORLD" in name or name in ("RANK", "GROUP_RANK", "OMP_NUM_THREADS")]
        assert not [name for name in found if name.startswith(("TORCHELASTIC", "ROLE"))]
        assert task_evaluator.environment("cpu")["CUDA_VISIBLE_DEVICES"] == ""
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b,GPU-c")
        assert task_evaluator.environment("cuda:2")["CUDA_VISIBLE_DEVICES"] == "GPU-c"

    @pytest.mark.parametrize("links", [True, False])
    def test_the_files_of_a_checkpoint_outlive_it_as_links(self, monkeypatch, tmp_path, links):
        checkpoint = make_checkpoint(tmp_path / "epoch0-step2")
        if not links:
            monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("not on this file system")))
        held, work = task_evaluator._hold(checkpoint, tmp_path / ".evaluated-step2")
        assert (held == checkpoint) == (not links)
        names = {path.relative_to(checkpoint) for path in checkpoint.rglob("*") if path.is_file()}
        if links:
            assert {path.relative_to(held) for path in held.rglob("*") if path.is_file()} == names
            assert all((held / name).samefile(checkpoint / name) for name in names)
        else:
            assert list(work.iterdir()) == []

    def test_the_last_line_of_a_log(self, tmp_path):
        log = tmp_path / "log"
        for text, expected in (
            ("", "no output"),
            (f"{'x' * 9000}\n  0%|\r 50%|\rOSError: no room\n\n", "OSError: no room"),
            (f"Error: {'y' * 900}", f"Error: {'y' * 293}"),
        ):
            log.write_text(text)
            assert task_evaluator._last_line(log) == expected

    def test_a_process_without_output_has_hung(self, monkeypatch, tmp_path):
        monkeypatch.setattr(task_evaluator, "SILENT_SECONDS", 0.1)
        monkeypatch.setattr(task_evaluator, "POLL_SECONDS", 0.05)
        evaluator = object.__new__(task_evaluator.TaskEvaluator)
        with open(tmp_path / "log", "wb") as log:
            evaluator.process = subprocess.Popen(["sleep", "100"], stdout=log, start_new_session=True)
        assert evaluator._wait(evaluator.process, tmp_path / "log", tmp_path).startswith(
            "it has hung, without output for"
        )
        assert evaluator.process.wait() == -9

    def test_main_scores(self):
        results = {
            "results": {
                "both": {"alias": "both", "acc,none": 0.5, "acc_stderr,none": 0.1},
                "first": {"alias": " - first", "acc,none": 0.25, "sample_len": 4},
                "second": {"acc,none": 0.75},
                "third": {"exact_match,strict-match": 1, "f1,none": float("nan"), "f1_stderr,none": "N/A"},
            },
            "groups": {"both": {"acc,none": 0.5}},
            "group_subtasks": {"both": ["first", "second"], "third": []},
        }
        expected = {"both/acc": 0.5, "third/exact_match/strict-match": 1.0, "third/f1": None}
        assert evaluate_tasks.main_scores(results, ["both", "third"]) == expected
        assert evaluate_tasks.main_scores(results, ["both", "second", "third"]) == expected | {"second/acc": 0.75}
