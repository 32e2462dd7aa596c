"""Flags, output and files of pretrain.py."""

import json
import math
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

import pretrain as program
from corpus.order import GlobalOrder
from corpus.prepare import prepare_dataset
from data_utils import PackedDataset
from launching import ROOT, Run, optimizer_states
from model_utils import IGNORE_INDEX, load_config, parameter_specs
from runs import EPOCH, SECRET, SEQUENCE_LENGTH, batch_at
from runtime.process import RUN_FAILED
from scripts import plot_run
from training import session

# --------------------------------------------------------------------------------------------------------------- flags


def test_defaults():
    defaults = {
        "config": "7b",
        "plugin": "gemini",
        "dataset": "togethercomputer/RedPajama-Data-1T-Sample",
        "num_epochs": 1,
        "batch_size": 2,
        "lr": 3e-4,
        "weight_decay": 0.1,
        "warmup_steps": 2000,
        "gradient_checkpoint": False,
        "max_length": 4096,
        "mixed_precision": "fp16",
        "save_interval": 1000,
        "save_dir": Path("checkpoint"),
        "load": None,
        "gradient_clipping": 1.0,
        "tensorboard_dir": Path("tb_logs"),
        "flash_attention": False,
        "tokenizer": "hf-internal-testing/llama-tokenizer",
        "accumulation_steps": 1,
        "max_steps": None,
        "dry_run": False,
        "compile": None,
        "microbatch_size": 1,
    }
    args = vars(program.parse_args([]))
    assert {name: args[name] for name in defaults} == defaults


@pytest.mark.parametrize(
    ("short", "long", "text", "value"),
    [
        ("-c", "--config", "13b", "13b"),
        ("-p", "--plugin", "hybrid_parallel", "hybrid_parallel"),
        ("-d", "--dataset", "data", "data"),
        ("-e", "--num_epochs", "3", 3),
        ("-b", "--batch_size", "4", 4),
        (None, "--lr", "1.5e-4", 1.5e-4),
        ("-w", "--weight_decay", "0", 0.0),
        (None, "--weigth_decay", "0.2", 0.2),
        ("-s", "--warmup_steps", "7", 7),
        ("-g", "--gradient_checkpoint", None, True),
        (None, "--grad_checkpoint", None, True),
        ("-l", "--max_length", "2048", 2048),
        ("-x", "--mixed_precision", "bf16", "bf16"),
        ("-i", "--save_interval", "9", 9),
        ("-o", "--save_dir", "here", Path("here")),
        ("-f", "--load", "latest", "latest"),
        (None, "--gradient_clipping", "0.5", 0.5),
        (None, "--grad_clip", "0.5", 0.5),
        ("-t", "--tensorboard_dir", "there", Path("there")),
        ("-a", "--flash_attention", None, True),
    ],
)
def test_flag(short, long, text, value):
    older = {"weigth_decay": "weight_decay", "grad_checkpoint": "gradient_checkpoint", "grad_clip": "gradient_clipping"}
    name = long.removeprefix("--")
    for flag in filter(None, (short, long)):
        args = program.parse_args([flag] if text is None else [flag, text])
        assert getattr(args, older.get(name, name)) == value


