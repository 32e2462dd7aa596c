"""Checkpoints on real disks and ranks: the same bytes from every plugin, complete or absent, loaded and refused."""

import copy
import json
import multiprocessing
import os
import re
import resource
import shutil
import socket
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch.distributed.distributed_c10d import _set_pg_timeout
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import checkpointing.folder
import checkpointing.writer
from checkpointing.export import export_model
from checkpointing.folder import (
    MODEL_KEYS,
    check_model,
    check_shared,
    claim_save_dir,
    find_checkpoint,
    is_complete,
)
from checkpointing.pretrained import check_pretrained, load_pretrained
from checkpointing.reader import load_checkpoint
from checkpointing.writer import CheckpointWriter, Retention, host_memory
from checkpoints import make_checkpoint
from corpora import error_of
from engine import shards
from engine.shards import MASTER, MOMENTS, staging_bytes
from engine.step import loss_scaler
from model_utils import load_config, parameter_specs
from planning.memory import checkpoint_memory
from processes import boosted, job, random_states, run_ranks
from runtime.collectives import on_rank_zero
from runtime.console import InputError, RunError
from runtime.files import checksum
from training.plan import check_agreement
from training.run import TrainState

pytestmark = pytest.mark.slow

NOT_WRITTEN = "the checkpoint could not be written, and no incomplete one is left under its name"
STATES = {"epoch": 0, "step": 6, "adam_steps": 5, "tokens": 96, "settings": {"schedule_steps": 20, "seed": 3}}
LAYOUTS = [
    (1, "-p zero2"),
    (2, "-p zero2"),
    (2, "-p gemini"),
    (2, "-p hybrid_parallel --tp 1 --pp 1 --zero 1"),
    (4, "-p hybrid_parallel --tp 2 --pp 2"),
]


def save(engine, folder, states):
    """Write a checkpoint, wait for it and return its folder."""
    writer = CheckpointWriter(folder, engine, Retention())
    writer.save(states)
    writer.wait()
    return writer.latest


def save_random(folder, flags, states=STATES):
    """Save random state, by default as of step 6, and return the checkpoint's folder."""
    engine = boosted(flags + " -b 2")
    values = random_states(engine.config)
    shards.restore(engine, lambda name, key: values[name, key], states["adam_steps"])
    return save(engine, folder, states)


def save_short_of_memory(folder, flags):
    """Save with rank 0 short of host memory; return the folder, and the number of copies staged on this rank."""
    staged = []
    if dist.get_rank() == 0:
        checkpointing.writer.host_memory = lambda: (2**40, 0)
    own = CheckpointWriter._staged
    CheckpointWriter._staged = lambda *arguments: staged.append(arguments) or own(*arguments)
    return save_random(folder, flags), len(staged)


def save_to_allocated_buffers(folder, flags, short=False):
    """Allocate the buffers, then save; return their addresses by name before and after, and the checkpoint."""
    if short and dist.get_rank() == 0:
        checkpointing.writer.host_memory = lambda: (2**40, 0)
    engine = boosted(flags + " -b 2")
    writer = CheckpointWriter(folder, engine, Retention())
    writer.allocate()
    values = random_states(engine.config)
    shards.restore(engine, lambda name, key: values[name, key], STATES["adam_steps"])
    if writer._allocation:
        writer._allocation.join()
    before = {name: buffer.data_ptr() for name, buffer in writer._buffers.items()}
    writer.save(STATES)
    writer.wait()
    return before, {name: buffer.data_ptr() for name, buffer in writer._buffers.items()}, writer.latest


