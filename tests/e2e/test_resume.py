"""Resumed runs, stopped on purpose or not: they equal a run that never stopped."""

import contextlib
import json
import os
import shutil
import signal

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from corpus.prepare import prepare_dataset
from data_utils import PackedDataset
from launching import optimizer_states
from model_utils import load_config
from resuming import RECORD, SIGNAL, curve, states_of
from runs import EPOCH, SEQUENCE_LENGTH, batch_at
from runtime.process import INTERRUPTED

GLOBAL_BATCH = 8
EPOCHS = 3
STEPS = EPOCHS * EPOCH // GLOBAL_BATCH  # three per epoch; with -i 2, step 2 is mid-epoch and step 6 ends one

# Number of processes, and flags. All layouts have the same global batch.
LAYOUTS = {
    "zero2 fp32": (1, "-x fp32 -p zero2 -b 8"),
    "zero2 bf16": (1, "-x bf16 -p zero2 -b 4 --accumulation_steps 2"),
    "zero2 fp16": (1, "-x fp16 -p zero2 -b 8"),
    "gemini bf16": (2, "-x bf16 -p gemini -b 2 --accumulation_steps 2"),
    "hybrid fp32": (4, "-x fp32 -p hybrid_parallel --tp 2 --pp 2 -b 8 --microbatch_size 4"),
    "hybrid bf16": (4, "-x bf16 -p hybrid_parallel --tp 2 --pp 2 -b 8 --microbatch_size 4"),
    # only to resume with
    "zero2 fp32, 2 ranks": (2, "-x fp32 -p zero2 -b 1 --accumulation_steps 4"),
    "zero2 fp32, accumulating": (1, "-x fp32 -p zero2 -b 2 --accumulation_steps 4"),
    "interleaved fp32": (2, "-x fp32 -p hybrid_parallel --tp 1 --pp 2 --pp_style interleaved -b 8"),
    "tensor fp32": (2, "-x fp32 -p hybrid_parallel --tp 2 --pp 1 -b 4 --accumulation_steps 2"),
}


def train(pretrain, few_data, layout: str, *args, **kwargs):
    processes, flags = LAYOUTS[layout]
    flags = [*flags.split(), "-d", few_data, "-e", EPOCHS, "-i", 2, "--lr", "1e-2", *args]
    return pretrain(*flags, processes=processes, **kwargs)


@pytest.fixture(scope="module")
def whole_run(pretrain, few_data):
    """Return a function that gives the uninterrupted run of a layout, saved at every second step."""
    runs = {}

    def whole_run(layout: str):
        if layout not in runs:
            # Raised, so that a resumed fp16 run which ignored the saved scale would start with another one.
            change = "engine.plugin.INITIAL_LOSS_SCALE = 2.0**20" if layout.endswith("fp16") else None
            runs[layout] = train(pretrain, few_data, layout, change=change)
        return runs[layout]

    return whole_run


def assert_same_end(run, whole) -> None:
    """Assert that the last checkpoints are equal to the bit."""
    name = f"epoch{EPOCHS - 1}-step{STEPS}"
    states, expected = (optimizer_states(folder / name) for folder in (run.save_dir, whole.save_dir))
    assert states.keys() == expected.keys()
    different = [key for key in states if not torch.equal(states[key], expected[key])]
    assert not different
    for file in (whole.save_dir / name / "model").iterdir():
        assert file.read_bytes() == (run.save_dir / name / "model" / file.name).read_bytes()
    assert states_of(run.save_dir / name) == states_of(whole.save_dir / name)


def test_run_ends_with_the_data(whole_run):
    run = whole_run("zero2 fp32")
    assert run.column("step") == list(range(1, STEPS + 1))
    assert run.column("epoch") == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    folders = {folder.name for folder in run.save_dir.iterdir()}
    assert folders == {*(f"epoch{(step - 1) // 3}-step{step}" for step in (2, 4, 6, 8, 9)), "final", ".lock"}


