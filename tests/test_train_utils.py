"""Flags, the plan of a run, the learning-rate schedule, batches by rank, and signals."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import boosted, run_ranks

from arguments import validate_args
from console import KEYBOARD_INTERRUPT, InputError
from data_order import GlobalOrder
from data_utils import PackedDataset
from files import checksum
from layout import Layout, resolve_layout
from model_utils import load_config
from pretrain import parse_args
from run_plan import Plan, TrainState, announce, make_plan, resume_state
from signals import StopRequest
from train_utils import build_dataloader, build_scheduler, check_same_batch, cosine_with_warmup, step_seed

ROOT = Path(__file__).resolve().parent.parent


class TestFlags:
    # The table of the specification: flag, short form, default.
    @pytest.mark.parametrize(
        ("flag", "short", "default"),
        [
            ("config", "c", "7b"),
            ("plugin", "p", "gemini"),
            ("dataset", "d", "togethercomputer/RedPajama-Data-1T-Sample"),
            ("num_epochs", "e", 1),
            ("batch_size", "b", 2),
            ("lr", None, 3e-4),
            ("weight_decay", "w", 0.1),
            ("warmup_steps", "s", 2000),
            ("gradient_checkpoint", "g", False),
            ("max_length", "l", 4096),
            ("mixed_precision", "x", "fp16"),
            ("save_interval", "i", 1000),
            ("save_dir", "o", Path("checkpoint")),
            ("load", "f", None),
            ("gradient_clipping", None, 1.0),
            ("tensorboard_dir", "t", Path("tb_logs")),
            ("flash_attention", "a", False),
            ("tokenizer", None, "hf-internal-testing/llama-tokenizer"),
        ],
    )
    def test_names_short_forms_and_defaults(self, flag, short, default):
        assert getattr(parse_args([]), flag) == default
        if default is False:
            arguments, value = [], True
        else:
            value = {"plugin": "zero2", "mixed_precision": "bf16"}.get(flag, 7 if isinstance(default, int) else "1")
            arguments, value = [str(value)], type(default)(value) if default is not None else value
        for spelling in (f"--{flag}", f"-{short}") if short else (f"--{flag}",):
            assert getattr(parse_args([spelling, *arguments]), flag) == value

    def test_older_spellings_are_accepted_and_unlisted(self, capsys):
        args = parse_args(["--weigth_decay", "0.2", "--grad_checkpoint", "--grad_clip", "3"])
        assert (args.weight_decay, args.gradient_checkpoint, args.gradient_clipping) == (0.2, True, 3.0)
        with pytest.raises(SystemExit):
            parse_args(["--help"])
        listed = capsys.readouterr().out
        assert "--weight_decay" in listed
        assert not any(old in listed for old in ("weigth_decay", "grad_checkpoint", "--grad_clip "))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--nonsense"], "unrecognized arguments: --nonsense (see --help)"),
            (["--batch", "4"], "unrecognized arguments: --batch 4 (see --help)"),
            (["-b", "two"], "argument -b/--batch_size: invalid int value: 'two' (see --help)"),
            (["-p", "zero9"], "argument -p/--plugin: invalid choice: 'zero9'"),
        ],
    )
    def test_mistakes_are_input_errors(self, arguments, message):
        with pytest.raises(InputError) as caught:
            parse_args(arguments)
        assert str(caught.value).startswith(message)


def problems_of(flags, model="test"):
    try:
        validate_args(parse_args(["-l", "128", *flags.split()]), load_config(model))
    except InputError as error:
        return list(error.problems)
    return []


class TestValidate:
    def test_defaults_are_valid(self):
        validate_args(parse_args([]), load_config("7b"))

    @pytest.mark.parametrize(
        ("flags", "problem"),
        [
            ("-e 0", "--num_epochs: 0 is below the least possible, 1"),
            ("-b 0", "--batch_size: 0 is below the least possible, 1"),
            ("--accumulation_steps -1", "--accumulation_steps: -1 is below the least possible, 1"),
            ("-l 1", "--max_length: 1 is below the least possible, 2"),
            ("-l 129", "--max_length: 129 is above the model's context of 128 tokens"),
            ("--max_steps 0", "--max_steps: 0 is below the least possible, 1"),
            ("-i 0", "--save_interval: 0 is below the least possible, 1"),
            ("--log_interval 0", "--log_interval: 0 is below the least possible, 1"),
            ("-s -1", "--warmup_steps: -1 is below the least possible, 0"),
            ("--num_workers -1", "--num_workers: -1 is below the least possible, 0"),
            ("--seed -1", "--seed: -1 is below the least possible, 0"),
            ("--lr 0", "--lr: 0.0 is not a positive number"),
            ("--lr nan", "--lr: nan is not a positive number"),
            ("--lr inf", "--lr: inf is not a positive number"),
            ("-w -0.1", "--weight_decay: -0.1 is not a non-negative number"),
            ("--gradient_clipping nan", "--gradient_clipping: nan is not a non-negative number"),
            ("--eval_interval 0", "--eval_interval: 0 is below the least possible, 1"),
            ("--eval_fraction 1", "--eval_fraction: 1.0 is not at least 0 and below 1"),
            ("--shuffle_buffer 0", "--shuffle_buffer: 0 is below the least possible, 1"),
            ("--streaming", "--streaming: a stream has no end; give --max_steps"),
            (
                "--streaming --max_steps 9 --eval_fraction 0.1",
                "--eval_fraction: documents are held out when a data set is prepared, not from a stream",
            ),
            ("-p zero2 --tp 2", "--tp: takes effect with -p hybrid_parallel alone, not with -p zero2"),
        ],
    )
    def test_each_problem(self, flags, problem):
        assert problems_of(flags) == [problem]

    @pytest.mark.parametrize("flags", ["-s 0", "-w 0 --gradient_clipping 0", "--no-compile", "-l 2"])
    def test_least_values_are_allowed(self, flags):
        assert problems_of(flags) == []

    def test_all_problems_at_once(self):
        flags = "-e 0 -b 0 --lr -1 -l 4096 -o /dev/null -t /dev/null/logs"
        names = [problem.split(":")[0] for problem in problems_of(flags)]
        assert names == [
            "--num_epochs",
            "--batch_size",
            "--lr",
            "--max_length",
            "--save_dir",
            "--tensorboard_dir",
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


FOUR_RANKS = Layout(tp=1, pp=1, sp=1, dp=4, zero_stage=2)


def plan_of(flags, data, **state):
    """The plan on four ranks for `data` sequences."""
    args = parse_args(["-s", "0", *flags.split()])
    return make_plan(args, FOUR_RANKS, PackedStub(data, args.max_length), TrainState(**state))


class TestPlan:
    def test_global_batch_and_end_of_the_data(self):
        plan = plan_of("-b 3 --accumulation_steps 5 -l 100", data=125)
        assert (plan.global_batch, plan.tokens_per_step) == (3 * 5 * 4, 6000)
        assert (plan.total_steps, plan.total_sequences) == (2, 125)

    def test_epochs_share_their_last_batch(self):
        assert plan_of("-b 1 -e 3", data=10).total_steps == 7  # 30 sequences in batches of 4

    @pytest.mark.parametrize(("max_steps", "total"), [(1, 1), (24, 24), (25, 25), (26, 25)])
    def test_max_steps(self, max_steps, total):
        assert plan_of(f"-b 1 --max_steps {max_steps}", data=100).total_steps == total

    @pytest.mark.parametrize(("batch_size", "total"), [(2, 25), (4, 17), (1, 40), (30, 11)])
    def test_resume_with_another_batch_goes_on_where_the_data_was_left(self, batch_size, total):
        resumed = dict(step=10, sequences=80)  # ten steps of eight; 120 are left of 200
        if total == 10:
            with pytest.raises(InputError, match="checkpoint is at step 10 and the run ends at step 10"):
                plan_of(f"-b {batch_size}", data=200, **resumed)
        else:
            assert plan_of(f"-b {batch_size}", data=200, **resumed).total_steps == total

    def test_resume_of_a_finished_run(self):
        with pytest.raises(InputError, match="at step 10 and the run ends at step 5; raise --max_steps"):
            plan_of("-b 1 --max_steps 5", 100, step=10)

    def test_too_little_data(self):
        message = "7 sequences x --num_epochs 1 do not fill one global batch of 8"
        with pytest.raises(InputError, match=message):
            plan_of("-b 2", data=7)
        assert plan_of("-b 2 -e 2", data=7).total_steps == 1

    def test_default_warmup_longer_than_the_run_is_an_error_and_a_chosen_one_is_not(self):
        args = parse_args(["-b", "1"])
        with pytest.raises(InputError, match=r"default of 2000 is longer than the run of 25 steps; .* -s 1"):
            make_plan(args, FOUR_RANKS, PackedStub(100), TrainState())
        args = parse_args(["-b", "1", "-s", "2000"])
        assert make_plan(args, FOUR_RANKS, PackedStub(100), TrainState()).total_steps == 25

    def test_announces_the_global_batch_and_the_layout(self, capsys):
        args = parse_args(
            [
                "-c",
                "test",
                "-p",
                "hybrid_parallel",
                "-b",
                "2",
                "--accumulation_steps",
                "3",
                "-l",
                "64",
                "-x",
                "bf16",
                "-s",
                "0",
            ]
        )
        plan = make_plan(args, Layout(2, 1, 1, 4, 1), PackedStub(100), TrainState())
        announce(args, load_config("test"), PackedStub(100), plan, "attention: plain")
        lines = capsys.readouterr().out.splitlines()
        assert lines == [
            "model: test, 315,968 parameters, bf16; attention: plain",
            "data: 100 sequences of 64 tokens; 5 tokens left over",
            "plugin: hybrid_parallel, 4 data-parallel, tp 2 x pp 1 x sp 1, ZeRO 1",
            "global batch: 2 x 3 accumulated x 4 ranks = 24 sequences x 64 tokens = 1,536 tokens",
            "length: 4 optimizer steps, 6,144 tokens",
        ]


class PackedStub:
    """The length of a data set and what identifies it."""

    fingerprint, tail_tokens = "abc", 5
    slice_weights = document_ends = None
    mean_length, description = PackedDataset.mean_length, PackedDataset.description
    fix_order = PackedDataset.fix_order

    def __init__(self, sequences, max_length=64):
        self.sequences, self.max_length = sequences, max_length

    def __len__(self):
        return self.sequences


class TestResumeState:
    SETTINGS = {  # noqa: RUF012
        "seed": 42,
        "max_length": 64,
        "lr": 3e-4,
        "warmup_steps": 0,
        "weight_decay": 0.1,
        "gradient_clipping": 1.0,
        "schedule_steps": 16,
        "data": "abc",
        "slice_weights": None,
        "document_mask": False,
    }
    FLAGS = ("-l", "64", "-s", "0", "-b", "2", "-e", "3")

    @pytest.fixture
    def checkpoint(self, tmp_path):
        folder = tmp_path / "epoch1-step9"
        folder.mkdir()
        state = TrainState(1, 9, 72, 4608, 2, self.SETTINGS)
        text = json.dumps({**asdict(state), "adam_steps": 7, "loss_scaler": None})
        (folder / "running_states.json").write_text(text)
        files = {"running_states.json": checksum(folder / "running_states.json")}
        (folder / "manifest.json").write_text(json.dumps({"files": files}))
        return folder, state

    def test_fresh(self):
        args = parse_args(list(self.FLAGS))
        assert resume_state(args, PackedStub(43)) == (TrainState(), None)
        state = TrainState()
        make_plan(args, FOUR_RANKS, PackedStub(43), state)
        assert state.settings == self.SETTINGS

    def test_everything_comes_back(self, checkpoint):
        folder, state = checkpoint
        for load in ("latest", str(folder)):
            args = parse_args([*self.FLAGS, "-o", str(folder.parent), "-f", load])
            assert resume_state(args, PackedStub(43)) == (state, folder)
        assert state.adam_steps == 7
        assert make_plan(args, FOUR_RANKS, PackedStub(43), state).total_steps == 16

    def test_damaged(self, checkpoint):
        folder, _ = checkpoint
        path = folder / "running_states.json"
        path.write_bytes(path.read_bytes().replace(b"4608", b"4609"))
        with pytest.raises(InputError, match=r"running_states.json is damaged; choose another checkpoint"):
            resume_state(parse_args([*self.FLAGS, "-f", str(folder)]), PackedStub(43))

    def test_later_checkpoints_are_not_mixed_with_this_runs(self, checkpoint, tmp_path):
        folder, state = checkpoint
        later = folder.with_name("epoch1-step10")
        shutil.copytree(folder, later)
        with pytest.raises(InputError, match=r"is at step 9, and --save_dir .* holds later .* epoch1-step10"):
            resume_state(parse_args([*self.FLAGS, "-o", str(folder.parent), "-f", str(folder)]), PackedStub(43))
        elsewhere = parse_args([*self.FLAGS, "-o", str(tmp_path / "other"), "-f", str(folder)])
        assert resume_state(elsewhere, PackedStub(43)) == (state, folder)

    def test_another_runs_checkpoints_are_not_mixed_with_this_runs(self, checkpoint, tmp_path):
        """They would be later removed by --keep_checkpoints, or resumed instead of this run's."""
        folder, _ = checkpoint
        (tmp_path / "other").mkdir()
        there = shutil.copytree(folder, tmp_path / "other" / "epoch0-step3")
        with pytest.raises(
            InputError, match=f"--save_dir: {there.parent} holds checkpoints of another run than --load"
        ):
            resume_state(parse_args([*self.FLAGS, "-o", str(there.parent), "-f", str(folder)]), PackedStub(43))

    @pytest.mark.parametrize("flags", [(), ("-f", "latest")])
    def test_a_new_run_does_not_take_the_place_of_a_model(self, tmp_path, flags):
        (tmp_path / "final").mkdir()
        with pytest.raises(InputError, match="holds the final model of a run; give another folder"):
            resume_state(parse_args([*self.FLAGS, "-o", str(tmp_path), *flags]), PackedStub(43))

    def test_latest_begins_a_run_that_has_no_checkpoint_yet(self, tmp_path, capsys):
        """As a job that was killed before its first, and is queued again."""
        (tmp_path / ".epoch0-step9.incomplete").mkdir()
        args = parse_args([*self.FLAGS, "-o", str(tmp_path), "-f", "latest"])
        assert resume_state(args, PackedStub(43)) == (TrainState(), None)
        assert f"no checkpoint in --save_dir {tmp_path} yet; a new run begins" in capsys.readouterr().out
        (tmp_path / "epoch0-step9").mkdir()
        with pytest.raises(InputError, match=r"no complete checkpoint in .*; move the incomplete ones away"):
            resume_state(args, PackedStub(43))

    def test_adapters_of_other_sizes_are_refused_even_where_changes_are_allowed(self):
        args = parse_args([*self.FLAGS, "-f", "latest", "--allow_changes"])
        args.lora_rank = 8
        with pytest.raises(InputError, match=r"^--load: --lora_rank was 4 in the checkpoint and is 8 now$"):
            make_plan(args, FOUR_RANKS, PackedStub(43), TrainState(settings={**self.SETTINGS, "lora_rank": 4}))

    def test_names_all_that_differs_and_takes_it_when_told_to(self, checkpoint, capsys):
        folder, _ = checkpoint
        dataset = PackedStub(43)
        dataset.fingerprint = "other"
        flags = ["-l", "32", "-s", "0", "-b", "2", "-e", "3", "--seed", "1", "--lr", "1e-3", "-f", str(folder)]
        args = parse_args(flags)
        state, _ = resume_state(args, dataset)
        with pytest.raises(InputError) as caught:
            make_plan(args, FOUR_RANKS, dataset, state)
        lines = [
            "--load: --seed was 42 in the checkpoint and is 1 now",
            "--load: --max_length was 64 in the checkpoint and is 32 now",
            "--load: --lr was 0.0003 in the checkpoint and is 0.001 now",
            "--load: the data was abc in the checkpoint and is other now",
        ]
        assert caught.value.problems == (*lines[:-1], f"{lines[-1]}; --allow_changes resumes all the same")

        args = parse_args([*flags, "--allow_changes"])
        state, _ = resume_state(args, dataset)
        assert state.sequences == 0  # other data are read from their beginning
        plan = make_plan(args, FOUR_RANKS, dataset, state)
        assert plan.total_steps == 9 + 3 * 43 // 8
        first, *said = capsys.readouterr().out.splitlines()
        assert first == "--load: the data are read from their beginning, since they have another order now"
        assert [
            line.removesuffix(", as --allow_changes allows") for line in said if "length of the run" not in line
        ] == lines
        assert (state.settings["lr"], state.settings["data"]) == (1e-3, "other")