def test_help_lists_the_flags_but_not_the_older_spellings(capsys):
    with pytest.raises(SystemExit) as exit_:
        program.parse_args(["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert "-w WEIGHT_DECAY, --weight_decay WEIGHT_DECAY" in " ".join(text.split())
    for older in ("--weigth_decay", "--grad_checkpoint", "--grad_clip"):
        assert not re.search(rf"{older}\b", text)


def test_help_opens_with_the_twelve_flags_that_most_runs_need(capsys):
    with pytest.raises(SystemExit):
        program.parse_args(["--help"])
    text = capsys.readouterr().out
    usage, headings = text.splitlines()[0], re.findall(r"^(\w[^\n]*):$", text, re.MULTILINE)
    assert usage == "usage: pretrain.py [FLAG ...]"
    first, rest = text.split("flags that most runs need:\n")[1].split("\n\n", 1)
    listed = re.findall(r"^  (?:-\w .*, )?(--\w+)", first, re.MULTILINE)
    assert tuple(listed) == program.COMMON_FLAGS
    assert len(listed) == 12
    assert not set(listed) & set(re.findall(r"^  (?:-\w .*, )?(--\w+)", rest, re.MULTILINE))
    assert headings.index("flags that most runs need") < headings.index("model and data")


# ------------------------------------------------------------------------------------------------------------- outputs


def test_printed_lines(finished_run):
    for line in (
        f"data: {EPOCH} sequences of {SEQUENCE_LENGTH} tokens",
        "global batch: 8 x 1 accumulated x 1 data-parallel = 8 sequences x 64 tokens = 512 tokens",
        "length: 3 optimizer steps, 1,536 tokens",
        f"checkpoint: {finished_run.save_dir / 'epoch0-step2'}",
        "trained: 3 steps, 1,536 tokens, 0.0",
        f"model: {finished_run.save_dir / 'final'}, for AutoModelForCausalLM and AutoTokenizer",
        f"try it: python scripts/generate.py --model {finished_run.save_dir / 'final'} --prompt",
    ):
        assert line in finished_run.stdout
    assert len(re.findall(r"^step [123]/3: loss ", finished_run.stdout, flags=re.MULTILINE)) == 2
    assert finished_run.stderr == ""


def test_steps_without_a_label(pretrain, sample, sample_tokenizer, tmp_path):
    """Some two-token sequences, the first step's among them, end one document and begin the next: no label counts."""
    data = tmp_path / "short.jsonl"
    data.write_text("".join(f'{{"text": "{word}"}}\n' for word in ("a", "b", "if", "c", "def", "d")))
    tokenizer, ends = sample_tokenizer, (sample_tokenizer.bos_token_id, sample_tokenizer.eos_token_id)
    dataset = PackedDataset(prepare_dataset(str(data), tokenizer, tmp_path / "cache"), 2, document_ends=ends)
    counts = [int((item["labels"][1:] != IGNORE_INDEX).sum()) for item in map(dataset.__getitem__, range(len(dataset)))]
    assert {0, 1} == set(counts)
    seed = next(seed for seed in range(99) if not counts[GlobalOrder(len(dataset), seed)[0]])
    order = GlobalOrder(len(dataset), seed)

    flags = ["-d", data, "-p", "zero2", "-x", "bf16", "-l", 2, "-b", 1, "-s", 1, "--document_mask", "--seed", seed]
    run = pretrain(*flags, "--cache_dir", tmp_path / "cache", "--max_steps", 5)
    assert run.stderr == ""
    assert [loss is not None for loss in run.column("loss")] == [counts[order[step]] > 0 for step in range(5)]
    states = json.loads((run.save_dir / "epoch0-step5" / "running_states.json").read_text(encoding="utf-8"))
    assert states["adam_steps"] == sum(counts[order[step]] for step in range(5))
    logged = plot_run.read_run(str(run.folder / "tb_logs"))
    assert list(logged.curve("step", "loss")[0]) == [step + 1 for step in range(5) if counts[order[step]]]
    logged.columns["loss"][:] = math.nan  # as before any label has counted
    plot_run.draw([logged])
    assert "loss" not in plot_run.summary(logged)


def test_metrics(finished_run):
    rows = finished_run.metrics
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert list(row)[:6] == ["step", "epoch", "loss", "lr", "grad_norm", "tokens"]
        assert {"tokens_per_second", "tflops", "mfu", "memory_gb", "loss_scale", "skipped_steps"} < row.keys()
        assert row["tokens_per_second"] > 0
        assert row["tflops"] > 0
    assert [row["tokens"] for row in rows] == [512, 1024, 1536]


def test_tensorboard_has_the_same_curves(finished_run):
    events = EventAccumulator(str(finished_run.folder / "tb_logs"))
    events.Reload()
    for key in ("loss", "lr", "grad_norm", "tokens_per_second", "tflops", "memory_gb", "loss_scale"):
        points = events.Scalars(f"train/{key}")
        assert [point.step for point in points] == [1, 2, 3]
        assert [point.value for point in points] == pytest.approx(finished_run.column(key), rel=1e-6)


def test_tensorboard_describes_the_run(finished_run):
    events = EventAccumulator(str(finished_run.folder / "tb_logs")).Reload()
    texts = {
        title: events.Tensors(f"{title}/text_summary")[0].tensor_proto.string_val[0].decode()
        for title in ("flags", "model", "plan", "machine")
    }
    assert "| batch_size | 8 |" in texts["flags"]
    assert "_given" not in texts["flags"]
    assert '"hidden_size": 64' in texts["model"]
    assert "3 steps of 8 sequences, 512 tokens, 1,536 in all" in texts["plan"]
    assert f"torch {torch.__version__}" in texts["machine"]
    assert "_hparams_/session_start_info" in events.summary_metadata


def test_secrets_in_the_environment_are_not_written(finished_run):
    files = [path for path in finished_run.folder.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


def test_checkpoint_folders(finished_run):
    assert {folder.name for folder in finished_run.save_dir.iterdir()} == {
        "epoch0-step2",
        "epoch0-step3",
        "final",
        ".lock",
    }
    folder = finished_run.save_dir / "epoch0-step3"
    kinds = {"model", "optimizer", "lr_scheduler", "running_states.json", "manifest.json"}
    assert {path.name for path in folder.iterdir()} == kinds
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    files.pop("manifest.json")
    manifest = json.loads((folder / "manifest.json").read_text())["files"]
    assert {name: file["bytes"] for name, file in manifest.items()} == files
    states = json.loads((folder / "running_states.json").read_text())
    position = {"epoch": 0, "step": 3, "sequences": EPOCH, "tokens": EPOCH * SEQUENCE_LENGTH}
    assert {name: states[name] for name in position} == position
    assert states["settings"]["seed"] == 42


def test_final_folder_loads_and_generates(finished_run, sample_tokenizer):
    folder = finished_run.save_dir / "final"
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.dtype is torch.bfloat16
    assert (model.config.bos_token_id, model.config.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    inputs = tokenizer("def main():", return_tensors="pt")
    assert inputs["input_ids"].tolist() == sample_tokenizer("def main():", return_tensors="pt")["input_ids"].tolist()
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    assert tokens.shape[1] > inputs["input_ids"].shape[1]

    states = optimizer_states(finished_run.save_dir / "epoch0-step3")
    weights = model.state_dict()
    assert weights.keys() == {spec.name for spec in parameter_specs(load_config("test"))}
    for name, weight in weights.items():
        assert torch.equal(weight, states[f"{name}.master"].bfloat16()), name


# ----------------------------------------------------------------------------------------------------------- behaviour


def test_dry_run_only_prints(monkeypatch, become_rank_0, capsys, tmp_path, sample_flags, sample_dataset):
    folders = ["-o", tmp_path / "checkpoint", "-t", tmp_path / "tb_logs"]
    flags = ["-p", "zero2", "-b", 3, "--accumulation_steps", 2, "--dry_run", *folders]
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *map(str, [*sample_flags, *flags])])
    become_rank_0(8)
    monkeypatch.setattr(session, "launch", None)
    assert program.main() == 0
    out = capsys.readouterr().out
    assert "3 x 2 accumulated x 8 data-parallel = 48 sequences x 64 tokens = 3,072 tokens" in out
    assert re.search(
        r"^host memory: checkpoints .* on one rank at most, .* on all 8; resuming takes up to .* per rank$", out, re.M
    )
    assert list(tmp_path.iterdir()) == []
    assert not torch.distributed.is_initialized()


def test_only_the_end_is_saved(pretrain):
    run = pretrain("-p", "zero2", "-x", "bf16", "-b", 1, "-i", 0, "--max_steps", 4)
    assert {folder.name for folder in run.save_dir.iterdir()} == {"epoch0-step4", "final", ".lock"}


def test_init_from(pretrain, finished_run, sample_dataset):
    """The first loss equals the given model's; a step with a negligible learning rate keeps its weights."""
    folder = finished_run.save_dir / "final"
    run = pretrain(
        *("--init_from", folder, "-p", "hybrid_parallel", "--tp", 2, "--pp", 1, "-x", "fp32"),
        *("-b", 4, "--max_steps", 1, "--lr", "1e-30"),
        processes=2,
    )
    batch = batch_at(sample_dataset, 0, 4)
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
    assert run.column("loss") == [pytest.approx(model(batch, labels=batch).loss.item(), rel=2e-6)]
    for file in sorted(folder.glob("*.safetensors")):
        after = load_file(run.save_dir / "final" / file.name)
        assert all(torch.equal(after[name], weight.float()) for name, weight in load_file(file).items())


BY_GLOBAL_RANK = """
class ByGlobalRank(training.batches.ShardedSampler):
    def __init__(self, dataset, num_replicas, rank, **kwargs):
        super().__init__(dataset, console.world_size(), console.rank(), **kwargs)
training.batches.ShardedSampler = ByGlobalRank
"""
OWN_ORDER = """
class OwnOrder(training.batches.ShardedSampler):
    def __init__(self, *args, seed, **kwargs):
        super().__init__(*args, seed=seed + console.rank(), **kwargs)
training.batches.ShardedSampler = OwnOrder
"""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (BY_GLOBAL_RANK, "1 data-parallel ranks read 2 distinct parts of the data"),
        (OWN_ORDER, "rank 1 reads a different batch than its model-parallel peers"),
    ],
)
def test_model_parallel_peers_must_read_the_same_batch(pretrain, change, message):
    layout = ["-p", "hybrid_parallel", "--tp", 2, "--pp", 1, "-x", "bf16"]
    run = pretrain(*layout, "--max_steps", 4, processes=2, change=change, check=False)
    assert run.returncode != 0
    assert message in run.stderr
    assert run.metrics == []