@pytest.mark.parametrize(
    ("layout", "checkpoint"),
    [
        ("zero2 fp32", "epoch0-step2"),
        ("zero2 fp32", "epoch1-step6"),
        ("zero2 bf16", "epoch1-step4"),
        ("gemini bf16", "epoch0-step2"),
        ("zero2 fp16", "epoch0-step2"),
        ("hybrid bf16", "epoch1-step6"),
    ],
)
def test_resume_is_exact(pretrain, few_data, whole_run, layout, checkpoint):
    whole = whole_run(layout)
    run = train(pretrain, few_data, layout, "-f", whole.save_dir / checkpoint)
    step = int(checkpoint.partition("step")[2])
    assert curve(run) == curve(whole, after=step)
    assert run.column("step")[0] == step + 1
    assert_same_end(run, whole)


def test_data_left_out_on_a_resume(pretrain, few_data, sample_tokenizer, cache_dir, tmp_path):
    """Steps 4 and 5 train on later data, also after another resume; the run that does the same at once is its equal."""
    data = PackedDataset(prepare_dataset(str(few_data), sample_tokenizer, cache_dir), SEQUENCE_LENGTH)
    total = ["-e", 4, "--max_steps", STEPS]
    first = train(pretrain, few_data, "zero2 fp32", *total, "--max_steps", 2)
    flags = [*total, "--allow_changes", "--skip_data", "4-5"]

    def resumed(*more, name: str, **options):
        options["change"] = RECORD.format(path=str(tmp_path / name)) + options.get("change", "")
        run = train(pretrain, few_data, "zero2 fp32", *flags, *more, **options)
        return run, [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]

    whole, batches = resumed("-f", first.save_dir / "epoch0-step2", name="whole")
    line = "--skip_data: the 16 sequences of steps 4-5 are left out; step 4 trains on those that step 6 would have had"
    assert line in whole.stdout
    expected = [batch_at(data, start * 8, start * 8 + 8).tolist() for start in (2, 5, 6, 7, 8, 9, 10)]
    assert [sorted(batch) for batch in batches] == [sorted(batch) for batch in expected]
    assert whole.column("tokens")[-1] == STEPS * GLOBAL_BATCH * SEQUENCE_LENGTH

    run, batches = resumed("-f", whole.save_dir / "epoch2-step6", name="again")
    assert "--skip_data: the sequences of steps 4-5 are left out already" in run.stdout
    assert [sorted(batch) for batch in batches] == [sorted(batch) for batch in expected[4:]]
    assert curve(run) == curve(whole, after=6)
    states = [states_of(next(folder.glob("*-step9"))) for folder in (run.save_dir, whole.save_dir)]
    assert states[0] == states[1]
    assert states[0]["left_out"] == {"4-5": [24, 40]}

    late = train(
        pretrain, few_data, "zero2 fp32", *total, "-f", "latest", "--skip_data", "5-6", folder=run.folder, check=False
    )
    assert late.returncode == 2
    assert "--skip_data: step 5 is behind the checkpoint, which is at step 9" in late.stderr


def test_stream_left_out_on_a_resume(pretrain, few_data, tmp_path):
    """The stream is read on, and what it skips is dropped."""
    flags = ["-d", few_data, "--streaming", "--shuffle_buffer", 4, "-p", "zero2", "-x", "bf16", "-b", 3, "-i", 2]

    def batches(name: str, *more, **options):
        run = pretrain(*flags, *more, change=RECORD.format(path=str(tmp_path / name)), **options)
        return run, (tmp_path / name).read_text().splitlines()

    _, expected = batches("whole", "--max_steps", 10)
    first, _ = batches("first", "--max_steps", 2, "--lr_schedule", "constant")
    skipping = ["-f", "latest", "--skip_data", "4-5", "--lr_schedule", "constant"]
    run, found = batches("skipping", *skipping, "--max_steps", 6, folder=first.folder)
    assert found == [expected[2], *expected[5:8]]
    run, found = batches("again", *skipping, "--max_steps", 8, folder=first.folder)
    assert found == expected[8:10]
    assert "the sequences of steps 4-5 are left out already" in run.stdout


