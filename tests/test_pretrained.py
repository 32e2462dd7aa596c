"""Model folders as Hugging Face writes them, and hub names: found, checked, and read by every plugin in slices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from corpora import error_of
from hub_server import Branches, HubServer
from launching import ROOT
from processes import boosted, run_ranks
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from model_utils import load_config
from pretrained import check_pretrained, find_model, generation_config, load_pretrained, pretrained_weights
from sharded_state import MASTER, local_shards


def check(folder, config=None):
    return check_pretrained(folder, config or load_config(str(folder)), "--model_path")


def weights_of(folder):
    return pretrained_weights(folder, "--model_path")


def save_model(folder: Path, changes: dict | None = None, **how) -> dict[str, torch.Tensor]:
    """Writes a model with random weights, with what is changed against `test`, and returns its weights."""
    model = LlamaForCausalLM(LlamaConfig(**{**load_config("test").to_dict(), **(changes or {})}))
    model.save_pretrained(folder, **how)
    return dict(model.named_parameters())


def loaded(folder, flags):
    """This rank's master weights, by name: full where the rank has all of a parameter, else its range of it."""
    changes = {key: value for key, value in json.loads((folder / "config.json").read_text()).items() if key != "dtype"}
    changes.pop("torch_dtype")
    run = boosted(flags + " -b 2", **changes)
    load_pretrained(check(folder, run.config), run.plugin, run.model, run.optimizer)
    return [
        (shard.spec.name, shard.start, shard.stop, shard.split_dim, shard.tp_rank, shard.tensor(MASTER).clone())
        for shard in local_shards(run.plugin, run.model, run.optimizer)
    ]


FORMATS = {
    "one .safetensors": dict(),
    "several .safetensors": dict(max_shard_size="300KB"),
    "one .bin": dict(safe_serialization=False),
    "several .bin": dict(safe_serialization=False, max_shard_size="300KB"),
}
SCALED = {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}}
SCALED["rope_scaling"]["original_max_position_embeddings"] = 64
MODELS = {
    "grouped queries": {},
    "all heads": {"num_key_value_heads": 4},
    "tied embeddings": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "scaled positions": SCALED,
}


class TestGenerationConfig:
    @pytest.mark.parametrize(
        ("saved", "ends"), [({}, [2]), ({"eos_token_id": 2}, 2), ({"eos_token_id": [7, 9]}, [7, 9, 2])]
    )
    def test_ends_at_the_tokens_that_it_names_and_the_tokenizers(self, tmp_path, sample_tokenizer, saved, ends):
        (tmp_path / "generation_config.json").write_text(json.dumps({"top_p": 0.9, **saved}))
        content = generation_config(tmp_path, sample_tokenizer, "--model_path")
        assert content == {"generation_config.json": {"top_p": 0.9, "eos_token_id": ends}}

    def test_none_and_damaged(self, tmp_path, sample_tokenizer):
        assert generation_config(tmp_path, sample_tokenizer, "--model_path") == {}
        (tmp_path / "generation_config.json").write_text("{")
        assert "generation_config.json cannot be read" in error_of(
            generation_config, tmp_path, sample_tokenizer, "--model_path"
        )