def outlast_the_process_group(folder, wait):
    """Save in the foreground, then export on rank 0; one of these takes longer than the group's timeout."""
    _set_pg_timeout(timedelta(seconds=4), dist.group.WORLD)
    checkpointing.writer.host_memory = lambda: (2**40, 0)
    own = checkpointing.writer.write_tensors

    def write_slowly(path, content):
        if wait == "file" and path.name.startswith("model-00001"):
            time.sleep(9)
        own(path, content)

    checkpointing.writer.write_tensors = write_slowly
    checkpoint = save_random(folder, "-p zero2")
    on_rank_zero(lambda: time.sleep(9 if wait == "export" else 0), "not exported")
    return checkpoint


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of two ranks under zero2. Tests must not change it."""
    return run_ranks(2, save_random, tmp_path_factory.mktemp("saved"), "-p zero2")[0]


def content_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class TestSave:
    def test_is_the_documented_folder(self, saved):
        assert saved.name == "epoch0-step6"
        assert sorted(path.name for path in saved.iterdir()) == [
            "lr_scheduler",
            "manifest.json",
            "model",
            "optimizer",
            "running_states.json",
        ]
        assert is_complete(saved)
        assert json.loads((saved / "running_states.json").read_text()) == {**STATES, "loss_scaler": None}
        assert json.loads((saved / "lr_scheduler").read_text()) == {"last_epoch": 6, "base_lrs": [3e-4]}
        assert [path.name for path in saved.parent.iterdir()] == [saved.name]

    @pytest.mark.parametrize(("ranks", "flags"), LAYOUTS)
    def test_every_layout_writes_the_same_bytes(self, saved, tmp_path, ranks, flags):
        folders = run_ranks(ranks, save_random, tmp_path, flags)
        assert folders == [tmp_path / "epoch0-step6"] * ranks
        assert content_of(folders[0]) == content_of(saved)

    @pytest.mark.parametrize(("ranks", "flags"), LAYOUTS)
    def test_all_ranks_wait_for_each_file_if_one_is_short_of_memory(self, saved, tmp_path, ranks, flags):
        """Cover pipeline stages with different numbers of files."""
        folders, staged = zip(*run_ranks(ranks, save_short_of_memory, tmp_path, flags), strict=True)
        assert content_of(folders[0]) == content_of(saved)
        assert staged == (0,) * ranks

    @pytest.mark.parametrize(("ranks", "flags"), [(2, "-p gemini"), (4, "-p hybrid_parallel --tp 2 --pp 2")])
    def test_uses_the_buffers_allocated_before_training(self, saved, tmp_path, ranks, flags):
        results = run_ranks(ranks, save_to_allocated_buffers, tmp_path, flags)
        assert content_of(results[0][2]) == content_of(saved)
        assert all(before == after for before, after, _ in results)
        specs = parameter_specs(load_config("test"))
        names = sorted(f"{spec.name}.{key}" for spec in specs for key in (MASTER, *MOMENTS))
        assert sorted(name for before, _, _ in results for name in before) == names

        shapes = {f"{spec.name}.{MASTER}": spec.shape for spec in specs}
        by_rank = [
            sum(staging_bytes(shapes[name], True) for name in before if name in shapes) for before, _, _ in results
        ]
        planned = checkpoint_memory(job(f"{flags} -b 2 --dry_run --gpus {ranks}"))
        assert planned[:2] == (max(by_rank), sum(by_rank))

    def test_nothing_is_allocated_if_a_rank_is_short_of_memory(self, saved, tmp_path):
        results = run_ranks(2, save_to_allocated_buffers, tmp_path, "-p zero2", True)
        assert content_of(results[0][2]) == content_of(saved)
        assert [result[:2] for result in results] == [({}, {})] * 2

    @pytest.mark.parametrize("wait", ["file", "export"])
    def test_a_disk_may_take_longer_than_an_exchange(self, tmp_path, wait):
        assert run_ranks(2, outlast_the_process_group, tmp_path, wait) == [tmp_path / "epoch0-step6"] * 2
        assert is_complete(tmp_path / "epoch0-step6")

    def test_tensors_are_full_and_exact(self, saved):
        config = load_config("test")
        values = random_states(config)
        model, optimizer = {}, {}
        for path in (saved / "model").glob("*.safetensors"):
            model.update(load_file(path))
            with safe_open(path, framework="pt") as file:
                assert file.metadata() == {"format": "pt"}
        for path in (saved / "optimizer").glob("*.safetensors"):
            optimizer.update(load_file(path))
        assert model.keys() == {spec.name for spec in parameter_specs(config)}
        assert optimizer.keys() == {f"{name}.{key}" for name, key in values}
        for (name, key), value in values.items():
            assert torch.equal(optimizer[f"{name}.{key}"], value)
            if key == MASTER:
                assert torch.equal(model[name], value.bfloat16())

    def test_hugging_face_loads_the_model(self, saved):
        config = AutoConfig.from_pretrained(saved / "model")
        assert config.torch_dtype == torch.bfloat16
        assert config.use_cache
        assert config.architectures == ["LlamaForCausalLM"]
        index = json.loads((saved / "model" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == 2 * sum(spec.shape.numel() for spec in parameter_specs(config))
        model, loading = AutoModelForCausalLM.from_pretrained(
            saved / "model", torch_dtype="auto", output_loading_info=True
        )
        assert not any(loading.values())
        values = random_states(config)
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, values[name, MASTER].bfloat16())

    def test_replaces_a_checkpoint_of_the_same_name(self, tmp_path):
        (tmp_path / "epoch0-step6" / "model").mkdir(parents=True)
        (tmp_path / "epoch0-step6" / "model" / "stale").touch()
        (tmp_path / ".epoch0-step6.incomplete").mkdir()
        (tmp_path / ".epoch0-step6.incomplete" / "stale").touch()
        run_ranks(1, save_random, tmp_path, "-p zero2")
        assert [path.name for path in tmp_path.iterdir()] == ["epoch0-step6"]
        assert "stale" not in [path.name for path in tmp_path.rglob("*")]
        assert is_complete(tmp_path / "epoch0-step6")


class TestFailedSave:
    """Ranks that cannot write files larger than some size, as on a full disk."""

    @pytest.mark.parametrize(
        ("failing", "size"), [(0, 100_000), (1, 100_000), (0, 10)], ids=["tensors", "other rank's tensors", "all"]
    )
    @pytest.mark.parametrize("flags", ["-p zero2", "-p gemini"])
    def test_every_rank_raises_and_the_earlier_checkpoint_stays(self, tmp_path, flags, failing, size):
        messages = run_ranks(2, save_twice_and_fail, tmp_path, flags, failing, size)
        for message in messages:
            assert message.startswith(NOT_WRITTEN)
            assert f": rank {failing}: " in message
            assert "File too large" in message
            assert "\n" not in message
        visible = [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")]
        assert visible == ["epoch0-step6"]
        assert find_checkpoint("latest", tmp_path) == tmp_path / "epoch0-step6"

    def test_every_rank_raises_when_the_folder_cannot_be_made(self, tmp_path):
        (tmp_path / "file").touch()
        for message in run_ranks(2, message_of, tmp_path / "file", "-p zero2", STATES):
            assert message.startswith(NOT_WRITTEN)
            assert "start again (no checkpoint was saved yet): rank 0: FileExistsError: " in message

    @pytest.mark.parametrize(
        ("file", "change"),
        [
            ("model/model-00002-of-00007.safetensors", "remove"),
            ("optimizer/optimizer-00003-of-00007.safetensors", "truncate"),
        ],
    )
    def test_a_file_that_changes_after_it_was_written_costs_no_earlier_checkpoint(self, tmp_path, file, change):
        """Raise on all ranks: with --keep_checkpoints 1, a checkpoint without the file would replace the good one."""
        for message in run_ranks(2, save_and_lose, tmp_path, file, change):
            assert message.startswith(NOT_WRITTEN)
            lost = f"{tmp_path / 'epoch0-step7' / file} is gone or cut short although it was written"
            assert message.endswith(f"resume with -f {tmp_path / 'epoch0-step6'}: rank 0: {lost}")
        assert [path.name for path in tmp_path.iterdir()] == ["epoch0-step6"]
        assert is_complete(tmp_path / "epoch0-step6")

    def test_a_rank_that_dies_leaves_the_earlier_checkpoint(self, tmp_path):
        with pytest.raises(torch.multiprocessing.ProcessExitedException):
            run_ranks(1, save_twice_and_die, tmp_path)
        assert (tmp_path / ".epoch0-step7.incomplete").is_dir()
        assert find_checkpoint("latest", tmp_path) == tmp_path / "epoch0-step6"
        run_ranks(1, save_random, tmp_path, "-p zero2", {**STATES, "step": 7})
        assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch0-step6", "epoch0-step7"]


def message_of(folder, flags, states):
    with pytest.raises(RunError) as caught:
        save_random(folder, flags, states)
    return str(caught.value)


def save_twice_and_fail(folder, flags, failing, size):
    save_random(folder, flags)
    if dist.get_rank() == failing:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    message = message_of(folder, flags, {**STATES, "step": 7})
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return message


def save_and_lose(folder, file, change):
    """Keep one checkpoint, and damage a file of the second once all ranks have written their files."""
    engine, earlier = boosted("-p zero2 -b 2"), save_random(folder, "-p zero2")
    write_model_index = checkpointing.writer.write_model_index

    def lose_and_write(model, config):
        path = model.parent / file
        path.unlink() if change == "remove" else os.truncate(path, 100)
        write_model_index(model, config)

    checkpointing.writer.write_model_index = lose_and_write
    writer = CheckpointWriter(folder, engine, Retention(keep_checkpoints=1), latest=earlier)
    shards.initialize_weights(engine)
    writer.save({**STATES, "step": 7})
    with pytest.raises(RunError) as caught:
        writer.wait()
    return str(caught.value)


def save_twice_and_die(folder):
    save_random(folder, "-p zero2")
    checkpointing.writer.write_model_index = lambda *arguments: os._exit(9)
    save_random(folder, "-p zero2", {**STATES, "step": 7})


class TestLoad:
    @pytest.mark.parametrize(("ranks", "flags"), LAYOUTS)
    def test_under_every_layout_bit_for_bit(self, saved, ranks, flags):
        values = random_states(load_config("test"))
        found = {}
        for part in run_ranks(ranks, load_and_gather, saved, flags):
            found.update(part)
        assert found.keys() == values.keys()
        assert all(torch.equal(found[key], values[key]) for key in values)

    def test_weights_that_are_nan(self, saved, tmp_path):
        """Damage the last element, which the first rank does not read."""
        folder = Path(shutil.copytree(saved, tmp_path / saved.name))
        path = min((folder / "optimizer").glob("*.safetensors"))
        content = load_file(path)
        name = max(key for key in content if key.endswith(MASTER))
        content[name].view(-1)[-1] = float("nan")
        save_file(content, path, metadata={"format": "pt"})
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"][f"optimizer/{path.name}"] = checksum(path)
        (folder / "manifest.json").write_text(json.dumps(manifest))
        assert set(run_ranks(2, error_of, load_and_gather, folder, "-p zero2")) == {
            f"--load: {name.removesuffix(f'.{MASTER}')} in {folder} has a NaN or an infinity; "
            "choose an earlier checkpoint"
        }

    def test_weights_of_a_model_folder(self, saved):
        values = random_states(load_config("test"))
        for part in run_ranks(2, load_weights_alone, saved / "model", "-p gemini"):
            for (name, key), value in part.items():
                expected = values[name, key].bfloat16().float() if key == MASTER else torch.zeros_like(value)
                assert torch.equal(value, expected)

    @pytest.mark.parametrize(
        ("ranks", "flags"),
        [
            (1, "-p zero2"),
            (1, "-p gemini"),
            (1, "-p hybrid_parallel --zero 0"),
            (2, "-p hybrid_parallel --tp 1 --zero 1"),
        ],
    )
    def test_loss_scale_of_fp16(self, tmp_path, ranks, flags):
        assert run_ranks(ranks, save_and_load_loss_scale, tmp_path, flags) == [(512.0, 77, 1)] * ranks

    def test_bf16_checkpoint_in_an_fp16_run_keeps_the_initial_scale(self, saved):
        assert run_ranks(1, load_in_fp16, saved) == [2.0**16]


def gather_all(engine):
    gathered = {}
    for shard in shards.local_shards(engine):
        for key in (MASTER, *MOMENTS):
            if (full := shard.gather(key, writer=0)) is not None:
                gathered[shard.spec.name, key] = full.detach().clone()
    return gathered


def load_and_gather(folder, flags):
    engine = boosted(flags + " -b 2")
    load_checkpoint(folder, engine)
    return gather_all(engine)


def load_weights_alone(folder, flags):
    engine = boosted(flags)
    load_pretrained(check_pretrained(folder, engine.config), engine)
    return gather_all(engine)


def grad_scaler_of(engine):
    return loss_scaler(engine).grad_scaler


def save_and_load_loss_scale(folder, flags):
    engine = boosted(flags + " -x fp16")
    shards.initialize_weights(engine)
    scaler = grad_scaler_of(engine)
    scaler._scale.fill_(512.0)
    scaler._growth_step, scaler._hysteresis_step = 77, 1
    saved = save(engine, folder, {"epoch": 0, "step": 3, "adam_steps": 0})
    other = boosted(flags + " -x fp16")
    load_checkpoint(saved, other)
    scaler = grad_scaler_of(other)
    return scaler.scale.item(), scaler._growth_step, scaler._hysteresis_step


def load_in_fp16(folder):
    engine = boosted("-p zero2 -x fp16")
    load_checkpoint(folder, engine)
    return loss_scaler(engine).loss_scale


HALF_HEAD = load_config("test").head_dim // 2


class TestCheckModel:
    def test_the_same_sizes(self, saved):
        config = load_config("test")
        config.torch_dtype, config.max_position_embeddings = torch.float16, 2048
        check_model(saved / "model", config, "--load")

    def test_lists_every_difference(self, saved):
        config = load_config("test")
        config.num_hidden_layers, config.vocab_size = 2, 512
        assert error_of(check_model, saved / "model", config, "--load") == (
            f"--load: {saved / 'model'} holds another model than this run's: "
            "num_hidden_layers 4 (not 2), vocab_size 1024 (not 512)"
        )

    @pytest.mark.parametrize("key", sorted({*MODEL_KEYS, "attention_dropout", "head_dim"}))
    def test_every_key_of_the_model_counts(self, saved, key):
        config = load_config("test")
        value = getattr(config, key)
        other = {bool: True, str: "gelu", float: 0.5, type(None): {"rope_type": "linear", "factor": 2.0}}
        setattr(config, key, other.get(type(value)) or value * 2)
        assert key in error_of(check_model, saved / "model", config, "--load")

    @pytest.mark.parametrize(
        ("scaling", "alike"),
        [
            (None, True),
            ({"rope_type": "linear", "factor": 4.0}, True),
            ({"rope_type": "dynamic", "factor": 4.0}, True),
            (load_config("llama3.2-1b").rope_scaling, True),
            ({"rope_type": "yarn", "factor": 4.0}, False),
            ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, False),
            ({"rope_type": "longrope", "short_factor": [1.0] * HALF_HEAD, "long_factor": [2.0] * HALF_HEAD}, False),
        ],
    )
    def test_a_context_that_changes_the_rotation(self, tmp_path, scaling, alike):
        """As transformers' own frequencies tell."""
        config = load_config("test")
        config.rope_scaling, config.max_position_embeddings = scaling, 128
        if (scaling or {}).get("rope_type") == "longrope":
            config.original_max_position_embeddings = 64
        config.save_pretrained(tmp_path)
        longer = copy.deepcopy(config)
        check_model(tmp_path, longer, "--load")
        longer.max_position_embeddings = 512
        before, after = LlamaRotaryEmbedding(config), LlamaRotaryEmbedding(longer)
        same = before.attention_scaling == after.attention_scaling and before.inv_freq.equal(after.inv_freq)
        assert same == alike
        if alike:
            check_model(tmp_path, longer, "--load")
        else:
            problem = error_of(check_model, tmp_path, longer, "--load")
            assert problem.endswith("holds another model than this run's: max_position_embeddings 128 (not 512)")


