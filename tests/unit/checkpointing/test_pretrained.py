"""Hugging Face model folders and hub names: found, checked, and read in slices by every plugin."""

import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel

from checkpointing.pretrained import (
    check_pretrained,
    find_model,
    generation_config,
    load_pretrained,
    pretrained_weights,
    refuse_other_formats,
)
from corpora import error_of, run_python
from corpus.tokenizer import load_tokenizer
from engine.shards import MASTER, local_shards
from hub_server import Branches, HubServer
from launching import ROOT
from model_utils import load_config
from processes import boosted, run_ranks
from runtime.console import InputError


def check(folder, config=None):
    return check_pretrained(folder, config or load_config(str(folder)), "--model_path")


def weights_of(folder):
    return pretrained_weights(folder, "--model_path")


def save_model(folder: Path, changes: dict | None = None, **how) -> dict[str, torch.Tensor]:
    """Write a model like `test`, with these changes and random weights, and return its weights."""
    model = LlamaForCausalLM(LlamaConfig(**{**load_config("test").to_dict(), **(changes or {})}))
    model.save_pretrained(folder, **how)
    return dict(model.named_parameters())


def loaded(folder, flags):
    """Return this rank's range of each master weight, flat, with name, bounds, split dimension and tensor rank."""
    changes = {key: value for key, value in json.loads((folder / "config.json").read_text()).items() if key != "dtype"}
    changes.pop("torch_dtype")
    engine = boosted(flags + " -b 2", **changes)
    load_pretrained(check(folder, engine.config), engine)
    return [
        (shard.spec.name, shard.start, shard.stop, shard.split_dim, shard.tp_rank, shard.tensor(MASTER).clone())
        for shard in local_shards(engine)
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
    def test_ends_at_its_own_tokens_and_the_tokenizers(self, tmp_path, sample_tokenizer, saved, ends):
        (tmp_path / "generation_config.json").write_text(json.dumps({"top_p": 0.9, **saved}))
        content = generation_config(tmp_path, sample_tokenizer, "--model_path")
        assert content == {"generation_config.json": {"top_p": 0.9, "eos_token_id": ends}}

    def test_none_and_damaged(self, tmp_path, sample_tokenizer):
        assert generation_config(tmp_path, sample_tokenizer, "--model_path") == {}
        (tmp_path / "generation_config.json").write_text("{")
        assert "generation_config.json cannot be read" in error_of(
            generation_config, tmp_path, sample_tokenizer, "--model_path"
        )
        for ends in ("</s>", [2, "</s>"], True):
            (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
            assert error_of(generation_config, tmp_path, sample_tokenizer, "--model_path") == (
                f"--model_path: {tmp_path}/generation_config.json: eos_token_id must be a token id or a list of them; "
                "correct or remove it"
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

    @pytest.mark.slow
    @pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
    def test_every_kind_of_model_computes_the_same(self, tmp_path, changes):
        save_model(tmp_path, changes)
        logits = run_ranks(1, logits_of, tmp_path, changes)[0]
        with torch.no_grad():
            expected = AutoModelForCausalLM.from_pretrained(tmp_path)(torch.arange(128)[None]).logits
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.slow
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

    @pytest.mark.parametrize("how", [FORMATS["several .safetensors"], FORMATS["several .bin"]], ids=["safe", "bin"])
    def test_single_file_beside_the_index_of_an_older_model(self, tmp_path, how):
        """Write the files left when a model in several files is loaded, changed, and saved over itself."""
        save_model(tmp_path, **how)
        expected = save_model(tmp_path / "new")
        (tmp_path / "new" / "model.safetensors").rename(tmp_path / "model.safetensors")
        weights, theirs = check(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
        for name, value in theirs.named_parameters():
            assert torch.equal(value, expected[name])
            assert torch.equal(weights[name][:], value)

    def test_model_without_its_head(self, tmp_path):
        """Load a LlamaModel, saved with names without `model.`; with tied embeddings it is a whole model."""
        changes = load_config("test").to_dict()
        expected = LlamaModel(LlamaConfig(**{**changes, "tie_word_embeddings": True}))
        expected.save_pretrained(tmp_path)
        weights = check(tmp_path)
        assert all(torch.equal(weights[f"model.{name}"][:], value) for name, value in expected.named_parameters())
        (tmp_path / "config.json").write_text(json.dumps(changes))
        assert "lack lm_head.weight (1 missing); set tie_word_embeddings" in error_of(check, tmp_path)

    @pytest.mark.slow
    @pytest.mark.parametrize("flags", ["-p zero2", "-p gemini"])
    def test_infinity_on_one_rank_ends_all(self, tmp_path, flags):
        """Damage the last row, which the first rank does not read."""
        save_model(tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        weights["model.layers.2.mlp.up_proj.weight"][-1, -1] = float("inf")
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        first, second = run_ranks(2, error_of, loaded, tmp_path, flags)
        assert first == second
        assert "--model_path: model.layers.2.mlp.up_proj.weight in " in first
        assert "has a NaN or an infinity" in first

    def test_old_rotary_buffers_are_ignored(self, tmp_path):
        save_model(tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        check(tmp_path)


def logits_of(folder, changes):
    engine = boosted("-p zero2 -x fp32", **changes)
    load_pretrained(check(folder, engine.config), engine)
    with torch.no_grad():
        return engine.model(input_ids=torch.arange(128)[None]).logits


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

    @pytest.mark.slow
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
        assert "holds another model than this run's" in error_of(check, single, load_config("tiny"))
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
        assert "shape [1032, 64], but its config.json gives [1024, 64]" in refused(longer)

    def test_names_that_leave_the_folder(self, tmp_path):
        save_file({"a": torch.zeros(1)}, tmp_path / "1.safetensors")
        folder = tmp_path / "model"
        folder.mkdir()
        for name in ("../1.safetensors", str(tmp_path / "1.safetensors"), "..", ""):
            (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
            assert f"names {name!r}, which is not a file in its folder" in error_of(weights_of, folder)

    def test_index_of_other_files(self, tmp_path):
        index = tmp_path / "model.safetensors.index.json"
        save_model(tmp_path, max_shard_size="300KB")
        content = json.loads(index.read_text())
        first = min(content["weight_map"].values())
        for weight_map, expected in (
            ({**content["weight_map"], "lm_head.bias": first}, "lm_head.bias is not where it says (1 such)"),
            (
                {name: file for name, file in content["weight_map"].items() if name != "model.norm.weight"},
                "model.norm.weight is not where it says (1 such)",
            ),
            ({}, "names no weights"),
        ):
            index.write_text(json.dumps({**content, "weight_map": weight_map}))
            assert expected in error_of(weights_of, tmp_path)
        index.write_text(json.dumps(content))
        weights = load_file(tmp_path / first)
        other = next(file for file in content["weight_map"].values() if file != first)
        name = min(weights)
        save_file({**load_file(tmp_path / other), name: weights[name]}, tmp_path / other)
        assert f"both hold {name}; save the model again" in error_of(weights_of, tmp_path)

    @pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2])
    @pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
    def test_quantised_weights(self, single, dtype, file):
        name = "model.layers.1.mlp.up_proj.weight"
        weights = load_file(single / "model.safetensors")
        weights[name] = weights[name].to(dtype)
        (single / "model.safetensors").unlink()
        (torch.save if file.endswith(".bin") else save_file)(weights, single / file)
        message = error_of(check, single)
        assert message.startswith(f"--model_path: {name} in {single / file} is stored as ")
        assert "quantised" in message
        assert "dequantize it with transformers" in message

    @pytest.mark.parametrize(
        ("files", "expected"),
        [
            ("adapter_config.json", "holds an adapter for the model that it was trained on; merge them"),
            ("model-Q4_K_M.gguf", "model-Q4_K_M.gguf, GGUF weights; load it with transformers, "),
            (
                "consolidated.00.pth consolidated.01.pth params.json",
                "consolidated.00.pth, Meta's own format; convert it",
            ),
            (
                "consolidated.safetensors params.json",
                "Meta's own format; convert it with `python -m transf",
            ),
            (
                "tf_model.h5",
                "TensorFlow weights; load it with transformers, AutoModelForCausalLM.",
            ),
            ("flax_model.msgpack", "from_flax=True"),
            ("model.onnx", "an inference graph"),
            ("model.fp16.safetensors", "a variant of the weights; load it with transformers, "),
            ("model-00001-of-00002.safetensors", "weights without their index, model.safetensors.index.json; download"),
            ("pytorch_model-00002-of-00002.bin", "weights without their index, pytorch_model.bin.index.json"),
            ("zero_to_fp32.py latest", "a DeepSpeed checkpoint; run that file"),
        ],
    )
    def test_other_formats(self, single, files, expected):
        (single / "model.safetensors").unlink()
        for name in files.split():
            (single / name).touch()
        message = error_of(check, single)
        assert message.startswith(f"--model_path: {single} holds ")
        assert expected in message
        (single / "config.json").unlink()
        assert expected in error_of(refuse_other_formats, single, "--model_path")

    def test_adapter_beside_weights_names_a_command_that_merges_it(self, single):
        """Refuse the folder, because transformers loads the model that it names, not the weights in it."""
        base = single / "base"
        save_model(base)
        get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig(r=2)).save_pretrained(single)
        message = error_of(check, single)
        assert f"{single} holds an adapter for {base}; merge them and give the folder MERGED" in message
        merge = message.partition(' python -c "')[2].removesuffix('"')
        exec(merge.replace("'MERGED'", repr(str(single / "merged"))), {})
        check(single / "merged")

    @pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "config.json"])
    def test_pointers_of_git_lfs(self, single, name):
        config = load_config(str(single))
        (single / "model.safetensors").unlink()
        (single / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
        message = error_of(check, single, config)
        assert message == (
            f"--model_path: {single / name} is a Git LFS pointer, not the file itself; run `git lfs pull` in {single}"
        )

    @pytest.mark.parametrize(
        ("metadata", "expected"), [({"format": "flax"}, "the format 'flax', not 'pt'"), ({"by": "me"}, "format None")]
    )
    def test_safetensors_of_another_framework(self, single, metadata, expected):
        save_file(load_file(single / "model.safetensors"), single / "model.safetensors", metadata=metadata)
        assert expected in error_of(check, single)

    @pytest.mark.parametrize("content", [[1], {"model": {}}, {"a": torch.ones(2).to_sparse()}, {"a": 1}])
    def test_bin_file_without_a_state_dict(self, single, content):
        (single / "model.safetensors").unlink()
        torch.save(content, single / "pytorch_model.bin")
        assert f"--model_path: the weights in {single} cannot be read: " in error_of(check, single)

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("https://huggingface.co/a/b", "is a URL; give the hub name a/b"),
            ("https://huggingface.co/a/b/tree/v1", "is a URL; give the hub name a/b@v1"),
            ("huggingface.co/a/b/", "is a URL; give the hub name a/b"),
            ("s3://a/b", "is a URL; give a model folder, or a hub name OWNER/NAME"),
            ("a/b/", "is no folder; for the hub's, give a/b without a slash at its end"),
            ("a/b@", "names no revision behind @"),
        ],
    )
    def test_almost_a_hub_name(self, name, expected):
        assert error_of(find_model, name, "--model_path").startswith(f"--model_path: {name} {expected}")
        assert error_of(load_tokenizer, name).startswith(f"--tokenizer: {name} is ".removesuffix("is "))

    @pytest.mark.parametrize("name", ["/none/model", "./none", "~/none", "a/b/c", "no model"])
    def test_impossible_hub_name(self, name):
        message = error_of(find_model, name, "--model_path")
        assert message == f"--model_path: {name} does not exist; give a model folder or a hub name"

    def test_a_file(self, single):
        assert "is a file; give the folder" in error_of(find_model, str(single / "config.json"), "--model_path")


# ------------------------------------------------------------------------- any folder, as transformers would read it

SMALL = dict(vocab_size=32, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2)
FLOATS = (torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)
HARMLESS = ("none", "none", "buffers", "base")  # the model stays the same, at least if its embeddings are tied
DAMAGES = ("missing", "renamed", "unknown", "unindexed", "other file", "twice", "int8", "float8", "shape", "no shard")
DAMAGES += ("other format", "tensorflow", "no metadata", "not plain", "no weights")


def write_weights(folder: Path, tensors: dict, how: str, variant: str, damage: str, draw: random.Random) -> None:
    """Write tensors in one of FORMATS, by hand, with the damage in the files or the index."""
    safe, several = how.endswith(".safetensors"), how.startswith("several")
    stem, ending = ("model", "safetensors") if safe else ("pytorch_model", "bin")
    metadata = {"other format": {"made": "elsewhere"}, "tensorflow": {"format": "tf"}, "no metadata": None}
    names = [name for name in tensors if draw.random() < 0.5] if several else []
    parts = [names, [name for name in tensors if name not in names]] if several else [list(tensors)]
    files = [f"{stem}{variant}-{n:05d}-of-00002.{ending}" for n in (1, 2)] if several else [f"{stem}{variant}.{ending}"]
    if damage == "twice":
        parts[0] = [*parts[0], *parts[-1][:1]] if several else parts[0]
    for file, part in zip(files, parts, strict=True):
        content = {name: tensors[name].clone() for name in part}
        if damage == "twice" and file == files[0] and several:
            content = {name: tensor + (name == parts[-1][0]) for name, tensor in content.items()}
        if safe:
            save_file(content, folder / file, metadata=metadata.get(damage, {"format": "pt"}))
        else:
            torch.save(content, folder / file)
    if several:
        weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        name = draw.choice(list(weight_map))
        if damage == "unindexed":
            del weight_map[name]
        elif damage == "other file":
            weight_map[name] = files[weight_map[name] == files[0]]
        elif damage == "not plain":
            weight_map[name] = f"../{folder.name}/{weight_map[name]}"
        elif damage == "no weights":
            weight_map = {}
        elif damage == "no shard":
            (folder / files[0]).unlink()
        index = f"{stem}.safetensors.index{variant}.json" if safe else f"{stem}.bin.index{variant}.json"
        (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def changed(tensors: dict, damage: str, draw: random.Random) -> dict:
    """Return the tensors with the damage among them."""
    tensors, name = dict(tensors), draw.choice(list(tensors))
    if damage == "buffers":
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    elif damage == "base":
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    elif damage in ("missing", "renamed"):
        moved = tensors.pop(name)
        tensors |= {f"{name}_other": moved} if damage == "renamed" else {}
    elif damage == "unknown":
        tensors["model.layers.0.self_attn.q_proj.weight_scale"] = torch.ones(1)
    elif damage in ("int8", "float8"):
        tensors[name] = (tensors[name] * 9).to(torch.int8 if damage == "int8" else torch.float8_e4m3fn)
    elif damage == "shape":
        tensors[name] = torch.cat([tensors[name], tensors[name]])
    return tensors


def read_by_transformers(folder: Path) -> dict[str, torch.Tensor] | None:
    """Return the weights that transformers loads; None if it refuses, or ignores or initializes any of them."""
    try:
        model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, LookupError, ImportError):
        return None
    state = {name: tensor.detach() for name, tensor in model.named_parameters()}
    return None if any(report.values()) or any(tensor.is_meta for tensor in state.values()) else state


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    tied=st.booleans(),
    writes=st.lists(
        st.tuples(st.sampled_from(list(FORMATS)), st.sampled_from(["", "", "", ".fp16"])), min_size=1, max_size=3
    ),
    damage=st.one_of(st.sampled_from(HARMLESS), st.sampled_from(DAMAGES)),
)
def test_any_folder_gives_the_tensors_of_transformers_or_a_refusal(seed, tied, writes, damage):
    """Compare folders into which several models were saved, one of them damaged, perhaps the one that is read."""
    draw = random.Random(seed)
    config = LlamaConfig(**SMALL, tie_word_embeddings=tied)
    shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    damaged = draw.randrange(len(writes))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config.save_pretrained(folder)
        for number, (how, variant) in enumerate(writes):
            kind = torch.Generator().manual_seed(seed + number)
            tensors = {
                name: torch.randn(shape, generator=kind).to(draw.choice(FLOATS))
                for name, shape in shapes.items()
                if not (tied and name == "lm_head.weight" and draw.random() < 0.7)
            }
            fault = damage if number == damaged else "none"
            write_weights(folder, changed(tensors, fault, draw), how, variant, fault, draw)
        expected = read_by_transformers(folder)
        refusal = None
        try:
            weights = check(folder)
        except InputError as error:
            refusal = str(error)
        if refusal:
            event("refused")
            assert "\n" not in refusal
            assert expected is None or damage not in HARMLESS, refusal
            return
        event("read")
        assert expected is not None
        assert set(weights.files) == set(expected)
        for name, tensor in expected.items():
            assert torch.equal(weights[name][:].float(), tensor), name


