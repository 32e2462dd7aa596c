"""Checks of the flags against each other and the model."""

import pytest

from runs import problems_of

HYBRID = "-p hybrid_parallel"


class TestChecks:
    def test_defaults_are_valid(self):
        assert problems_of("-c 7b -l 4096") == []

    @pytest.mark.parametrize(
        ("flags", "problem"),
        [
            ("-e 0", "--num_epochs: must be at least 1, not 0"),
            ("-b 0", "--batch_size: must be at least 1, not 0"),
            ("--accumulation_steps -1", "--accumulation_steps: must be at least 1, not -1"),
            ("-l 1", "--max_length: must be at least 2, not 1"),
            ("-l 129", "--max_length: 129 is above the model's context of 128 tokens; give at most that"),
            ("--max_steps 0", "--max_steps: must be at least 1, not 0"),
            ("-i -1", "--save_interval: must be at least 0, not -1"),
            ("--skip_spikes 0", "--skip_spikes: must be at least 1 standard deviation, not 0.0; OLMo uses 6"),
            ("--log_interval 0", "--log_interval: must be at least 1, not 0"),
            ("--hang_timeout -1", "--hang_timeout: must be at least 0, not -1"),
            ("-s -1", "--warmup_steps: must be at least 0, not -1"),
            ("--num_workers -1", "--num_workers: must be at least 0, not -1"),
            ("--seed -1", "--seed: must be at least 0, not -1"),
            ("--lr 0", "--lr: 0.0 is not a positive number"),
            ("--lr nan", "--lr: nan is not a positive number"),
            ("--lr inf", "--lr: inf is not a positive number"),
            ("-w -0.1", "--weight_decay: -0.1 is not a non-negative number"),
            ("--gradient_clipping nan", "--gradient_clipping: nan is not a non-negative number"),
            ("--adam_eps 1e-60", "--adam_eps: 1e-60 is outside the range of float32, 1.2e-38 to 3.4e+38"),
            (
                "--compile -x bf16 --fp8 --fp8_recipe rowwise",
                "--compile: without a GPU torch compiles --fp8_recipe rowwise to NaN gradients; leave it out",
            ),
            ("--lr 1e300", "--lr: 1e+300 is outside the range of float32, 1.2e-38 to 3.4e+38"),
            (
                "--exchange micro_batch",
                "--exchange: takes effect only with --accumulation_steps; give that too, or leave it out",
            ),
            ("--eval_interval 0", "--eval_interval: must be at least 1, not 0"),
            ("--eval_fraction 1", "--eval_fraction: must be at least 0 and below 1, not 1.0"),
            ("--shuffle_buffer 0", "--shuffle_buffer: must be at least 1, not 0"),
            ("--streaming", "--streaming: a stream has no end; give --max_steps"),
            (
                "--streaming --max_steps 9 -e 2",
                "--num_epochs: a stream has no end, so it has no epochs; leave the flag out",
            ),
            (
                "--streaming --max_steps 9 --eval_interval 1000",
                "--eval_interval: a stream has no held-out documents; leave out this or --streaming",
            ),
            (
                "--streaming --max_steps 9 --eval_first",
                "--eval_first: a stream has no held-out documents; leave out this or --streaming",
            ),
            (
                "--shuffle_buffer 2048",
                "--shuffle_buffer: takes effect only with --streaming; give that too, or leave it out",
            ),
            (
                "--keep_every 4",
                "--keep_every: takes effect only with --keep_checkpoints; give that too, or leave it out",
            ),
            ("--allow_changes", "--allow_changes: takes effect only with --load; give that too, or leave it out"),
            (
                "--mfu 0.4",
                "--mfu: takes effect only with --dry_run; give that too, or leave it out: a launcher sets the GPUs",
            ),
            (
                "--streaming --max_steps 9 --eval_fraction 0.1",
                "--eval_fraction: a stream has no held-out documents; leave out this or --streaming",
            ),
            (
                "-p gemini_auto --deterministic",
                "--deterministic: gemini_auto chooses during the run which states the GPU updates, and the host rounds "
                "them differently; take another plugin, or leave the flag out",
            ),
            ("-p zero2 --tp 2", "--tp: takes effect only with -p hybrid_parallel, not with -p zero2"),
        ],
    )
    def test_each_problem(self, flags, problem):
        assert problems_of(flags) == [problem]

    @pytest.mark.parametrize("flags", ["-s 0", "-w 0 --gradient_clipping 0", "--no-compile", "-l 2"])
    def test_least_values_are_allowed(self, flags):
        assert problems_of(flags) == []

    @pytest.mark.parametrize(
        ("name", "value", "needed"),
        [("CUBLAS_WORKSPACE_CONFIG", ":0:0", ":4096:8"), ("NCCL_NVLS_ENABLE", "1", "0")],
    )
    def test_variables_that_are_not_deterministic(self, monkeypatch, name, value, needed):
        monkeypatch.setenv(name, value)
        remedy = "unset the variable, or leave the flag out"
        assert problems_of("--deterministic") == [f"--deterministic: needs {name}={needed}, not {value}; {remedy}"]
        assert problems_of("") == []
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
        monkeypatch.setenv("NCCL_NVLS_ENABLE", "0")
        assert problems_of("--deterministic") == []

    def test_all_problems_at_once(self):
        flags = "-e 0 -b 0 --lr -1 -l 4096 -o /dev/null -t /dev/null/logs"
        names = [problem.split(":")[0] for problem in problems_of(flags)]
        assert names == [
            "--num_epochs",
            "--save_dir",
            "--tensorboard_dir",
            "--batch_size",
            "--lr",
            "--max_length",
        ]

    def test_folders_are_checked_and_not_made(self, tmp_path):
        assert problems_of(f"-o {tmp_path}/a/b -t {tmp_path}/c") == []
        assert list(tmp_path.iterdir()) == []
        (tmp_path / "file").touch()
        assert problems_of(f"-o {tmp_path}/file/b") == [f"--save_dir: {tmp_path}/file is a file; give a folder"]

    def test_folder_without_permission(self, locked_folder):
        allowed = locked_folder.with_name("open")
        (problem,) = problems_of(f"-o {locked_folder}/a -t {allowed}/a")
        assert problem == f"--save_dir: no permission to write in {locked_folder}; give another folder"
        assert problems_of(f"-o {allowed}/a -t {allowed}/b") == []

    @pytest.mark.parametrize(
        ("flags", "ranks", "expected"),
        [
            ("--keep_attention -a", 1, ["--keep_attention", "nothing is recomputed", "-g"]),
            ("--keep_attention -a --recompute 0.1", 1, ["--keep_attention", "nothing is recomputed"]),  # of 4 layers
            ("--keep_attention -g", 1, ["--keep_attention", "give -a"]),
            ("-b -2", 1, ["--batch_size", "-2"]),
            ("--lr -0.1", 1, ["--lr", "-0.1"]),
            ("--lr -1e-3", 1, ["--lr", "-0.001 is not a positive number"]),
            ("--lr -inf", 1, ["--lr", "-inf is not a positive number"]),
            ("--lr -.5E2", 1, ["--lr", "-50.0"]),
            ("--lr 1e400", 1, ["--lr", "inf"]),
            ("-w -1e-3", 1, ["--weight_decay", "-0.001"]),
            ("--gradient_clipping -1", 1, ["--gradient_clipping", "-1"]),
            ("-p gemini -x fp32", 1, ["--mixed_precision", "gemini", "zero2"]),
            (f"{HYBRID} --tp 8", 8, ["--tp", "8", "4 heads", "2 key-value heads"]),
            (f"{HYBRID} --tp 1 --pp 3 -b 4", 3, ["--pp", "3", "4 layers"]),
            (f"{HYBRID} --tp 2 --pp 2", 6, ["--tp/--pp/--sp", "4", "6 ranks"]),
            (f"{HYBRID} --tp 0", 1, ["--tp", "0"]),
            (f"{HYBRID} --pp -1", 1, ["--pp", "-1"]),
            (f"{HYBRID} --microbatch_size 0", 1, ["--microbatch_size", "0"]),
            (f"{HYBRID} --tp 1 --pp 2 -b 4 --microbatch_size 3", 2, ["--microbatch_size", "3", "4"]),
            (f"{HYBRID} --tp 1 --pp 2 -b 1", 2, ["--pp", "2", "1"]),
            (f"{HYBRID} --tp 1 --pp 2 --zero 2", 2, ["--zero", "2", "--pp"]),
            (f"{HYBRID} --tp 1 --pp 2 --sp 2 -b 4", 4, ["--sp", "--pp"]),
            (f"{HYBRID} --tp 1 --pp 1 --sp 2 -l 63", 2, ["--sp", "2", "63"]),
            (f"{HYBRID} --tp 1 --pp 1 --zero 1 -x fp32", 2, ["--zero", "1", "fp32"]),
        ],
    )
    def test_one_line_names_the_flag_and_the_numbers(self, become_rank_0, flags, ranks, expected):
        if ranks > 1:
            become_rank_0(ranks)
        (problem,) = problems_of(f"-p zero2 -l 64 {flags}")
        assert all(part in problem for part in expected), problem