def bf16_config():
    config = load_config("test")
    config.torch_dtype = torch.bfloat16
    return config


def small_tokenizer():
    words = {"<s>": 0, "</s>": 1, "<unk>": 2, "a": 3}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def export(checkpoint, target):
    export_model(checkpoint, target, small_tokenizer())


class TestExport:
    def test_replaces_an_earlier_one_and_loads(self, saved, tmp_path):
        target = tmp_path / "final"
        target.mkdir()
        (target / "stale.safetensors").write_bytes(b"")
        before = content_of(saved)
        export(saved, target)
        assert [path.name for path in tmp_path.iterdir()] == ["final"]
        assert not (target / "stale.safetensors").exists()
        assert content_of(saved) == before
        values = random_states(load_config("test"))
        model = AutoModelForCausalLM.from_pretrained(target, torch_dtype="auto")
        assert torch.equal(model.lm_head.weight, values["lm_head.weight", MASTER].bfloat16())
        assert AutoTokenizer.from_pretrained(target).get_vocab() == small_tokenizer().get_vocab()

    def test_costs_no_space_on_the_same_disk(self, saved, tmp_path):
        export(saved, tmp_path / "final")
        for path in (saved / "model").glob("*.safetensors"):
            assert path.samefile(tmp_path / "final" / path.name)

    def test_is_on_disk_before_it_is_in_its_place(self, saved, tmp_path, monkeypatch):
        """Check every file and folder, links included."""
        synced, unsynced = set(), []
        fsync, rename = os.fsync, Path.rename

        def noted_fsync(descriptor):
            fsync(descriptor)
            synced.add(os.fstat(descriptor).st_ino)

        def checked_rename(path, target):
            unsynced.extend(part for part in (path, *path.rglob("*")) if part.stat().st_ino not in synced)
            return rename(path, target)

        monkeypatch.setattr(os, "fsync", noted_fsync)
        monkeypatch.setattr(Path, "rename", checked_rename)
        export(saved, tmp_path / "final")
        assert len(synced) > len(list((saved / "model").iterdir()))
        assert unsynced == []

    def test_copies_to_another_disk(self, saved):
        memory = Path("/dev/shm")
        if not memory.is_dir() or memory.stat().st_dev == saved.stat().st_dev:
            pytest.skip("there is no second file system here")
        with tempfile.TemporaryDirectory(dir=memory) as folder:
            target = Path(folder, "final")
            export(saved, target)
            for path in (saved / "model").iterdir():
                assert (target / path.name).read_bytes() == path.read_bytes()

    def test_failure_reaches_every_rank_and_leaves_the_earlier_one(self, saved, tmp_path):
        (tmp_path / "final").mkdir()
        for message in run_ranks(2, export_error, saved.parent / "none", tmp_path / "final"):
            assert message == f"no model: rank 0: {saved.parent / 'none' / 'manifest.json'} is missing or cut short"
        assert (tmp_path / "final").is_dir()