FIND = """
import sys
sys.path.insert(0, {root!r})
from checkpointing import pretrained
try:
    print(pretrained.find_model("{name}", "--model_path"))
except pretrained.InputError as error:
    print(error)
"""


def find_in_processes(count: int, name: str, environment: dict[str, str]) -> list[str]:
    """Return the result or error of `find_model` in each of several processes at the same time."""
    command = [sys.executable, "-c", FIND.format(root=str(ROOT), name=name)]
    processes = [
        subprocess.Popen(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True)
        for _ in range(count)
    ]
    return [process.communicate(timeout=240)[0].splitlines()[-1] for process in processes]


@pytest.mark.slow
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
        assert line == "--model_path: someone/other is not a folder, and the hub refuses it (HTTP 401)"
    for name, there in (("someone/small-llama", found), (f"someone/small-llama@{branches.commit('v1')}", pinned)):
        assert find_in_processes(1, name, environment) == there[:1]  # the hub is not reachable now
    (line,) = find_in_processes(1, "someone/other", environment)
    assert "someone/other is not a folder, and it cannot be downloaded" in line


LINES = """
import sys
from checkpointing import pretrained
from corpus import tokenizer
for name in sys.argv[1:]:
    for find in (lambda: pretrained.find_model(name, "--model_path"), lambda: tokenizer.load_tokenizer(name)):
        try:
            print("found", find(), flush=True)
        except pretrained.InputError as error:
            print("found", error, flush=True)
"""


