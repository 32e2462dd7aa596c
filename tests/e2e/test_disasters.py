"""Disk failures during a run: full or read-only disks, and checkpoints with lost or changed bytes."""

import contextlib
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from launching import optimizer_states
from runtime.process import NO_ROOM, USAGE_ERROR

FLAGS = ["-p", "zero2", "-x", "bf16", "-b", 8, "--max_steps", 6, "-i", 2]


@contextlib.contextmanager
def file_system(folder: Path, megabytes: float):
    """Mount a separate file system at `folder`; skip the test if this process may not mount one."""
    folder.mkdir()
    size = f"size={int(megabytes * 1024)}k"
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", folder], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip("needs the right to mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture(scope="module")
def whole(pretrain):
    return pretrain(*FLAGS)


@pytest.fixture
def copy(whole, tmp_path):
    """Return a copy of the finished run without `final`, for a test to damage."""
    shutil.copytree(whole.folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint" / "final")
    return tmp_path / "run"


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def assert_same_states(checkpoint: Path, expected: Path) -> None:
    """Assert that master weights and moments are equal to the bit."""
    states, others = optimizer_states(checkpoint), optimizer_states(expected)
    assert states.keys() == others.keys()
    assert all(torch.equal(states[name], others[name]) for name in states)


def size_of(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20


# Another file takes up the free space after the check has found enough.
FILLED = """
enough = checkpointing.writer.check_room
def check_then_fill(save_dir, job):
    enough(save_dir, job)
    if any(save_dir.glob("epoch*-step2")):
        with open(save_dir / "another's", "wb") as file:
            while file.write(b"x" * 4096):
                if os.statvfs(save_dir).f_bavail * 4096 < {left}:
                    break
checkpointing.writer.check_room = check_then_fill
"""


@pytest.mark.parametrize("left", [4096, 2**20], ids=["nothing", "a part"])
def test_disk_fills_up_while_a_checkpoint_is_written(pretrain, whole, tmp_path, left):
    one = size_of(whole.save_dir / "epoch0-step2")
    with file_system(tmp_path / "disk", 6 * one) as disk:
        failed = pretrain(*FLAGS, "-o", disk, folder=tmp_path / "run", change=FILLED.format(left=left), check=False)
        assert failed.returncode == 1, failed.output()
        assert "the checkpoint could not be written, and no incomplete one is left under its name" in failed.stderr
        assert "No space left on device" in failed.stderr
        assert f"--keep_checkpoints needs less room) and resume with -f {disk / 'epoch0-step2'}" in failed.stderr
        assert "Traceback" not in failed.stderr
        assert checkpoints(disk) == ["another's", "epoch0-step2"]

        refused = pretrain(*FLAGS, "-o", disk, "-f", "latest", folder=tmp_path / "run", check=False)
        assert refused.returncode == NO_ROOM, refused.output()
        assert "pretrain.py: --save_dir: a checkpoint takes " in refused.stderr
        (disk / "another's").unlink()
        resumed = pretrain(*FLAGS, "-o", disk, "-f", "latest", folder=tmp_path / "run")
        assert resumed.column("loss") == whole.column("loss")
        assert (
            optimizer_states(disk / "epoch0-step6").keys() == optimizer_states(whole.save_dir / "epoch0-step6").keys()
        )


def test_disk_without_room_is_refused_before_training(pretrain, whole, tmp_path):
    one = size_of(whole.save_dir / "epoch0-step2")
    with file_system(tmp_path / "disk", one / 2) as disk:
        cache = ["--cache_dir", tmp_path / "cache"]
        refused = pretrain(*FLAGS, *cache, "-o", disk / "run", folder=tmp_path / "run", check=False)
        assert refused.returncode == 2
        assert "--save_dir: a checkpoint takes" in refused.stderr
        assert not refused.metrics
        assert not (tmp_path / "cache").exists()  # data was not prepared either
        assert not (disk / "run").exists()


def test_disk_without_room_for_a_byte_is_refused_before_training(pretrain, tmp_path):
    with file_system(tmp_path / "disk", 0.1) as disk:
        with contextlib.suppress(OSError), open(disk / "another's", "wb", buffering=0) as file:
            while file.write(b"x" * 4096):
                pass
        reasons = {"save_dir": "a checkpoint takes", "tensorboard_dir": f"{disk} cannot be written to (No space left"}
        for flag, reason in reasons.items():
            refused = pretrain(*FLAGS, f"--{flag}", disk, folder=tmp_path / flag, check=False)
            assert refused.returncode == 2
            assert f"--{flag}: {reason}" in refused.stderr
            assert "Traceback" not in refused.stderr


def test_read_only_folder_is_refused_before_training(pretrain, tmp_path):
    with file_system(tmp_path / "disk", 1) as disk:
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        refused = pretrain(*FLAGS, "-o", disk / "run", folder=tmp_path / "run", check=False)
        assert refused.returncode == 2
        assert f"--save_dir: no permission to write in {disk}; give another folder" in refused.stderr
        assert not refused.metrics


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [truncate, Path.unlink], ids=["truncated", "missing"])
@pytest.mark.parametrize("file", ["optimizer/optimizer-00003-of-00007.safetensors", "lr_scheduler"])
def test_latest_skips_a_checkpoint_with_a_truncated_or_missing_file(pretrain, whole, copy, file, damage):
    last = copy / "checkpoint" / "epoch0-step6"
    damage(last / file)
    run = pretrain(*FLAGS, "-f", "latest", folder=copy)
    assert f"--load latest: passing over {last}, which is incomplete" in run.stdout
    assert run.column("loss") == whole.column("loss")
    assert_same_states(last, whole.save_dir / "epoch0-step6")


@pytest.mark.parametrize("processes", [1, 2])
def test_latest_passes_over_checkpoints_with_a_flipped_bit(pretrain, whole, copy, processes):
    damaged = [
        copy / "checkpoint" / name / "optimizer" / "optimizer-00003-of-00007.safetensors"
        for name in ("epoch0-step6", "epoch0-step4")
    ]
    for path in damaged:
        flip_a_bit(path)
    run = pretrain(*FLAGS, "-b", 8 // processes, "-f", "latest", folder=copy, processes=processes)
    for path in damaged:
        folder = path.parents[1]
        assert run.stdout.count(f"--load latest: {path} is damaged; its folder is now {folder.name}.damaged") == 1
        assert folder.with_name(f"{folder.name}.damaged").is_dir()
    assert f"resumed: {copy / 'checkpoint' / 'epoch0-step2'}" in run.stdout
    assert run.column("step") == [1, 2, 3, 4, 5, 6]
    if processes == 1:
        assert_same_states(copy / "checkpoint" / "epoch0-step6", whole.save_dir / "epoch0-step6")


def test_a_run_whose_only_checkpoint_is_damaged_begins_anew(pretrain, whole, copy):
    for name in ("epoch0-step4", "epoch0-step6"):
        shutil.rmtree(copy / "checkpoint" / name)
    flip_a_bit(copy / "checkpoint" / "epoch0-step2" / "model" / "model-00003-of-00007.safetensors")
    run = pretrain(*FLAGS, "-f", "latest", folder=copy)
    assert f"--load latest: no checkpoint in --save_dir {copy / 'checkpoint'} yet; a new run begins" in run.stdout
    assert run.column("loss") == whole.column("loss")
    assert_same_states(copy / "checkpoint" / "epoch0-step6", whole.save_dir / "epoch0-step6")


def test_latest_passes_over_damaged_running_states(pretrain, whole, copy):
    last = copy / "checkpoint" / "epoch0-step6"
    flip_a_bit(last / "running_states.json")
    run = pretrain(*FLAGS, "-f", "latest", folder=copy)
    assert f"--load latest: passing over {last}, which is incomplete or damaged" in run.stdout
    assert_same_states(last, whole.save_dir / "epoch0-step6")


@pytest.mark.parametrize("file", ["optimizer/optimizer-00003-of-00007.safetensors", "running_states.json"])
def test_a_flipped_bit_in_a_checkpoint_given_by_name(pretrain, copy, file):
    shutil.rmtree(copy / "checkpoint" / "epoch0-step6")
    chosen = copy / "checkpoint" / "epoch0-step4"
    flip_a_bit(chosen / file)
    before = checkpoints(copy / "checkpoint")
    run = pretrain(*FLAGS, "-f", chosen, folder=copy, check=False)
    assert run.returncode == USAGE_ERROR
    assert f"--load: {chosen / file} is damaged; choose another checkpoint" in run.stderr
    assert checkpoints(copy / "checkpoint") == before


def test_a_finished_run_makes_no_model_from_a_damaged_checkpoint(pretrain, whole, copy):
    """It trains the steps since the one before again."""
    damaged = copy / "checkpoint" / "epoch0-step6" / "model" / "model-00003-of-00007.safetensors"
    flip_a_bit(damaged)
    run = pretrain(*FLAGS, "-f", "latest", folder=copy)
    assert f"--load latest: {damaged} is damaged; its folder is now epoch0-step6.damaged" in run.stdout
    model = "final/model-00003-of-00007.safetensors"
    assert (copy / "checkpoint" / model).read_bytes() == (whole.save_dir / model).read_bytes()


def test_half_deleted_checkpoints_are_skipped(pretrain, whole, copy):
    """A user or a killed run may have deleted only the manifest, or half of the folder."""
    (copy / "checkpoint" / "epoch0-step6" / "manifest.json").unlink()
    shutil.rmtree(copy / "checkpoint" / "epoch0-step4" / "optimizer")
    run = pretrain(*FLAGS, "-f", "latest", folder=copy)
    for step in (4, 6):
        assert f"passing over {copy / 'checkpoint' / f'epoch0-step{step}'}, which is incomplete" in run.stdout
    assert run.column("loss") == whole.column("loss")
    assert checkpoints(run.save_dir) == ["epoch0-step2", "epoch0-step4", "epoch0-step6", "final"]


def test_a_second_run_is_refused_while_the_first_is_running(start, pretrain, tmp_path):
    with start("-p", "zero2", "-x", "bf16", "-b", 1, "-e", 1000) as run:
        run.wait_until(lambda: len(run.metrics) >= 1, "the first step")
        for flag, folder in (("--save_dir", run.save_dir), ("--tensorboard_dir", run.folder / "tb_logs")):
            flags = ["-p", "zero2", "-x", "bf16", "-b", 1, "--cache_dir", tmp_path / "cache", flag, folder]
            second = pretrain(*flags, check=False)
            assert second.returncode == 2
            assert f"{flag}: another run (process" in second.stderr
            assert not (tmp_path / "cache").exists()  # refused before data is prepared
            assert {path.name for path in second.folder.iterdir()} == {"stdout", "stderr"}
        assert run.returncode is None
        steps = run.column("step")
        assert steps == list(range(1, len(steps) + 1))
