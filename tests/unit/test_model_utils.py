"""Model sizes, their arithmetic, and weights, against closed formulas and a real Hugging Face model."""

import contextlib
import json
import math
import resource

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from model_utils import (
    MODEL_CONFIGS,
    ParameterSpec,
    build_model,
    count_parameters,
    initial_weight,
    load_config,
    model_flops_per_token,
    parameter_specs,
    restore_rotary_precision,
)
from runtime.console import InputError

CPU = torch.device("cpu")

# A second copy of the sizes: layers, hidden, FFN, heads, KV heads, context, vocabulary, parameters.
PUBLISHED = {
    "7b": (32, 4096, 11008, 32, 32, 4096, 32000, 6_738_415_616),
    "13b": (40, 5120, 13824, 40, 40, 4096, 32000, 13_015_864_320),
    "30b": (60, 6656, 17920, 52, 52, 2048, 32000, 32_528_943_616),
    "65b": (80, 8192, 22016, 64, 64, 2048, 32000, 65_285_660_672),
    "70b": (80, 8192, 28672, 64, 8, 4096, 32000, 68_976_648_192),
    "llama3-8b": (32, 4096, 14336, 32, 8, 8192, 128256, 8_030_261_248),
    "llama3-70b": (80, 8192, 28672, 64, 8, 8192, 128256, 70_553_706_496),
    "llama3.2-1b": (16, 2048, 8192, 32, 8, 131072, 128256, 1_235_814_400),
    "llama3.2-3b": (28, 3072, 8192, 24, 8, 131072, 128256, 3_212_749_824),
    "tiny": (4, 256, 688, 4, 4, 1024, 4096, 5_261_568),
    "test": (4, 64, 176, 4, 2, 128, 1024, 315_968),
}


# Meta's params.json (also in github.com/meta-llama/llama-models): dim, n_layers, n_heads, ffn_dim_multiplier,
# multiple_of; and the factor of the scaled frequencies in the config.json of meta-llama/Llama-3.2-1B and 3B.
META = {
    "llama3-8b": (4096, 32, 32, 1.3, 1024, None),
    "llama3-70b": (8192, 80, 64, 1.3, 4096, None),
    "llama3.2-1b": (2048, 16, 32, 1.5, 256, 32),
    "llama3.2-3b": (3072, 28, 24, 1.0, 256, 32),
}


def filled_model(config, seed=0):
    model = build_model(config, CPU)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_weight(ParameterSpec(name, parameter.shape), config, seed, CPU))
    return model