@pytest.mark.parametrize("layout", ["zero2 bf16", "gemini bf16", "hybrid fp32"])
def test_resume_with_skipped_spikes_is_exact(pretrain, few_data, layout):
    """The window of the last steps continues where it was."""
    options = {"change": "training.spikes.WINDOW = 4"}
    flags = ["--skip_spikes", 1, "--lr", 1]  # so high that some loss spikes, whatever the text
    whole = train(pretrain, few_data, layout, *flags, **options)
    spikes = whole.column("spikes")
    assert 0 < spikes[-1] < STEPS - 2
    step = max(number for number in (2, 4, 6, 8) if spikes[-1] > spikes[number - 1])
    run = train(pretrain, few_data, layout, *flags, "-f", next(whole.save_dir.glob(f"*-step{step}")), **options)
    assert curve(run) == curve(whole, after=step)
    assert_same_end(run, whole)
    if layout == "hybrid fp32":
        refused = train(pretrain, few_data, layout, "-f", "latest", folder=run.folder, check=False)
        assert "--load: --skip_spikes was 1.0 in the checkpoint and is None now; --allow_changes" in refused.stderr


@pytest.mark.parametrize(
    ("processes", "flags"),
    [(1, "-p zero2 -b 4 --accumulation_steps 2 -g"), (2, "-p hybrid_parallel --tp 2 --pp 1 -b 8")],
)
def test_resume_with_dropout_is_exact(pretrain, few_data, tmp_path, processes, flags):
    config = load_config("test").to_dict()
    (tmp_path / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.3}))
    flags = ["-d", few_data, "-x", "fp32", "-i", 2, *flags.split()]
    whole = pretrain(*flags, "-c", tmp_path, processes=processes)
    run = pretrain(*flags, "-c", tmp_path, "-f", whole.save_dir / "epoch0-step2", processes=processes)
    assert curve(run) == curve(whole, after=2)
    assert "only if ranks and layout are the same" in run.stdout
    if processes == 1:
        without = pretrain(*flags, "--max_steps", 1)
        assert without.column("loss") != whole.column("loss")[:1]


# Writes each file of a checkpoint slowly, and makes training fail meanwhile.
ERROR_WHILE_SAVING = """
import time
write_tensors = checkpointing.writer.write_tensors
def write_slowly(*args):
    time.sleep(0.1)
    write_tensors(*args)
checkpointing.writer.write_tensors = write_slowly
forward_backward, steps = training.loop.forward_backward, []
def fail_in_the_third_step(*args):
    steps.append(None)
    if len(steps) == 3 and console.rank() == {rank}:
        raise RuntimeError("out of memory")
    return forward_backward(*args)
training.loop.forward_backward = fail_in_the_third_step
"""


@pytest.mark.parametrize(("processes", "rank"), [(1, 0), (2, 0), (2, 1)])
def test_an_error_in_training_does_not_cost_the_checkpoint_in_flight(pretrain, few_data, processes, rank):
    flags = ["-d", few_data, "-p", "zero2", "-x", "bf16", "-b", 1, "-i", 2]
    run = pretrain(*flags, change=ERROR_WHILE_SAVING.format(rank=rank), processes=processes, check=False)
    assert run.returncode == 1, run.output()
    assert "RuntimeError: out of memory" in run.stderr
    assert run.column("step") == [1, 2]
    assert f"checkpoint: {run.save_dir / 'epoch0-step2'}, " in run.stdout
    assert (run.save_dir / "epoch0-step2" / "manifest.json").is_file()


