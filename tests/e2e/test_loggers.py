"""W&B beside the other logs, against the files of its offline mode; and runs with names in one folder of logs."""

import json
import struct
from pathlib import Path

from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

from launching import start_pretrain
from runs import problems_of

BLOCK, HEADER, BEGIN = 32768, 7, b":W&B"  # of a file of W&B: LevelDB's log format after a header of 7 bytes


def records_of(path: Path) -> list:
    """Return the protobuf records in a file of W&B."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, position, parts, found = path.read_bytes(), HEADER, b"", []
    assert content.startswith(BEGIN)
    while position + HEADER <= len(content):
        if BLOCK - position % BLOCK < HEADER:
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        parts += content[position + HEADER : position + HEADER + length]
        position += HEADER + length
        if kind in (1, 4):  # whole, or the last part
            found.append(Record.FromString(parts))
            parts = b""
    return found


def history_of(record) -> dict:
    return {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}


def test_offline_files_of_wandb_hold_each_row_of_one_run_over_a_resume(sample_flags, sample_dataset, tmp_path):
    flags = [*sample_flags, "-p", "zero2", "-x", "fp32", "-b", 4, "-i", 2, "--wandb", "llamas", "--run_name", "first"]
    flags += ["--lr_schedule", "constant"]
    for steps in ("4", "6"):
        resume = [*flags, "--max_steps", steps, "-f", "latest"]
        with start_pretrain(*resume, folder=tmp_path, env={"WANDB_MODE": "offline", "HF_TOKEN": "hf_secret"}) as run:
            assert run.wait() == 0, run.output()
    logs = tmp_path / "tb_logs" / "first"
    rows = [json.loads(line) for line in (logs / "metrics.jsonl").read_text().splitlines()]
    files = sorted(logs.glob("wandb/offline-run-*/*.wandb"))
    sessions = [records_of(file) for file in files]
    starts = [record.run for records in sessions for record in records if record.HasField("run")]
    assert {(start.project, start.display_name) for start in starts} == {("llamas", "first")}
    assert len(files) == 2
    assert len({start.run_id for start in starts}) == 1
    config = {item.key: json.loads(item.value_json) for item in starts[0].config.update}
    assert (config["lr"], config["plugin"]) == (3e-4, "zero2")
    logged = [history_of(record) for records in sessions for record in records if record.HasField("history")]
    assert [row["step"] for row in logged] == [1, 2, 3, 4, 5, 6]
    for row, expected in zip(logged, rows, strict=True):
        assert {name: row[name] for name in expected if expected[name] is not None} == {
            name: value for name, value in expected.items() if value is not None
        }
    for file in filter(Path.is_file, logs.rglob("wandb/**/*")):
        assert b"hf_secret" not in file.read_bytes(), file


def test_runs_with_names_share_a_folder_and_compare(start, tmp_path):
    for name in ("low", "high"):
        flags = ["-p", "zero2", "-x", "fp32", "-b", 4, "--max_steps", 2, "-o", tmp_path / name, "--run_name", name]
        with start(*flags, "-t", tmp_path / "tb_logs", folder=tmp_path) as run:
            assert run.wait() == 0, run.output()
    board = EventMultiplexer().AddRunsFromDirectory(str(tmp_path / "tb_logs"))
    board.Reload()
    losses = {name: tags["scalars"] for name, tags in board.Runs().items() if "train/loss" in tags["scalars"]}
    assert set(losses) == {"low", "high"}
    assert not list((tmp_path / "tb_logs").glob("*.jsonl"))


def test_mistakes_are_one_line(monkeypatch):
    assert problems_of("-p zero2 --run_name a/b") == [
        "--run_name: 'a/b' is not a name for a folder; give one without slashes"
    ]
    for name in ("", "team/llamas", "a" * 129):
        (problem,) = problems_of(f"-p zero2 --wandb={name}")
        assert problem.startswith(f"--wandb: {name!r} is not a project of W&B; give 1 to 128 letters, none of # %")
    monkeypatch.setattr("training.wandb_run.PACKAGE", "no_such_package")
    assert problems_of("-p zero2 --wandb llamas") == [
        "--wandb: the package wandb is not installed; install it with `pip install wandb`, or leave the flag out"
    ]


def test_training_goes_on_if_wandb_fails(start, tmp_path):
    change = "import training.wandb_run; training.wandb_run.PACKAGE = 'json'"  # a module without init()
    flags = ["-p", "zero2", "-x", "fp32", "-b", 4, "--max_steps", 2, "--wandb", "llamas"]
    with start(*flags, folder=tmp_path, change=change) as run:
        assert run.wait() == 0, run.output()
    assert "--wandb: metrics do not reach W&B (module 'json' has no attribute 'init'); training goes on" in run.stdout
    assert run.column("step") == [1, 2]