def export_error(checkpoint, target):
    with pytest.raises(RunError) as caught:
        on_rank_zero(lambda: export(checkpoint, target), "no model")
    return str(caught.value)


@pytest.mark.parametrize(("umask", "file", "folder"), [(0o002, 0o664, 0o775), (0o077, 0o600, 0o700)])
def test_files_and_folders_follow_the_umask(tmp_path, umask, file, folder):
    (checkpoint,) = run_ranks(1, save_and_export_under, umask, tmp_path)
    for path in (checkpoint, *checkpoint.rglob("*"), tmp_path / "final", *(tmp_path / "final").rglob("*")):
        assert path.stat().st_mode & 0o777 == (folder if path.is_dir() else file), path


def save_and_export_under(umask, folder):
    os.umask(umask)
    checkpoint = save_random(folder, "-p zero2")
    export(checkpoint, folder / "final")
    return checkpoint


def test_leftovers_of_killed_runs_are_removed(tmp_path):
    """Remove interrupted saves, exports and merges, and partly removed checkpoints; nothing else."""
    leftovers = (".epoch0-step2.incomplete", ".epoch0-step1.old", ".final.incomplete", ".final.old", ".merged-x1y2")
    for name in (*leftovers, "epoch0-step2", "final", ".config"):
        (tmp_path / name / "model").mkdir(parents=True)
    claim_save_dir(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".config", ".lock", "epoch0-step2", "final"]


