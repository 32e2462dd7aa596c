"""Security: files of others never run as code, host names never become commands, secrets are not sent."""

import json
import pickle
import shutil
import sys

import pytest
import torch

from corpus.tokenizer import load_tokenizer
from runtime.console import InputError
from scripts import generate
from scripts.launcher.hosts import Host, forwarded


class Code:
    """An object that creates a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


class TestFoldersOfOthers:
    @pytest.fixture
    def marker(self, tmp_path):
        marker = tmp_path / "executed"
        yield marker
        assert not marker.exists()

    @pytest.fixture
    def folder(self, finished_run, marker, tmp_path):
        """Return a model folder whose configuration and tokenizer refer to code beside them."""
        folder = shutil.copytree(finished_run.save_dir / "final", tmp_path / "model")
        (folder / "code.py").write_text(f"open({str(marker)!r}, 'w')\n")
        for name, entries in (
            ("config.json", {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}),
            ("tokenizer_config.json", {"AutoTokenizer": ["code.Tokenizer", None]}),
        ):
            content = json.loads((folder / name).read_text())
            (folder / name).write_text(json.dumps({**content, "auto_map": entries}))
        return folder

    def write(self, monkeypatch, folder):
        monkeypatch.setattr(sys, "argv", ["generate.py", "--model", str(folder), "--max_new_tokens", "1"])
        return generate.main()

    def test_code_beside_a_model_is_not_run(self, monkeypatch, folder):
        assert self.write(monkeypatch, folder) == 0

    def test_a_tokenizer_that_exists_only_as_code(self, folder):
        content = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**content, "tokenizer_class": "Unheard"}))
        with pytest.raises(InputError, match=r"--tokenizer: cannot load"):
            load_tokenizer(str(folder))

    @pytest.mark.parametrize("zipped", [True, False])
    def test_a_pickle_that_is_not_weights_is_refused(self, monkeypatch, folder, marker, zipped):
        for path in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
            path.unlink()
        if zipped:
            torch.save({"lm_head.weight": Code(marker)}, folder / "pytorch_model.bin")
        else:
            (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"lm_head.weight": Code(marker)}))
        with pytest.raises(InputError, match=r"--model: the weights in .* cannot be read"):
            self.write(monkeypatch, folder)


class TestHosts:
    def test_names_cannot_be_options_of_ssh(self):
        assert Host("-oProxyCommand=touch executed").problem("/") == "is not the name of a host"

    def test_names_and_folders_cannot_be_commands(self, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "ssh").write_text('#!/bin/sh\nfor last; do :; done\nexec sh -c "$last"\n')  # as sshd runs a command
        (tmp_path / "ssh").chmod(0o755)
        monkeypatch.setenv("LAUNCH_SSH", str(tmp_path / "ssh"))
        folder = "/a'; touch executed; echo '$(touch executed)`touch executed`"
        for name in ("localhost", "other.invalid", "a;touch executed", "$(touch executed)"):
            assert "has no folder" in Host(name).problem(folder)
        assert not (tmp_path / "executed").exists()

    def test_secrets_are_sent_only_on_request(self):
        plain = {"PATH": "/bin", "HF_HOME": "/hub", "TOKENIZERS_PARALLELISM": "false", "NCCL_DEBUG": "INFO"}
        secret = {"HF_TOKEN": "1", "AWS_SECRET_ACCESS_KEY": "2", "TORCH_API_KEY": "3", "PYTHON_KEYRING_PASSWORD": "4"}
        assert forwarded(plain | secret | {"EDITOR": "vi"}, []) == plain
        assert forwarded(plain | secret, ["HF_TOKEN"]) == plain | {"HF_TOKEN": "1"}