def test_a_stream_with_a_broken_row_resumes_once_the_row_is_corrected(pretrain, sample, tmp_path):
    """The steps before the row are saved; the run resumes from the corrected file, whose size differs."""
    data = tmp_path / "rows.jsonl"
    texts = [json.loads(row)["text"] for row in (sample / "data" / "github_sample.jsonl").open(encoding="utf-8")]
    rows = [json.dumps({"text": text[:250]}) for text in texts[:24]]
    flags = ["-d", data, "--streaming", "--shuffle_buffer", 4, "-p", "zero2", "-x", "fp32", "-b", 1, "--max_steps", 12]
    data.write_text("\n".join(rows))
    whole = pretrain(*flags, processes=2)

    data.write_text("\n".join([*rows[:12], rows[12][:-2], *rows[13:]]))
    broken = pretrain(*flags, processes=2, check=False)
    step = broken.column("step")[-1]
    assert 1 < step < 12
    assert broken.column("loss") == whole.column("loss")[:step]
    saved = broken.save_dir / f"epoch0-step{step}"
    assert "rows.jsonl, line 13: not valid JSON" in broken.stderr
    assert f"; resume with -f {saved}" in broken.stderr
    assert broken.stderr.count("Traceback") == 1  # from torchrun

    data.write_text("\n".join(rows) + "\n")
    refused = pretrain(*flags, "-f", "latest", folder=broken.folder, check=False)
    assert "--load: the data was" in refused.stderr
    run = pretrain(*flags, "-f", "latest", "--allow_changes", folder=broken.folder, processes=2)
    assert "the content of the stream's files has changed; it continues at the row where it stopped" in run.stdout
    assert curve(run) == curve(whole)


# Kills the loader processes of rank {rank} after step 2 is logged, as the kernel does when memory runs out.
LOADER_KILLED = """
import multiprocessing
log = metrics.Metrics.log
def log_and_kill(self, values):
    log(self, values)
    if values["step"] == 2 and console.rank() == {rank}:
        for process in multiprocessing.active_children():
            process.kill()
metrics.Metrics.log = log_and_kill
"""