class TestSchedule:
    def test_warm_up_is_linear_from_the_first_step_and_ends_at_the_peak(self):
        values = [cosine_with_warmup(step, 4, 100) for step in range(5)]
        assert values == [0.25, 0.5, 0.75, 1.0, 1.0]

    def test_cosine_ends_at_a_tenth(self):
        assert cosine_with_warmup(52, 4, 100) == pytest.approx(0.55)  # half way
        assert cosine_with_warmup(100, 4, 100) == pytest.approx(0.1)
        assert cosine_with_warmup(99, 4, 100) == pytest.approx(0.1, abs=1e-3)
        assert cosine_with_warmup(1000, 4, 100) == pytest.approx(0.1)
        falling = [cosine_with_warmup(step, 4, 100) for step in range(4, 101)]
        assert falling == sorted(falling, reverse=True)

    def test_without_warm_up_and_with_nothing_else(self):
        assert cosine_with_warmup(0, 0, 10) == 1.0
        assert [cosine_with_warmup(step, 10, 10) for step in (0, 9)] == [0.1, 1.0]
        assert cosine_with_warmup(0, 0, 0) > 0

    @pytest.mark.parametrize("resumed", [0, 1, 4, 7, 19])
    def test_scheduler_is_a_function_of_the_step(self, resumed):
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=5.0)
        args, plan = parse_args(["-s", "4", "--lr", "1e-3"]), plan_of("-b 1", data=80)
        scheduler = build_scheduler(Namespace(optim=optimizer), args, TrainState(step=resumed), plan)
        rates = []
        for _ in range(resumed, plan.total_steps):
            rates.append(optimizer.param_groups[0]["lr"])
            assert scheduler.get_last_lr() == [rates[-1]]
            optimizer.step()
            scheduler.step()
        assert rates == pytest.approx([1e-3 * cosine_with_warmup(step, 4, 20) for step in range(resumed, 20)])


