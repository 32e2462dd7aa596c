"""Checkpoint folders: recognized as complete, found, and removed."""

import json
from pathlib import Path

import pytest
from peft import LoraConfig

from checkpointing import writer
from checkpointing.folder import damaged_files, file_names, find_checkpoint, is_complete, required_files
from checkpointing.writer import Retention, remove_old_checkpoints
from checkpoints import make_checkpoint, write_manifest
from corpora import error_of
from model_utils import load_config, trained_specs
from runtime.console import InputError


class TestIsComplete:
    """The check that `latest`, `-f`, retention, generate.py and export_hf.py share."""

    def test_complete(self, tmp_path):
        assert is_complete(make_checkpoint(tmp_path))

    @pytest.mark.parametrize(
        "name",
        [
            "model/config.json",
            "model/model.safetensors.index.json",
            "model/model-00003-of-00007.safetensors",
            "optimizer/optimizer-00007-of-00007.safetensors",
            "lr_scheduler",
            "running_states.json",
            "manifest.json",
        ],
    )
    def test_missing_unlisted_and_truncated_files(self, tmp_path, name):
        path = make_checkpoint(tmp_path) / name
        path.write_text(path.read_text()[:-1])
        assert not is_complete(tmp_path)
        path.unlink()
        assert not is_complete(tmp_path)
        if name != "manifest.json":
            (make_checkpoint(tmp_path) / name).unlink()
            write_manifest(tmp_path, required_files(load_config("test")) - {name})
            assert not is_complete(tmp_path)
            assert damaged_files(tmp_path) == ["manifest.json"]

    @pytest.mark.parametrize(
        "manifest",
        ["", "[]", "{}", "null", '{"files": {}}', '{"files": [1]}', '{"files": {"lr_scheduler": "7"}}', '{"format": 1'],
    )
    def test_invalid_manifest(self, tmp_path, manifest):
        (make_checkpoint(tmp_path) / "manifest.json").write_text(manifest)
        assert not is_complete(tmp_path)
        assert damaged_files(tmp_path) == ["manifest.json"]

    @pytest.mark.parametrize("name", ["optimizer/optimizer-00008-of-00007", "../notes", "model/../../notes"])
    def test_manifest_with_a_file_that_no_checkpoint_has(self, tmp_path, name):
        folder = make_checkpoint(tmp_path / "epoch0-step1")
        (folder / name).write_text("there")
        write_manifest(folder, {*required_files(load_config("test")), name})
        assert not is_complete(folder)

    @pytest.mark.parametrize("layers", [3, 5, 10**15, "4", None])
    def test_config_of_another_number_of_layers(self, tmp_path, layers):
        """Use a manifest of 4 layers that lists the changed file correctly."""
        path = make_checkpoint(tmp_path) / "model" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": layers}))
        write_manifest(tmp_path, required_files(load_config("test")))
        assert not is_complete(tmp_path)

    def test_no_folder(self, tmp_path):
        assert not is_complete(tmp_path / "none")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("adapters", [None, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])])
def test_files_are_those_of_all_trained_parameters(tied, adapters):
    config = load_config("test")
    config.tie_word_embeddings = tied
    groups = list(dict.fromkeys(spec.group for spec in trained_specs(config, adapters)))
    files = file_names(config, "optimizer", adapters is not None)
    assert list(files) == groups
    assert files[groups[-1]] == f"optimizer-{len(groups):05d}-of-{len(groups):05d}.safetensors"


class TestFindCheckpoint:
    def test_latest_has_the_highest_step_as_a_number(self, tmp_path):
        for name in ("epoch0-step9", "epoch0-step10", "epoch1-step100", "epoch2-step99"):
            make_checkpoint(tmp_path / name)
        assert find_checkpoint("latest", tmp_path).name == "epoch1-step100"

    def test_latest_is_complete_and_visible(self, tmp_path):
        make_checkpoint(tmp_path / "epoch0-step5")
        (make_checkpoint(tmp_path / "epoch0-step6") / "lr_scheduler").unlink()
        for name in (".epoch0-step7.incomplete", "epoch0-step8-copy", "final"):
            make_checkpoint(tmp_path / name)
        assert find_checkpoint("latest", tmp_path).name == "epoch0-step5"

    def test_a_path(self, tmp_path):
        assert find_checkpoint(str(make_checkpoint(tmp_path / "any name")), tmp_path) == tmp_path / "any name"

    @pytest.mark.parametrize(
        ("files", "message"),
        [
            (["config.json"], "holds a Hugging Face model without training state; .* --init_from .* --config"),
            (["manifest.json"], "is an incomplete checkpoint; choose another, or 'latest'"),
            (["running_states.json"], "is an incomplete checkpoint; choose another, or 'latest'"),
            (["notes.txt"], "is not a checkpoint; give a folder epochE-stepS, or 'latest'"),
            ([], "is not a checkpoint; give a folder epochE-stepS, or 'latest'"),
        ],
    )
    def test_other_folders(self, tmp_path, files, message):
        for name in files:
            (tmp_path / name).touch()
        with pytest.raises(InputError, match=f"--load: {tmp_path} {message}"):
            find_checkpoint(str(tmp_path), tmp_path)

    def test_file_and_nothing(self, tmp_path):
        (tmp_path / "file").touch()
        assert "is not a checkpoint" in error_of(find_checkpoint, str(tmp_path / "file"), tmp_path)
        assert "does not exist" in error_of(find_checkpoint, str(tmp_path / "none"), tmp_path)


@pytest.mark.parametrize("damage", [Path.unlink, lambda manifest: manifest.write_text('{"format": 1, "files": {}}')])
def test_removal_keeps_the_last_complete_checkpoint(tmp_path, damage):
    for step in (1, 2, 3):
        make_checkpoint(tmp_path / f"epoch0-step{step}")
    damage(tmp_path / "epoch0-step3" / "manifest.json")
    remove_old_checkpoints(tmp_path, Retention(keep_checkpoints=1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch0-step2", "epoch0-step3"]
    assert is_complete(tmp_path / "epoch0-step2")


def test_interrupted_removal_leaves_nothing_under_a_checkpoints_name(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        make_checkpoint(tmp_path / f"epoch0-step{step}")
    monkeypatch.setattr(writer.shutil, "rmtree", lambda *arguments, **options: None)
    remove_old_checkpoints(tmp_path, Retention(keep_checkpoints=1, keep_every=2))
    visible = sorted(path.name for path in tmp_path.iterdir() if path.name[0] != ".")
    assert visible == ["epoch0-step2", "epoch0-step3"]