class TestLoading:
    @pytest.mark.parametrize("how", FORMATS.values(), ids=FORMATS)
    def test_every_format(self, tmp_path, how):
        expected = save_model(tmp_path, **how)
        files = [*tmp_path.glob("*.safetensors"), *tmp_path.glob("*.bin")]
        assert (len(files) > 1) == ("max_shard_size" in how)
        weights = check(tmp_path)
        for name, value in expected.items():
            assert torch.equal(weights[name][:], value)

    def test_format_before_torch_1_6(self, tmp_path):
        expected = save_model(tmp_path, safe_serialization=False)
        state = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
        torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
        assert torch.equal(check(tmp_path)["lm_head.weight"][3:5], expected["lm_head.weight"][3:5])

    @pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
    def test_every_kind_of_model_computes_the_same(self, tmp_path, changes):
        save_model(tmp_path, changes)
        logits = run_ranks(1, logits_of, tmp_path, changes)[0]
        with torch.no_grad():
            expected = AutoModelForCausalLM.from_pretrained(tmp_path)(torch.arange(128)[None]).logits
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(
        ("ranks", "flags"), [(2, "-p zero2"), (2, "-p gemini"), (4, "-p hybrid_parallel --tp 2 --pp 2")]
    )
    @pytest.mark.parametrize("how", [FORMATS["several .safetensors"], FORMATS["several .bin"]], ids=["safe", "bin"])
    def test_each_rank_gets_its_own_part(self, tmp_path, ranks, flags, how):
        expected = save_model(tmp_path, **how)
        seen = set()
        for part in run_ranks(ranks, loaded, tmp_path, flags):
            for name, start, stop, split_dim, tp_rank, value in part:
                full = expected[name] if split_dim is None else expected[name].chunk(2, split_dim)[tp_rank]
                assert torch.equal(value, full.flatten()[start:stop])
                seen.add(name)
        assert seen == expected.keys()

    def test_old_rotary_buffers_are_passed_over(self, tmp_path):
        save_model(tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        check(tmp_path)


def logits_of(folder, changes):
    run = boosted("-p zero2 -x fp32", **changes)
    load_pretrained(check(folder, run.config), run.plugin, run.model, run.optimizer)
    with torch.no_grad():
        return run.model(input_ids=torch.arange(128)[None]).logits


class TestRefused:
    @pytest.fixture
    def single(self, tmp_path):
        """A model folder as Hugging Face writes a small one: a single file and no index."""
        save_model(tmp_path)
        return tmp_path

    def test_no_weights(self, single):
        (single / "model.safetensors").unlink()
        assert f"--model_path: {single} holds no weights: none of model.safetensors" in error_of(check, single)
        (single / "config.json").unlink()
        assert "has no config.json" in error_of(check, single, load_config("test"))

    @pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
    def test_damaged_file(self, single, name):
        content = (single / "model.safetensors").read_bytes()[:1000]
        (single / "model.safetensors").unlink()
        (single / name).write_bytes(content)
        assert f"--model_path: the weights in {single} cannot be read" in error_of(weights_of, single)

    def test_bin_file_that_would_run_code(self, single):
        (single / "model.safetensors").unlink()
        torch.save({"lm_head.weight": subprocess.Popen}, single / "pytorch_model.bin")
        assert "cannot be read" in error_of(weights_of, single)

    @pytest.mark.parametrize("index", ["{", "{}", "[]", '{"weight_map": 1}', '{"weight_map": {"x": 1}}'])
    def test_damaged_index(self, tmp_path, index):
        (tmp_path / "model.safetensors.index.json").write_text(index)
        assert "cannot be read" in error_of(weights_of, tmp_path)

    def test_file_that_the_index_names_is_missing(self, tmp_path):
        index = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors", "c": "3.safetensors"}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        save_file({"b": torch.zeros(1)}, tmp_path / "2.safetensors")
        assert "lacks 1.safetensors, 3.safetensors, which its index names" in error_of(weights_of, tmp_path)

    def test_other_weights_than_the_configuration_describes(self, single):
        assert "is of another model than this run's" in error_of(check, single, load_config("tiny"))
        weights = load_file(single / "model.safetensors")

        def refused(changed):
            save_file(changed, single / "model.safetensors")
            return error_of(check, single)

        fewer = {name: weight for name, weight in weights.items() if "norm.weight" not in name or "layers" in name}
        assert refused(fewer) == f"--model_path: the weights in {single} lack model.norm.weight (1 missing)"
        more = {**weights, "model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}
        assert "q_proj.bias, which its config.json does not describe (1 such)" in refused(more)
        longer = {**weights, "lm_head.weight": torch.zeros(1032, 64)}
        assert "lm_head.weight" in refused(longer)
        assert "shape [1032, 64], and its config.json makes it [1024, 64]" in refused(longer)

    @pytest.mark.parametrize("name", ["/none/model", "./none", "~/none", "a/b/c", "no model"])
    def test_what_can_be_no_hub_name(self, name):
        message = error_of(find_model, name, "--model_path")
        assert message == f"--model_path: {name} does not exist; give a model folder or a hub name"

    def test_a_file(self, single):
        assert "is a file; give the folder" in error_of(find_model, str(single / "config.json"), "--model_path")


FIND = """
import sys
sys.path.insert(0, {root!r})
import pretrained
try:
    print(pretrained.find_model("{name}", "--model_path"))
except pretrained.InputError as error:
    print(error)
"""


def find_in_processes(count: int, name: str, environment: dict[str, str]) -> list[str]:
    """What `find_model` gives or raises in each of some processes at the same time."""
    command = [sys.executable, "-c", FIND.format(root=str(ROOT), name=name)]
    processes = [
        subprocess.Popen(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True)
        for _ in range(count)
    ]
    return [process.communicate(timeout=240)[0].splitlines()[-1] for process in processes]


def test_hub_name_is_downloaded_once_for_all_ranks_of_a_node(tmp_path):
    folder = tmp_path / "hub"
    expected = save_model(folder, max_shard_size="300KB")
    save_model(tmp_path / "old", safe_serialization=False)
    (tmp_path / "old" / "pytorch_model.bin").rename(folder / "pytorch_model.bin")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    branches = Branches({"main": files, "v1": {**files, "README.md": b"the first"}})
    with HubServer({"someone/small-llama": branches}) as hub:
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
        found = find_in_processes(2, "someone/small-llama", environment)
        assert len(set(found)) == 1
        assert all(len(hub.downloads(f"/{name}")) == (name != "pytorch_model.bin") for name in files)
        assert torch.equal(check(Path(found[0]))["lm_head.weight"][:], expected["lm_head.weight"])
        pinned = find_in_processes(1, "someone/small-llama@v1", environment)
        assert [Path(folder).name for folder in (*found[:1], *pinned)] == [
            branches.commit(name) for name in ("main", "v1")
        ]
        (line,) = find_in_processes(1, "someone/other", environment)
        assert line == "--model_path: someone/other is no folder, and the hub refuses it (HTTP 401)"
    for name, there in (("someone/small-llama", found), (f"someone/small-llama@{branches.commit('v1')}", pinned)):
        assert find_in_processes(1, name, environment) == there[:1]  # with no hub to be reached
    (line,) = find_in_processes(1, "someone/other", environment)
    assert "someone/other is no folder, and it cannot be downloaded" in line