class TestSharedFolder:
    def test_one_for_all(self, tmp_path):
        assert run_ranks(2, objection_to_folders, [tmp_path, tmp_path]) == [None, None]
        assert list(tmp_path.iterdir()) == []

    def test_one_per_machine(self, tmp_path):
        """Use folders in which an earlier run has left files."""
        folders = [tmp_path / "0", tmp_path / "1"]
        for folder in folders:
            make_checkpoint(folder / "epoch0-step1")
            (folder / ".lock").touch()
        for folder, message in zip(folders, run_ranks(2, objection_to_folders, folders), strict=True):
            assert re.match(rf"--save_dir: rank 1 on \S+ does not see what rank 0 on \S+ writes in {folder};", message)

    def test_ranks_that_find_different_checkpoints(self, tmp_path):
        (message,) = set(run_ranks(2, objection_to_findings, tmp_path))
        assert re.match(
            r"--load: the checkpoint is epoch0-step1 on rank 0 \(\S+\) and None on rank 1 \(\S+\);", message
        )

    def test_ranks_that_would_exchange_gradients_at_other_times(self, tmp_path):
        """GPUs of different sizes may settle --exchange auto differently, and the ranks would wait for ever."""
        (message,) = set(run_ranks(2, objection_to_exchanges, tmp_path))
        assert re.match(r"--exchange auto .* is step on rank 0 \(\S+\) and micro_batch on rank 1 \(\S+\);", message)