class TestSizes:
    def test_every_built_in_model_is_in_the_table(self):
        assert list(PUBLISHED) == list(MODEL_CONFIGS)

    @pytest.mark.parametrize("name", PUBLISHED)
    def test_configuration_and_parameter_count(self, name):
        layers, hidden, ffn, heads, kv_heads, context, vocab, parameters = PUBLISHED[name]
        config = load_config(name)
        assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (layers, hidden, ffn)
        assert (config.num_attention_heads, config.num_key_value_heads) == (heads, kv_heads)
        assert (config.max_position_embeddings, config.vocab_size) == (context, vocab)
        assert config.rope_theta == (5e5 if "llama3" in name else 1e4)
        assert config.rms_norm_eps == (1e-6 if name in ("30b", "65b") else 1e-5)
        tied = "llama3.2" in name
        assert (config.tie_word_embeddings, config.use_cache) == (tied, False)

        attention = 2 * hidden * hidden + 2 * hidden * (hidden // heads * kv_heads)
        by_formula = (2 - tied) * vocab * hidden + layers * (attention + 3 * hidden * ffn + 2 * hidden) + hidden
        assert count_parameters(config) == by_formula == parameters
        assert count_parameters(config, input_embedding=False) == parameters - (not tied) * vocab * hidden
        with torch.device("meta"):
            assert AutoModelForCausalLM.from_config(config).num_parameters() == parameters

    @pytest.mark.parametrize("name", META)
    def test_llama_3_is_what_meta_publishes(self, name):
        """The feed-forward size and the scaled frequencies, computed as in Meta's models/llama3/model.py."""
        dim, layers, heads, multiplier, multiple_of, factor = META[name]
        config = load_config(name)
        assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (dim, layers, heads)
        ffn = int(multiplier * int(2 * 4 * dim / 3))
        assert config.intermediate_size == -(-ffn // multiple_of) * multiple_of
        frequencies = 5e5 ** -(torch.arange(0, dim // heads, 2).double() / (dim // heads))
        if factor:
            turns = 8192 * frequencies / (2 * math.pi)  # in the original context
            smooth = ((turns - 1) / (4 - 1)).clamp(0, 1)
            frequencies = (1 - smooth) * frequencies / factor + smooth * frequencies
        rotary = LlamaRotaryEmbedding(config)
        assert rotary.attention_scaling == 1
        torch.testing.assert_close(rotary.inv_freq.double(), frequencies, rtol=1e-5, atol=0)

    def test_counting_allocates_nothing(self):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert count_parameters(load_config("70b")) > 2**36
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KiB; the model would take 2**28

    def test_tied_embeddings_count_once_as_the_output(self):
        config = load_config("test")
        untied = count_parameters(config)
        config.tie_word_embeddings = True
        assert "lm_head.weight" not in [spec.name for spec in parameter_specs(config)]
        assert count_parameters(config) == untied - 1024 * 64
        assert count_parameters(config, input_embedding=False) == count_parameters(config)
        model = build_model(config, CPU)
        assert model.lm_head.weight is model.model.embed_tokens.weight

    def test_groups_are_the_layers_the_embeddings_the_norm_and_the_head(self):
        groups = list(dict.fromkeys(spec.group for spec in parameter_specs(load_config("test"))))
        layers = [f"model.layers.{number}" for number in range(4)]
        assert groups == ["model.embed_tokens", *layers, "model.norm", "lm_head"]
        assert ParameterSpec("model.layers.17.mlp.up_proj.weight", torch.Size()).group == "model.layers.17"


class TestFlops:
    def test_7b_by_hand(self):
        without_embedding = 6_738_415_616 - 32000 * 4096
        assert model_flops_per_token(load_config("7b"), 4096) == 6 * without_embedding + 12 * 32 * 4096 * 4096

    @pytest.mark.parametrize(("kv_heads", "head_dim"), [(1, 16), (2, 16), (4, 16), (2, 32)])
    def test_equals_the_counted_flops_of_a_forward_and_a_backward_pass(self, kv_heads, head_dim):
        config = load_config("test")
        config.num_key_value_heads, config.head_dim, config._attn_implementation = kv_heads, head_dim, "eager"
        batch, length = 2, 48
        model = filled_model(config)
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(batch, length, dtype=torch.long)).logits.sum().backward()
        # The formula counts norms like matrices; the counter counts the outer product that computes the rotary angles.
        norms = (2 * config.num_hidden_layers + 1) * config.hidden_size
        angles = 2 * (config.head_dim // 2) * length
        expected = batch * length * (model_flops_per_token(config, length) - 6 * norms) + angles
        assert counter.get_total_flops() == expected


class TestLoadConfig:
    @pytest.fixture
    def saved(self, tmp_path):
        config = load_config("test")
        config.use_cache, config.rope_theta, config.num_hidden_layers = True, 5e5, 3
        config.save_pretrained(tmp_path)
        return tmp_path

    @pytest.mark.parametrize("file", ["", "config.json"])
    def test_folder_and_file(self, saved, file):
        config = load_config(str(saved / file))
        assert (config.num_hidden_layers, config.hidden_size, config.rope_theta) == (3, 64, 5e5)
        assert not config.use_cache

    @pytest.mark.parametrize("scaling", [None, {"rope_type": "linear", "factor": 2.0}])
    def test_as_transformers_5_writes_it(self, saved, scaling):
        file = saved / "config.json"
        values = json.loads(file.read_text()) | {"dtype": "bfloat16"}
        del values["rope_theta"], values["rope_scaling"]
        values["rope_parameters"] = {"rope_theta": 5e5, **(scaling or {"rope_type": "default"})}
        file.write_text(json.dumps(values))
        config = load_config(str(file))
        assert (config.rope_theta, config.rope_scaling, config.torch_dtype) == (5e5, scaling, torch.bfloat16)
        assert not {"rope_parameters", "dtype"} & set(config.to_dict())

    @pytest.mark.parametrize(
        ("rope", "others", "problem"),
        [
            ({"rope_type": "default", "rope_theta": 5e5}, {"rope_theta": 1e6}, "rope_theta and rope_parameters say"),
            (
                {"rope_type": "default", "rope_theta": 5e5},
                {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
                "rope_scaling and rope_parameters say",
            ),
            ({"full_attention": {"rope_type": "default", "rope_theta": 5e5}}, {}, "several kinds of layers"),
            (None, {"rope_scaling": {"type": "linear", "rope_type": "dynamic", "factor": 2.0}}, "the type"),
            (None, {"rope_scaling": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}}, "the rope_theta"),
            ({"rope_type": "yarn", "factor": 2.0, "truncate": False}, {}, "the truncate false"),
        ],
    )
    def test_contradictory_or_unsupported_rotary_embeddings_are_refused(self, tmp_path, rope, others, problem):
        values = {"model_type": "llama", "rope_parameters": rope} | others
        (tmp_path / "config.json").write_text(json.dumps(values))
        with pytest.raises(InputError, match=problem):
            load_config(str(tmp_path))

    def test_fields_of_rope_scaling_without_effect_are_named(self, saved, capsys):
        file = saved / "config.json"
        scaling = {"type": "linear", "factor": 2.0, "finetuned": True}
        file.write_text(json.dumps(json.loads(file.read_text()) | {"rope_scaling": scaling}))
        assert load_config(str(file)).rope_scaling == {"rope_type": "linear", "factor": 2.0}
        assert (
            "not used and not saved, as LLaMA has no such fields: finetuned of rope_scaling" in capsys.readouterr().out
        )

    def test_a_change_does_not_reach_the_table(self):
        load_config("test").hidden_size = 1
        assert load_config("test").hidden_size == 64

    def test_unknown_name_lists_the_known_ones(self):
        with pytest.raises(InputError, match=r"'8b' is neither a known model \(7b, .*llama3-8b, .*tiny, test\)"):
            load_config("8b")

    def test_folder_without_a_config(self, tmp_path):
        with pytest.raises(InputError, match=r"has no config\.json; give a model's folder"):
            load_config(str(tmp_path))

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ('{"model_type": "gpt2"}', "describes model_type 'gpt2'"),
            ("{}", "describes model_type None"),
            ("[1, 2]", "describes model_type 'list'"),
            ('{"model_type": "llama", "hidd', "cannot be read as a LLaMA config.json"),
            ("", "cannot be read as a LLaMA config.json"),
            (b"\xff\xfe\x00", "cannot be read as a LLaMA config.json"),
            (
                '{"model_type": "llama", "rope_scaling": {"rope_type": 7}}',
                "rope_scaling has the rope_type 7; choose from",
            ),
            ('{"model_type": "llama", "hidden_act": "none"}', 'hidden_act is "none"; choose from'),
            ('{"model_type": "llama", "hidden_size": 100}', "hidden size 100 is not divisible by 32 heads"),
            ('{"model_type": "llama", "num_key_value_heads": 5}', "32 heads are not divisible by 5 key-value heads"),
        ],
    )
    def test_unusable_file_is_one_line_that_names_it(self, tmp_path, content, message):
        path = tmp_path / "config.json"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        with pytest.raises(InputError, match=message) as caught:
            load_config(str(path))
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("changes", "problems"),
        [
            ({"hidden_size": "4096"}, ['hidden_size is "4096"; it must be a whole number from 1 upwards']),
            ({"num_attention_heads": 0}, ["num_attention_heads is 0; "]),
            ({"num_hidden_layers": 0}, ["num_hidden_layers is 0; "]),
            ({"num_hidden_layers": True}, ["num_hidden_layers is true; "]),
            ({"vocab_size": -1}, ["vocab_size is -1; "]),
            ({"intermediate_size": 172.5}, ["intermediate_size is 172.5; "]),
            ({"max_position_embeddings": None}, ["max_position_embeddings is null; "]),
            ({"max_position_embeddings": "128"}, ['max_position_embeddings is "128"; ']),
            ({"attention_dropout": 2.0}, ["attention_dropout is 2.0; it must be a number from 0 to 1"]),
            ({"rope_theta": math.nan}, ["rope_theta is NaN; "]),
            ({"initializer_range": -1, "rms_norm_eps": None}, ["rms_norm_eps is null; ", "initializer_range is -1; "]),
            ({"pad_token_id": 1024}, ["pad_token_id 1024 is outside the vocabulary of 1024; give another, or null"]),
            (
                {"hidden_size": 60, "num_attention_heads": 20, "head_dim": None},
                ["heads of 3 numbers each; rotary embeddings need an even"],
            ),
            ({"pad_token_id": -1, "num_key_value_heads": None, "attention_dropout": 0, "rope_theta": 10000}, []),
        ],
    )
    def test_numbers_that_no_model_can_have(self, saved, changes, problems):
        file = saved / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        with contextlib.nullcontext() if not problems else pytest.raises(InputError) as caught:
            load_config(str(file))
        found = caught.value.problems if problems else []
        assert len(found) == len(problems)
        for line, problem in zip(found, problems, strict=True):
            assert line.startswith(f"--config: {file}: {problem}")


class TestInitialWeight:
    SPEC = ParameterSpec("model.layers.0.mlp.up_proj.weight", torch.Size([512, 256]))

    def weight(self, spec=SPEC, seed=3):
        return initial_weight(spec, load_config("test"), seed, CPU)

    def test_is_normal_with_llamas_deviation(self):
        weight = self.weight()
        assert weight.dtype == torch.float32
        assert weight.shape == self.SPEC.shape
        assert weight.std().item() == pytest.approx(0.02, rel=0.01)
        assert abs(weight.mean().item()) < 4 * 0.02 / math.sqrt(weight.numel())

    def test_depends_only_on_seed_and_name(self):
        weight = self.weight()
        torch.manual_seed(1)
        torch.rand(7)
        state = torch.get_rng_state()
        assert torch.equal(self.weight(), weight)
        assert torch.equal(torch.get_rng_state(), state)
        assert not torch.equal(self.weight(seed=4), weight)
        assert not torch.equal(self.weight(ParameterSpec("lm_head.weight", self.SPEC.shape)), weight)

    def test_is_the_same_in_every_release(self):
        expected = [0.0030029889, 0.0204276014, -0.0275419522]
        assert self.weight().flatten()[:3].tolist() == pytest.approx(expected, abs=1e-9)

    def test_norms_are_ones_and_biases_zeros(self):
        for name, value in (
            ("model.layers.0.input_layernorm.weight", 1.0),
            ("model.norm.weight", 1.0),
            ("x.bias", 0.0),
        ):
            assert self.weight(ParameterSpec(name, torch.Size([8]))).tolist() == [value] * 8


class TestBuildModel:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_dtype_of_the_parameters_and_no_lasting_effect(self, dtype):
        model = build_model(load_config("test"), CPU, dtype)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        assert torch.get_default_dtype() == torch.float32

    def test_initialises_nothing(self):
        state = torch.get_rng_state()
        build_model(load_config("test"), CPU)
        assert torch.equal(torch.get_rng_state(), state)


class TestRotaryPrecision:
    """A plugin's `model.to(bfloat16)` rounds the rotary frequencies; loading by Hugging Face does not."""

    LENGTH = 1024

    @pytest.fixture
    def models(self, tmp_path):
        """Return a model cast as plugins do, and the same model as AutoModel loads it in bf16."""
        config = LlamaConfig(**{**load_config("tiny").to_dict(), "num_hidden_layers": 2, "vocab_size": 64})
        config._attn_implementation = "eager"
        model = filled_model(config)
        model.save_pretrained(tmp_path)
        reference = AutoModelForCausalLM.from_pretrained(
            tmp_path, torch_dtype=torch.bfloat16, attn_implementation="eager"
        )
        return model.to(torch.bfloat16), reference

    def test_frequencies_and_logits_equal_hugging_faces(self, models):
        model, reference = models
        tokens = torch.randint(64, (1, self.LENGTH), generator=torch.Generator().manual_seed(0))
        rotary, exact = model.model.rotary_emb, 10000.0 ** (-torch.arange(0, 64, 2).double() / 64)
        with torch.no_grad():
            assert not torch.equal(model(tokens).logits, reference(tokens).logits)
            radians = (rotary.inv_freq.double() - exact).abs().max() * self.LENGTH
            assert radians > 0.4

            restore_rotary_precision(model, CPU)
            assert rotary.inv_freq.dtype == torch.float32
            assert torch.equal(rotary.inv_freq, reference.model.rotary_emb.inv_freq)
            assert torch.allclose(rotary.inv_freq.double(), exact, rtol=1e-6, atol=0)
            assert torch.equal(model(tokens).logits, reference(tokens).logits)

    def test_survives_a_model_that_extends_its_context(self):
        config = load_config("test")
        config.rope_scaling = {"rope_type": "dynamic", "factor": 2.0}
        model = build_model(config, CPU)
        expected = model.model.rotary_emb.inv_freq.clone()
        restore_rotary_precision(model.to(torch.bfloat16), CPU)
        assert torch.equal(model.model.rotary_emb.inv_freq, expected)
        assert torch.equal(model.model.rotary_emb.original_inv_freq, expected)