class TestDataloader:
    @pytest.mark.parametrize(
        ("ranks", "flags", "coordinates"),
        [
            (2, "-p zero2", [0, 1]),
            (2, "-p gemini", [0, 1]),
            (2, "-p hybrid_parallel --tp 2 --pp 1", [0, 0]),
            (2, "-p hybrid_parallel --tp 1 --pp 2", [0, 0]),
            (2, "-p hybrid_parallel --tp 1 --pp 1 --sp 2", [0, 0]),
            (4, "-p hybrid_parallel --tp 2 --pp 1", [0, 0, 1, 1]),
        ],
    )
    def test_peers_read_the_same_and_others_their_share_of_the_order(self, ranks, flags, coordinates):
        data_parallel = len(set(coordinates))
        order = GlobalOrder(50, 42, True)
        for batches, coordinate in zip(run_ranks(ranks, read_batches, flags, data_parallel), coordinates, strict=True):
            positions = range(20 + coordinate, 52, data_parallel)  # from sequence 20 of the order on, 32 in all
            assert batches == [[order[first], order[second]] for first, second in pairs(positions)]

    def test_a_peer_with_another_batch_is_found_out(self):
        messages = run_ranks(2, read_differently, "-p hybrid_parallel --tp 2 --pp 1")
        assert messages == ["rank 1 reads another batch than its model-parallel peers at 20"] * 2

    def test_ranks_without_a_share_of_their_own_are_found_out(self):
        messages = run_ranks(2, count_shares, "-p hybrid_parallel --tp 2 --pp 1")
        assert messages == ["1 shares of the data are read by 2 data-parallel ranks"] * 2