def objection_to_folders(folders):
    checkpointing.folder.SHARED_SECONDS = 0.5
    try:
        check_shared(folders[dist.get_rank()])
    except InputError as error:
        return str(error)


def objection_to_findings(folder):
    checkpoint = None if dist.get_rank() else Path("epoch0-step1")
    with pytest.raises(InputError) as caught:
        check_agreement(folder, TrainState(), checkpoint, "step")
    return str(caught.value)


def objection_to_exchanges(folder):
    with pytest.raises(InputError) as caught:
        check_agreement(folder, TrainState(), None, "micro_batch" if dist.get_rank() else "step")
    return str(caught.value)


V1 = {
    "limit_in_bytes": "4000",
    "usage_in_bytes": "3000",
    "stat": "inactive_file 9\ntotal_inactive_file 500\ntotal_active_file 100",
}
V2 = {"max": "4000", "current": "3000", "stat": "anon 7\ninactive_file 500\nactive_file 100"}


@pytest.mark.parametrize(
    ("line", "folder", "files"),
    [
        ("0::/", "", V2),  # in a container
        ("0::/job/step/task", "job/step", V2),
        ("4:cpu,memory:/job/step", "memory/job", V1),
        ("4:memory:/not/mounted/here", "memory", V1),
    ],
)
def test_memory_that_a_control_group_limits(tmp_path, line, folder, files):
    (tmp_path / "cgroup").write_text(f"9:cpuset:/\n{line}\n")
    (tmp_path / "mount" / "memory" / "job" / "step").mkdir(parents=True)
    (tmp_path / "mount" / folder).mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (tmp_path / "mount" / folder / f"memory.{name}").write_text(content)
    assert host_memory(tmp_path / "cgroup", tmp_path / "mount") == (4000, 1600)
    (tmp_path / "mount" / folder / f"memory.{next(iter(files))}").write_text("max")
    assert host_memory(tmp_path / "cgroup", tmp_path / "mount")[0] > 2**30