@pytest.mark.parametrize(("processes", "rank"), [(1, 0), (2, 1)])
def test_a_killed_loader_process_costs_no_step(pretrain, few_data, processes, rank):
    """All ranks train on the batches read before and save."""
    flags = ["-d", few_data, "-p", "zero2", "-x", "fp32", "-b", 2 // processes, "--max_steps", 36, "-e", 3, "-i", 100]
    flags += ["--num_workers", 1]
    whole = pretrain(*flags, processes=processes)
    killed = pretrain(*flags, processes=processes, change=LOADER_KILLED.format(rank=rank), check=False)
    step = killed.column("step")[-1]
    assert 2 <= step < 36
    saved = killed.save_dir / f"epoch{(step - 1) // 12}-step{step}"
    assert "was killed by SIGKILL; out of host memory?; resume with -f" in killed.stderr
    assert f"resume with -f {saved}" in killed.stderr
    assert killed.stderr.count("Traceback") == processes - 1  # from torchrun
    run = pretrain(*flags, "-f", saved, folder=killed.folder, processes=processes)
    assert curve(run) == curve(whole)
    assert run.column("step") == list(range(1, 37))


def test_two_resumes_in_a_row_and_one_at_the_end(pretrain, few_data, whole_run):
    """A resumed run's checkpoint can be resumed too; resuming a finished run writes `final` again."""
    whole = whole_run("zero2 bf16")
    folder = train(
        pretrain, few_data, "zero2 bf16", change=SIGNAL.format(name="SIGTERM", step=2, rank=0), check=False
    ).folder
    for step in (5, None):
        change = step and SIGNAL.format(name="SIGTERM", step=step, rank=0)
        run = train(pretrain, few_data, "zero2 bf16", "-f", "latest", change=change, folder=folder, check=not step)
    assert curve(run) == curve(whole)
    assert_same_end(run, whole)

    shutil.rmtree(run.save_dir / "final")
    run = train(pretrain, few_data, "zero2 bf16", "-f", "latest", folder=folder)
    assert f"nothing is left to train: {run.save_dir / 'epoch2-step9'} is the end of the run" in run.stdout
    AutoModelForCausalLM.from_pretrained(run.save_dir / "final")
    assert curve(run) == curve(whole)


def test_a_run_with_a_stable_learning_rate_is_made_longer(pretrain, few_data):
    """It equals a run of the greater length from the start; once the learning rate falls, it is made for its length."""
    wsd = ("--lr_schedule", "wsd", "-s", 1, "--decay_shape", "1-sqrt")
    short = train(pretrain, few_data, "zero2 bf16", *wsd, "--decay_steps", 2, "--max_steps", 6)
    whole = train(pretrain, few_data, "zero2 bf16", *wsd, "--decay_steps", 3)
    longer = train(pretrain, few_data, "zero2 bf16", *wsd, "--decay_steps", 3, "-f", short.save_dir / "epoch1-step4")
    for change in (
        "schedule was 6 in the checkpoint and is 9 now",
        "--decay_steps was 2 in the checkpoint and is 3 now",
    ):
        assert f"{change}; the learning rate so far is the same" in longer.stdout
    assert curve(longer) == curve(whole, after=4)
    assert_same_end(longer, whole)
    fractions = [1, 1, 1, 1, 1, 1, 1, 1 - 0.9 * (1 / 3) ** 0.5, 1 - 0.9 * (2 / 3) ** 0.5]
    assert whole.column("lr") == pytest.approx([1e-2 * fraction for fraction in fractions])
    with pytest.raises(AssertionError, match="--allow_changes resumes anyway"):
        train(pretrain, few_data, "zero2 bf16", *wsd, "-f", short.save_dir / "epoch1-step6")


def test_float8_is_switched_on_and_off_between_checkpoints(pretrain, few_data, whole_run):
    before, line = whole_run("zero2 bf16"), "--fp8: steps up to the checkpoint were trained"
    for checkpoint, flags, words in (
        ("epoch0-step2", ["--fp8"], "without it"),
        ("epoch1-step4", [], "with --fp8 tensorwise"),
    ):
        run = train(pretrain, few_data, "zero2 bf16", "-f", before.save_dir / checkpoint, *flags)
        assert f"{line} {words}, unlike the next\n" in run.stdout
        saved = json.loads((run.save_dir / "epoch2-step9" / "running_states.json").read_text())["fp8"]
        assert saved == ("tensorwise" if flags else "")
        first, other = run.metrics[0], before.metrics[-len(run.metrics)]  # of the same weights and sequences
        assert first["step"] == other["step"] == int(checkpoint[-1]) + 1
        assert first["loss"] == pytest.approx(other["loss"], rel=1e-3)
        assert first["loss"] != other["loss"]
        before = run


@pytest.mark.parametrize(
    ("layout", "other", "tolerance"),
    [
        # The first loss depends only on the restored weights and data, later ones also on Adam's moments.
        ("hybrid fp32", "zero2 fp32, accumulating", 2e-6),
        ("zero2 fp32", "zero2 fp32, 2 ranks", 2e-6),
        ("zero2 fp32", "tensor fp32", 2e-6),
        ("zero2 fp32", "interleaved fp32", 2e-6),
        ("interleaved fp32", "zero2 fp32, accumulating", 2e-6),
        ("gemini bf16", "zero2 bf16", 7e-4),
        ("zero2 bf16", "gemini bf16", 7e-4),
    ],
)
def test_resume_in_another_layout(pretrain, few_data, whole_run, layout, other, tolerance):
    """The tolerances are those of test_parity.py."""
    whole = whole_run(layout)
    run = train(pretrain, few_data, other, "-f", whole.save_dir / "epoch0-step2")
    for key in ("step", "epoch", "tokens", "lr"):
        assert run.column(key) == whole.column(key)[2:]
    assert run.column("loss") == pytest.approx(whole.column("loss")[2:], rel=tolerance)


MATRIX = {
    "zero2": (1, "-p zero2 -b 8"),
    "zero2, 2 ranks": (2, "-p zero2 -b 2 --accumulation_steps 2"),
    "zero2_cpu": (1, "-p zero2_cpu -b 4 --accumulation_steps 2"),
    "gemini, 2 ranks": (2, "-p gemini -b 4"),
    "gemini_auto": (1, "-p gemini_auto -b 4 --accumulation_steps 2"),
    "hybrid tp2": (2, "-p hybrid_parallel --tp 2 --pp 1 -b 8"),
    "hybrid pp2": (2, "-p hybrid_parallel --tp 1 --pp 2 -b 8"),
    "hybrid pp2 interleaved": (2, "-p hybrid_parallel --tp 1 --pp 2 --pp_style interleaved -b 8"),
}


@pytest.mark.matrix
def test_resume_of_every_plugin_in_every_other(pretrain, few_data):
    """Print a table of the largest differences in the loss, in bf16 with the learning rate of a real run."""
    flags = ["-d", few_data, "-e", EPOCHS, "-x", "bf16", "-i", 2, "--lr", "1e-3"]
    runs = {name: pretrain(*flags, *layout.split(), processes=ranks) for name, (ranks, layout) in MATRIX.items()}
    largest = 0
    print(f"\n| saved by \\ resumed by | {' | '.join(MATRIX)} |\n|{'---|' * (len(MATRIX) + 1)}")
    for saved, whole in runs.items():
        row = []
        for ranks, layout in MATRIX.values():
            checkpoint = whole.save_dir / "epoch0-step2"
            run = pretrain(*flags, *layout.split(), "-f", checkpoint, processes=ranks)
            for key in ("step", "epoch", "tokens", "lr"):
                assert run.column(key) == whole.column(key)[2:]
            pairs = zip(run.column("loss"), whole.column("loss")[2:], strict=True)
            row.append(max(abs(loss - other) / other for loss, other in pairs))
        print(f"| {saved} | {' | '.join(f'{difference:.1e}' for difference in row)} |", flush=True)
        largest = max(largest, *row)
    assert largest < 5e-4


def test_saved_model_is_the_trained_one(whole_run, few_data, sample_tokenizer, cache_dir):
    """A model saved by four ranks and loaded by transformers has the next loss of the run."""
    run = whole_run("hybrid fp32")
    model = AutoModelForCausalLM.from_pretrained(run.save_dir / "epoch0-step2" / "model")
    dataset = PackedDataset(prepare_dataset(str(few_data), sample_tokenizer, cache_dir), SEQUENCE_LENGTH)
    assert len(dataset) == EPOCH
    third_batch = batch_at(dataset, 2 * GLOBAL_BATCH, 3 * GLOBAL_BATCH)
    loss = model(third_batch, labels=third_batch).loss.item()
    assert loss == pytest.approx(run.column("loss")[2], rel=2e-6)


def test_kill_and_resume_from_latest(pretrain, few_data, whole_run):
    """Steps after the last checkpoint are repeated; a newer, incomplete folder is skipped."""
    whole = whole_run("zero2 bf16")
    killed = train(pretrain, few_data, "zero2 bf16", change=SIGNAL.format(name="SIGKILL", step=7, rank=0), check=False)
    assert killed.returncode == -signal.SIGKILL
    assert curve(killed) == curve(whole)[:7]
    last = max(killed.save_dir.glob("epoch1-step*"))  # step 6's may not have been finished
    incomplete = killed.save_dir / "epoch2-step8"
    shutil.copytree(last, incomplete)
    os.truncate(next((incomplete / "optimizer").iterdir()), 100)

    run = train(pretrain, few_data, "zero2 bf16", "-f", "latest", folder=killed.folder)
    assert f"--load latest: passing over {incomplete}, which is incomplete" in run.stdout
    assert f"resumed: {last}" in run.stdout
    assert curve(run) == curve(whole)
    assert_same_end(run, whole)


# Each step counts ten seconds.
TEN_SECONDS = """
from training import goodput
training.loop.StepSeconds.add = lambda self, state, seconds, waited: goodput.spend(state, goodput.STEPS, 10)
"""


def test_goodput_counts_each_step_once_since_the_first_start(pretrain, few_data, tmp_path):
    """Two kills with -9: one before the first checkpoint, and one after, whose last steps are lost."""
    starts, folder = [], tmp_path / "run"
    for step in (1, 5, None):
        change = TEN_SECONDS + (SIGNAL.format(name="SIGKILL", step=step, rank=0) if step else "")
        run = train(pretrain, few_data, "zero2 bf16", "-f", "latest", change=change, folder=folder, check=not step)
        starts.append(json.loads((folder / "tb_logs" / "run.json").read_text())["started"])
    assert starts == [starts[0]] * 3
    for step in (4, 6, 8, 9):
        states = json.loads(next(run.save_dir.glob(f"*-step{step}/running_states.json")).read_text())
        assert (states["started"], states["spent"]["steps"]) == (starts[0], 10 * step)
    assert states["spent"]["saves"] > 0
    assert all(0 < value <= 1 for value in run.column("goodput"))
    (line,) = [line for line in run.stdout.splitlines() if line.startswith("goodput: ")]
    assert line.endswith("starts and lost steps")


def test_signal_to_one_rank(pretrain, few_data, whole_run):
    """All ranks stop after the same step and save a model that loads; a resumed run takes the remaining steps."""
    whole = whole_run("gemini bf16")
    stopped = train(
        pretrain, few_data, "gemini bf16", change=SIGNAL.format(name="SIGUSR1", step=4, rank=1), check=False
    )
    assert stopped.returncode != 0
    assert f"exitcode  : {INTERRUPTED}" in stopped.stderr  # in torchrun's report; torchrun exits with 1
    assert curve(stopped) == curve(whole)[:5]
    AutoModelForCausalLM.from_pretrained(stopped.save_dir / "final")

    run = train(pretrain, few_data, "gemini bf16", "-f", "latest", folder=stopped.folder)
    assert f"resumed: {run.save_dir / 'epoch1-step5'}" in run.stdout
    assert curve(run) == curve(whole)
    assert_same_end(run, whole)


@pytest.mark.parametrize("processes", [1, 2])
def test_terminate(start, processes):
    """A cluster's scheduler sends SIGTERM to the program or to its launcher."""
    with start("-p", "zero2", "-x", "bf16", "-b", 1, "-e", 1000, processes=processes, torchrun=True) as run:
        run.wait_until(lambda: len(run.metrics) >= 3, "the third step")
        with contextlib.suppress(psutil.NoSuchProcess):
            run.process.terminate()
        run.wait()
    steps = run.column("step")
    assert steps == list(range(1, len(steps) + 1))
    epoch = run.column("epoch")[-1]
    assert (run.save_dir / f"epoch{epoch}-step{steps[-1]}" / "manifest.json").is_file()
    AutoModelForCausalLM.from_pretrained(run.save_dir / "final")
    assert run.returncode == INTERRUPTED if processes == 1 else run.returncode != 0


@pytest.mark.parametrize(
    "flags",
    [
        "--document_mask --slice_weights c4=1,github=2 --eval_fraction 0.1 --eval_interval 2",
        "--streaming --shuffle_buffer 8 --document_mask",
    ],
)
def test_other_ranks_and_accumulation_resume_with_the_same_sequences(pretrain, flags):
    """Try other orders than the default; a lost, extra or repeated sequence would change the loss."""
    flags = ["-p", "zero2", "-x", "fp32", "--max_steps", 6, "-i", 2, "--lr", "1e-2", *flags.split()]
    whole = pretrain(*flags, "-b", 8)
    run = pretrain(*flags, "-b", 2, "--accumulation_steps", 2, "-f", whole.save_dir / "epoch0-step2", processes=2)
    assert run.column("step") == [3, 4, 5, 6]
    assert run.column("loss") == pytest.approx(whole.column("loss")[2:], rel=2e-6)
    if "--eval_fraction" in flags:
        evaluated = [[row["eval_loss"] for row in each.metrics if row["step"] in (4, 6)] for each in (run, whole)]
        assert evaluated[0] == pytest.approx(evaluated[1], rel=2e-6)
        assert len(evaluated[0]) == 2