class TestHub:
    def lines(self, hub: HubServer, home: Path, *names: str) -> list[str]:
        """Return results or errors of `find_model` and `load_tokenizer` for each name, in one process."""
        environment = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url}
        process = run_python(LINES, *names, **environment)
        lines = process.communicate(timeout=240)[0].splitlines()
        return [line.removeprefix("found ") for line in lines if line.startswith("found ")]

    @pytest.mark.slow
    def test_only_files_that_transformers_reads_are_downloaded(self, tmp_path):
        cases = {
            "a/safe": (["one .safetensors", "several .safetensors", "one .bin"], ["model.safetensors"]),
            "a/bin": (["one .bin", "several .bin"], ["pytorch_model.bin"]),
        }
        repositories = {}
        for name, (there, _) in cases.items():
            for how in there:
                save_model(tmp_path / name / how, **FORMATS[how])
            files = {path.name: path.read_bytes() for path in (tmp_path / name).rglob("*.*") if path.is_file()}
            others = ("model-consolidated.safetensors", "consolidated.00.pth", "pytorch_model.bin.old")
            repositories[name] = Branches({"main": {**files, **dict.fromkeys(others, b"")}})
        repositories["a/adapter"] = Branches({"main": {"adapter_config.json": b"{}", "adapter_model.safetensors": b""}})
        with HubServer(repositories) as hub:
            lines = [line for line in self.lines(hub, tmp_path / "cache", *repositories) if "--tokenizer" not in line]
        assert lines.pop().endswith("a/adapter on the hub holds an adapter; merge it into its base model and give that")
        for folder, (name, (_, expected)) in zip(lines, cases.items(), strict=True):
            paths = [path for method, path, _ in hub.requests if method == "GET" and f"/{name}/resolve/" in path]
            assert [Path(path).name for path in paths if not path.endswith(".json")] == expected
            check(Path(folder))

    @pytest.mark.slow
    def test_cache_that_cannot_be_written_to(self, tmp_path):
        (tmp_path / "file").touch()
        save_model(tmp_path / "model")
        files = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
        with HubServer({"a/b": Branches({"main": files})}) as hub:
            lines = self.lines(hub, tmp_path / "file" / "below", "a/b")
        for line, flag in zip(lines, ("--model_path", "--tokenizer"), strict=True):
            assert line.startswith(f"{flag}: a/b cannot be downloaded to the hub's cache {tmp_path}/file/below/hub (")
            assert line.endswith("set HF_HOME to a folder that can be written to and has room")
