"""The plan of a run, and the state that a resumed run takes over."""

import json
import shutil
from dataclasses import asdict, replace

import pytest

from attn import TORCH_FUSED
from checkpointing.adapters import Lora
from checkpoints import make_checkpoint
from data_utils import PackedDataset
from engine.job import Job
from model_utils import load_config
from runs import run_from
from runtime.console import InputError
from training import folders
from training.announcements import announce
from training.folders import check_folders, claim_folders, resume_state
from training.plan import make_plan
from training.run import TrainState, complete

FOUR_RANKS = ("-c", "test", "-p", "zero2", "--gpus", "4")


def plan_of(flags, data, **state):
    """Return the plan on four ranks for `data` sequences."""
    run = run_from(*FOUR_RANKS, "-s", "0", *flags.split())
    return make_plan(run, [PackedStub(data, run.job.batch.max_length)], TrainState(**state))


def test_a_complete_run_leaves_the_one_before_as_it_was(tokenizer):
    run = run_from(*FOUR_RANKS, "-x", "bf16", "-a")
    before = run.job.config.to_dict()
    config = complete(run, tokenizer, inside_documents=False)[0].job.config
    assert run.job.config.to_dict() == before
    assert config._attn_implementation == TORCH_FUSED
    changes = {
        "torch_dtype": "bfloat16",
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    assert config.to_dict() == before | changes


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
    def test_resume_with_another_batch_size_continues_at_the_position_in_the_data(self, batch_size, total):
        resumed = dict(step=10, sequences=80)  # ten steps of eight; 120 are left of 200
        if total == 10:
            with pytest.raises(InputError, match="checkpoint is at step 10 and the run ends at step 10"):
                plan_of(f"-b {batch_size}", data=200, **resumed)
        else:
            assert plan_of(f"-b {batch_size}", data=200, **resumed).total_steps == total

    def test_a_resume_prints_a_change_of_the_global_batch(self, capsys):
        resumed = dict(step=10, sequences=80, tokens=5120, global_batch=8)
        same, more = plan_of("-b 2", data=200, **resumed), plan_of("-b 4", data=200, **resumed)
        (line,) = capsys.readouterr().out.splitlines()
        assert line.startswith("--load: a step had 8 sequences up to the checkpoint and has 16 now")
        announce(run_from(*FOUR_RANKS), more, "attention: plain", on_gpu=False)
        assert capsys.readouterr().out.splitlines()[-2] == (
            "length: 17 optimizer steps, 463,872 tokens; 10 steps, 5,120 tokens are done"
        )
        assert more.total_tokens == 5120 + 7 * 16 * 4096
        assert same.remaining_tokens == 15 * 8 * 4096

    def test_resume_of_a_finished_run(self):
        with pytest.raises(InputError, match="at step 10 and the run ends at step 5; raise --max_steps"):
            plan_of("-b 1 --max_steps 5", 100, step=10)

    def test_too_little_data(self):
        message = "7 sequences x --num_epochs 1 do not fill one global batch of 8"
        with pytest.raises(InputError, match=message):
            plan_of("-b 2", data=7)
        assert plan_of("-b 2 -e 2", data=7).total_steps == 1

    def test_a_warmup_longer_than_the_run_is_an_error_only_by_default(self):
        run = run_from(*FOUR_RANKS, "-b", "1")
        with pytest.raises(InputError, match=r"default of 2000 is longer than the run of 25 steps; .* -s 1"):
            make_plan(run, [PackedStub(100)], TrainState())
        run = run_from(*FOUR_RANKS, "-b", "1", "-s", "2000")
        assert make_plan(run, [PackedStub(100)], TrainState()).total_steps == 25

    def test_announces_the_global_batch_and_the_layout(self, capsys):
        layout = "-p hybrid_parallel --tp 2 --pp 1 --gpus 8"
        run = run_from(*f"-c test {layout} -b 2 --accumulation_steps 3 -l 64 -x bf16 -s 0".split())
        plan = make_plan(run, [PackedStub(100)], TrainState())
        announce(run, plan, "attention: plain", on_gpu=False)
        lines = capsys.readouterr().out.splitlines()
        assert lines == [
            "model: test, 315,968 parameters, bf16; attention: plain",
            "data: 100 sequences of 64 tokens; 5 tokens left over",
            "plugin: hybrid_parallel, 4 data-parallel, tp 2 x pp 1 x sp 1, ZeRO 1",
            "global batch: 2 x 3 accumulated x 4 data-parallel = 24 sequences x 64 tokens = 1,536 tokens",
            "length: 4 optimizer steps, 6,144 tokens",
            "left out: the last 4 of 100 sequences, too few for one more step",
        ]

    @pytest.mark.parametrize(
        ("flags", "said"),
        [
            ("--max_steps 25", []),  # 4 sequences a step
            ("--max_steps 24", []),
            (
                "--max_steps 1000",
                ["--max_steps: the data end before step 1,000; --num_epochs 40 --max_steps 1000 reaches it"],
            ),
            ("--accumulation_steps 15", ["left out: the last 40 of 100 sequences, too few for one more step"]),
            ("--accumulation_steps 15 -e 2", ["left out: the last 20 of 200 sequences, too few for one more step"]),
            ("--accumulation_steps 15 -e 3", []),
        ],
    )
    @pytest.mark.parametrize("sequences", [0, 60])
    def test_prints_steps_beyond_the_data_and_sequences_left_out(self, capsys, flags, said, sequences):
        """From the start, or resumed after steps of four sequences."""
        run = run_from(*FOUR_RANKS, "-s", "0", "-b", "1", *flags.split())
        state = TrainState(step=sequences // 4, sequences=sequences)
        plan = make_plan(run, [PackedStub(100)], state)
        capsys.readouterr()
        announce(run, plan, "attention: plain", on_gpu=False)
        lines = capsys.readouterr().out.splitlines()
        assert lines[next(place for place, line in enumerate(lines) if line.startswith("length: ")) + 1 :] == said


def outputs_of(*flags):
    return run_from(*FOUR_RANKS, *flags).outputs


class PackedStub:
    """A data set with a length and a fingerprint, but no data."""

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
    LATER = {  # noqa: RUF012  older checkpoints lack these
        "adam_betas": [0.9, 0.95],
        "adam_eps": 1e-8,
        "deterministic": False,
        "skip_spikes": None,
        "min_lr_ratio": 0.1,
        "lr_schedule": "cosine",
        "decay_steps": None,
        "decay_shape": "linear",
    }
    FLAGS = (*FOUR_RANKS, "-l", "64", "-s", "0", "-b", "2", "-e", "3")

    @pytest.fixture
    def checkpoint(self, tmp_path):
        state = TrainState(1, 9, 72, 4608, 2, self.SETTINGS)
        states = {**asdict(state), "adam_steps": 7, "loss_scaler": None}
        return make_checkpoint(tmp_path / "epoch1-step9", states), state

    def test_fresh(self):
        run = run_from(*self.FLAGS)
        assert resume_state(run.outputs) == (TrainState(), None)
        state = TrainState()
        make_plan(run, [PackedStub(43)], state)
        assert state.settings == self.SETTINGS | self.LATER

    def test_everything_comes_back(self, checkpoint):
        folder, state = checkpoint
        for load in ("latest", str(folder)):
            run = run_from(*self.FLAGS, "-o", str(folder.parent), "-f", load)
            assert resume_state(run.outputs) == (state, folder)
        assert state.adam_steps == 7
        assert make_plan(run, [PackedStub(43)], state).total_steps == 16

    def test_damaged(self, checkpoint):
        folder, _ = checkpoint
        path = folder / "running_states.json"
        path.write_bytes(path.read_bytes().replace(b"4608", b"4609"))
        with pytest.raises(InputError, match=r"running_states.json is damaged; choose another checkpoint"):
            resume_state(outputs_of("-f", str(folder)))

    def test_later_checkpoints_are_not_mixed_with_this_runs(self, checkpoint, tmp_path):
        folder, state = checkpoint
        later = folder.with_name("epoch1-step10")
        shutil.copytree(folder, later)
        with pytest.raises(InputError, match=r"is at step 9, and --save_dir .* holds later .* epoch1-step10"):
            resume_state(outputs_of("-o", str(folder.parent), "-f", str(folder)))
        elsewhere = outputs_of("-o", str(tmp_path / "other"), "-f", str(folder))
        assert resume_state(elsewhere) == (state, folder)

    def test_another_runs_checkpoints_are_not_mixed_with_this_runs(self, checkpoint, tmp_path):
        """Otherwise --keep_checkpoints would remove them, or a resume would take them for this run's."""
        folder, _ = checkpoint
        (tmp_path / "other").mkdir()
        there = shutil.copytree(folder, tmp_path / "other" / "epoch0-step3")
        with pytest.raises(
            InputError, match=f"--save_dir: {there.parent} holds checkpoints of another run than --load"
        ):
            resume_state(outputs_of("-o", str(there.parent), "-f", str(folder)))

    @pytest.mark.parametrize("flags", [(), ("-f", "latest")])
    def test_a_new_run_does_not_overwrite_a_final_model(self, tmp_path, flags):
        (tmp_path / "final").mkdir()
        with pytest.raises(InputError, match="holds the final model of a run; give another folder"):
            resume_state(outputs_of("-o", str(tmp_path), *flags))

    def test_checkpoints_added_or_removed_before_the_folder_is_claimed(self, checkpoint, tmp_path):
        folder, _ = checkpoint
        flags = ["-o", str(tmp_path), "-t", str(tmp_path / "logs")]
        run = run_from(*self.FLAGS, *flags, "-f", "latest")
        latest = run.outputs
        state, found = resume_state(latest)
        later = make_checkpoint(tmp_path / "epoch1-step10", asdict(TrainState(1, 10, 80, 5120, 2, self.SETTINGS)))
        with pytest.raises(InputError, match=f"resume was {folder} and is {later} now; start again"):
            claim_folders(latest, state, found)
        with pytest.raises(InputError, match=r"is at step 9, and --save_dir .* holds later checkpoints"):
            claim_folders(outputs_of(*flags, "-f", str(folder)), state, found)
        shutil.rmtree(later)
        make_plan(run, [PackedStub(43)], state)
        claim_folders(latest, state, found)
        shutil.rmtree(folder)
        with pytest.raises(InputError, match=f"resume was {folder} and is none now; start again"):
            claim_folders(latest, state, found)
        claim_folders(outputs_of(*flags), TrainState(), None)
        make_checkpoint(folder)
        with pytest.raises(InputError, match="holds the checkpoints of a run"):
            claim_folders(outputs_of(*flags), TrainState(), None)

    def test_checking_the_folders_makes_none(self, tmp_path):
        job = Job(load_config("test"))
        check_folders(outputs_of("-o", str(tmp_path / "saved"), "-t", str(tmp_path / "logs")), job, step=0)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("name", ["metrics.jsonl", "metrics.2.jsonl", "events.out.tfevents.1"])
    @pytest.mark.parametrize(
        ("owner", "step", "refused"),
        [
            ("run", 0, False),  # killed before its first checkpoint
            ("run", 2, False),
            ("other", 0, True),
            ("other", 2, True),
            (None, 0, True),
            (None, 2, False),  # written by an older version
        ],
    )
    def test_logs_of_another_run(self, tmp_path, name, owner, step, refused):
        logs = tmp_path / "logs"
        logs.mkdir()
        (logs / name).touch()
        if owner:
            (logs / folders.OWNER).write_text(json.dumps(folders.log_owner(tmp_path / owner, logs)))
        outputs = outputs_of("-o", str(tmp_path / "run"), "-t", str(logs))
        if refused:
            with pytest.raises(InputError, match=f"^--tensorboard_dir: {logs} holds the logs of another run"):
                folders.refuse_foreign_logs(outputs, step)
        else:
            folders.refuse_foreign_logs(outputs, step)
        (logs / name).unlink()
        folders.refuse_foreign_logs(outputs, step)

    def test_latest_without_a_checkpoint_starts_a_new_run(self, tmp_path, capsys):
        """As when a job is killed before its first checkpoint and queued again."""
        (tmp_path / ".epoch0-step9.incomplete").mkdir()
        outputs = outputs_of("-o", str(tmp_path), "-f", "latest")
        assert resume_state(outputs) == (TrainState(), None)
        assert f"no checkpoint in --save_dir {tmp_path} yet; a new run begins" in capsys.readouterr().out
        (tmp_path / "epoch0-step9").mkdir()
        with pytest.raises(InputError, match=r"no complete checkpoint in .*; move the incomplete ones away"):
            resume_state(outputs)

    @pytest.mark.parametrize(
        ("flags", "remedy"),
        [
            (("-b", "1"), "is 23 now; --max_steps 16 keeps it"),
            (("-b", "4"), "is 12 now; --num_epochs 5 --max_steps 16 keeps it"),
        ],
    )
    def test_another_length_is_refused_with_the_flags_that_keep_it(self, checkpoint, flags, remedy):
        flags = [*self.FLAGS, *flags, "-o", str(checkpoint[0].parent), "-f", "latest"]
        run = run_from(*flags)
        with pytest.raises(InputError) as caught:
            make_plan(run, [PackedStub(43)], resume_state(run.outputs)[0])
        (problem,) = caught.value.problems
        assert problem.endswith(f"was 16 in the checkpoint and {remedy}; --allow_changes resumes anyway")
        run = run_from(*flags, *remedy.split("; ")[1].split()[:-2])
        assert make_plan(run, [PackedStub(43)], resume_state(run.outputs)[0]).total_steps == 16

    def test_adapters_of_other_sizes_are_refused_even_with_allow_changes(self):
        run = run_from(*self.FLAGS, "-f", "latest", "--allow_changes")
        saved = TrainState(settings={**self.SETTINGS, "lora_rank": 4, "lora_modules": "q_proj"})
        for lora in (Lora(8, lora_modules="q_proj"), Lora(None, lora_modules="q_proj,k_proj")):
            line = f"^--load: --lora_rank was 4 in the checkpoint and is {lora.lora_rank} now$"
            with pytest.raises(InputError, match=line):
                make_plan(replace(run, lora=lora), [PackedStub(43)], saved)

    def test_settings_that_older_checkpoints_lack_are_their_defaults(self, checkpoint):
        folder, _ = checkpoint
        run = run_from(*self.FLAGS, "--adam_betas", "0.9", "0.99", "-o", str(folder.parent), "-f", str(folder))
        with pytest.raises(
            InputError, match=r"--adam_betas was \[0\.9, 0\.95\] in the checkpoint and is \[0\.9, 0\.99\]"
        ):
            make_plan(run, [PackedStub(43)], resume_state(run.outputs)[0])

    def test_lists_all_changes_and_accepts_them_with_allow_changes(self, checkpoint, capsys):
        folder, _ = checkpoint
        dataset = PackedStub(43)
        dataset.fingerprint = "other"
        flags = [*self.FLAGS, "-l", "32", "--seed", "1", "--lr", "1e-3", "-f", str(folder)]
        run = run_from(*flags)
        state, _ = resume_state(run.outputs)
        with pytest.raises(InputError) as caught:
            make_plan(run, [dataset], state)
        lines = [
            "--load: --seed was 42 in the checkpoint and is 1 now",
            "--load: --max_length was 64 in the checkpoint and is 32 now",
            "--load: --lr was 0.0003 in the checkpoint and is 0.001 now",
            "--load: the data was abc in the checkpoint and is other now",
        ]
        assert caught.value.problems == (*lines[:-1], f"{lines[-1]}; --allow_changes resumes anyway")

        run = run_from(*flags, "--allow_changes")
        state, _ = resume_state(run.outputs)
        plan = make_plan(run, [dataset], state)
        assert state.sequences == 0  # other data are read from the beginning
        assert plan.total_steps == 9 + 3 * 43 // 8
        first, *said = capsys.readouterr().out.splitlines()
        assert first == "--load: the order of the data has changed, so they are read from the beginning"
        assert [
            line.removesuffix(", as --allow_changes allows") for line in said if "length of the run" not in line
        ] == lines
        assert (state.settings["lr"], state.settings["data"]) == (1e-3, "other")