def test_divergence_stops_the_run(pretrain):
    flags = ["-p", "zero2", "-x", "bf16", "--lr", "1e30", "-i", 1, "--max_steps", 9]
    run = pretrain(*flags, check=False)
    assert run.returncode == RUN_FAILED
    last = run.column("step")[-1]
    assert last < 9
    assert run.stderr.count("\n") == 1
    message = rf"pretrain.py: .* at step {last + 1}, learning rate .*: training stopped; resume with -f "
    assert re.match(message + re.escape(str(run.save_dir / f"epoch0-step{last}")), run.stderr)


# ---------------------------------------------------------------------------------------------------------- quickstart


def test_quickstart_and_its_printed_command(tmp_path):
    """Run a quarter of the quickstart in a copy of the repository, then the training command that it prints."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    for room in (ROOT / "scripts", *(path.parent for path in ROOT.glob("*/__init__.py"))):
        shutil.copytree(room, tmp_path / room.name, dirs_exist_ok=True)
    script = tmp_path / "scripts" / "quickstart.sh"
    whole = script.read_text()
    script.write_text(quarter := whole.replace("--max_steps 400 -i 200", "--max_steps 100 -i 50"))
    assert quarter != whole
    env = {"LLAMA_PYTHON": sys.executable}
    with Run(["bash", script], tmp_path / "output", env, cwd=tmp_path.parent) as run:
        assert run.wait(timeout=800) == 0, run.output()  # takes minutes, longer on a busy machine
    start, end = map(float, re.search(r"quickstart: loss (\S+) at step 1, (\S+) averaged", run.stdout).groups())
    assert 8 < start < 8.6  # ln 4096 = 8.3, the loss of uniform predictions
    assert end < start - 2
    continuation = run.stdout.rpartition('the model continues "Return the":\n')[2]
    assert continuation.startswith("Return the")
    assert len(continuation.split()) > 4
    assert (tmp_path / "quickstart" / "checkpoint" / "final" / "tokenizer.model").is_file()

    (printed,) = (line for line in run.stdout.splitlines() if line.startswith("    ") and " pretrain.py " in line)
    command = [*shlex.split(printed), "--max_steps", "2", "-o", "copied/checkpoint", "-t", "copied/tb_logs", "-s", "1"]
    with Run(command, tmp_path / "copied_output", env, cwd=tmp_path) as copied:
        assert copied.wait() == 0, copied.output()
    assert (tmp_path / "copied" / "checkpoint" / "epoch0-step2" / "manifest.json").is_file()


# ---------------------------------------------------------------------------------------------------------------- data

PRINT_CALLS = """
def printed(function):
    def call(*args):
        print("called:", function.__name__, flush=True)
        return function(*args)
    return call
for owner, name in (
    (training.batches.Batches, "_read"), (training.loop, "forward_backward"), (training.loop, "optimizer_step")
):
    setattr(owner, name, printed(getattr(owner, name)))
"""


def test_the_next_batch_is_prefetched_during_the_backward_pass_except_after_the_last_step(pretrain):
    run = pretrain("-p", "zero2", "-x", "bf16", "--max_steps", 3, change=PRINT_CALLS)
    calls = [line.split()[1] for line in run.stdout.splitlines() if line.startswith("called:")]
    read, compute, update = "_read", "forward_backward", "optimizer_step"
    assert calls == [read, *[compute, read, update] * 2, compute, update]
    assert all(0 <= row["data_wait"] < 1 for row in run.metrics)