def pairs(positions):
    return zip(positions[::2], positions[1::2], strict=True)


class NumberedSequences(list):
    slice_weights = None
    order, collate = PackedDataset.order, None


def loader_of(flags):
    run = boosted(flags + " -b 2 -s 0 --num_workers 0 -e 2")
    dataset = NumberedSequences({"input_ids": torch.tensor([number])} for number in range(50))
    layout = resolve_layout(run.args, run.config)
    state = TrainState(step=5, sequences=20)
    plan = Plan(layout, 2 * layout.dp, 64.0, total_steps=5 + 16 // layout.dp, total_sequences=100)
    return build_dataloader(run.plugin, dataset, run.args, state, plan)


def read_batches(flags, data_parallel):
    loader = loader_of(flags)
    batches = list(loader)
    check_same_batch(loader, batches[0], data_parallel)
    return [batch["input_ids"].flatten().tolist() for batch in batches]


def read_differently(flags):
    loader = loader_of(flags)
    batch = next(iter(loader))
    batch["input_ids"][0] += dist.get_rank()
    with pytest.raises(AssertionError) as caught:
        check_same_batch(loader, batch, data_parallel=1)
    return str(caught.value)


def count_shares(flags):
    loader = loader_of(flags)
    with pytest.raises(AssertionError) as caught:
        check_same_batch(loader, next(iter(loader)), data_parallel=2)
    return str(caught.value)


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
    def test_an_interrupt_after_a_signal_ends_the_process_in_a_call_into_c_too(self, first):
        lock_twice = (
            "lock = ctypes.create_string_buffer(64); [ctypes.CDLL(None).pthread_mutex_lock(lock) for _ in 'ab']"
        )
        with program(f"import ctypes, signals; signals.StopRequest(); print('ready', flush=True); {lock_twice}") as run:
            assert run.stdout.readline() == "ready\n"
            run.send_signal(first)
            time.sleep(0.2)
            assert run.poll() is None
            run.send_signal(signal.SIGINT)
            assert run.wait(timeout=10) == KEYBOARD_INTERRUPT

    @pytest.mark.parametrize("ignored", [True, False])
    def test_hang_up_is_ignored_where_it_was(self, ignored):
        """As under nohup."""
        before = "signal.signal(signal.SIGHUP, signal.SIG_IGN);" if ignored else ""
        hang_up = "stop = signals.StopRequest(); os.kill(os.getpid(), signal.SIGHUP); print(stop.received)"
        with program(f"import os, signal, signals; {before} {hang_up}") as run:
            assert run.stdout.read() == f"{not ignored}\n"


@contextlib.contextmanager
def program(code):
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_every_step_and_rank_draws_other_random_numbers(monkeypatch):
    seeds = set()
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        seeds |= {step_seed(seed, step) for seed in range(3) for step in range(3)}
    assert len(seeds) == 27
    assert {step_seed(seed, step) for seed in range(3) for step in range(3)} < seeds  # nothing else goes in