def test_folder_of_a_running_run(tmp_path):
    """Name the process that has claimed the folder; its end frees the folder."""
    ours, theirs = multiprocessing.Pipe()

    def other_run():
        claim_save_dir(tmp_path)
        theirs.send("claimed")
        theirs.recv()

    process = multiprocessing.get_context("fork").Process(target=other_run)
    process.start()
    assert ours.recv() == "claimed"
    owner = rf"another run \(process {process.pid} on {re.escape(socket.gethostname())}\)"
    for _ in range(2):
        with pytest.raises(InputError, match=owner):
            claim_save_dir(tmp_path)
    ours.send("end")
    process.join()
    claim_save_dir(tmp_path)
    assert (tmp_path / ".lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}"


def test_pinned_buffers_are_counted_as_torch_allocates_them():
    """Check 13B: 12 bytes per parameter; a pinned buffer of 5120 x 13824 x 4 bytes takes 2**29, as in torch."""
    shapes = [spec.shape for spec in parameter_specs(load_config("13b"))]
    assert sum(staging_bytes(shape, pinned=False) for shape in shapes) == 12 * 13_015_864_320
    assert staging_bytes(torch.Size([5120, 13824]), pinned=True) == 3 * 2**29
    assert staging_bytes(torch.Size([4096, 4096]), pinned=True) == 3 * 2**26
    assert sum(staging_bytes(shape, pinned=True) for shape in shapes) / 1e9 == pytest.approx(264, rel=0.01)
