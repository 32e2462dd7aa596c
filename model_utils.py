"""LLaMA models: the table of sizes, config.json, construction, initial weights, parameter and FLOP counts.

A config.json's fields either make the model, or are refused, or are left out and named. The rest of LlamaConfig, such
as the defaults of `generate`, does not change training and is kept for users of the trained model.
"""

import contextlib
import copy
import functools
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.activations import ACT2CLS, ACT2FN
from transformers.modeling_utils import no_init_weights
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from runtime.console import InputError, first_line, say

IGNORE_INDEX = -100  # a label that the loss leaves out, as in PyTorch
COUNTS = (  # whole numbers of at least 1
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "original_max_position_embeddings",
    "vocab_size",
)
DERIVED = ("num_key_value_heads", "head_dim", "original_max_position_embeddings")  # from others, where null
RANGES = {  # numbers from the first to the second
    "rms_norm_eps": (0, 1),
    "rope_theta": (1, math.inf),
    "initializer_range": (0, math.inf),
    "attention_dropout": (0, 1),
}
SWITCHES = ("attention_bias", "mlp_bias", "tie_word_embeddings")
# Values, beside null, under which a field changes nothing. With any other, LLaMA as transformers computes it, and as it
# is trained here, would be another model than the file describes, or give another output than training reads.
NEUTRAL: dict[str, tuple] = {
    "pruned_heads": ({},),
    "return_dict": (True,),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "torchscript": (False,),
    "is_encoder_decoder": (False,),
    "tie_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (),
    "partial_rotary_factor": (1,),
    # of other families of models
    "alibi": (False,),
    "attention_multiplier": (),
    "attn_logit_softcapping": (),
    "bias": (False,),
    "clip_qkv": (),
    "embd_pdrop": (0,),
    "embedding_multiplier": (1,),
    "final_logit_softcapping": (),
    "hidden_dropout": (0,),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "n_routed_experts": (0,),
    "no_rope_layer_interval": (0,),
    "no_rope_layers": ([],),
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
    "parallel_attn": (False,),
    "qk_layernorm": (False,),
    "qkv_bias": (False,),
    "query_pre_attn_scalar": (),
    "resid_pdrop": (0,),
    "residual_multiplier": (1,),
    "rope_interleaved": (False,),
    "rotary_pct": (1,),
    "scale_depth": (),
    "scale_emb": (1,),
    "sliding_window": (),
    "use_qk_norm": (False,),
}
ROPE_FIELDS = {  # of rope_scaling, beside its type: those that transformers reads (modeling_rope_utils.py)
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
    ),
    "longrope": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "short_factor",
        "long_factor",
    ),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}
# Fields about how the file was saved or is to be loaded, which do not hold for the trained model.
_LEFT_OUT = {
    "quantization_config": "the trained weights are not quantized",
    "compression_config": "the trained weights are not quantized",
    "auto_map": "the model is transformers' own LLaMA",
}
_WRITTEN_ANEW = ("_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "attn_implementation")
_DECIDING_SHAPES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "vocab_size", "tie_word_embeddings", "attention_bias", "mlp_bias"),
)
_KEPT = ("original_max_position_embeddings", "num_labels")  # beside the fields of LlamaConfig itself
_say_once = functools.cache(say)


def used_fields(values: dict, file: object) -> dict:
    """Return the fields that LlamaConfig uses, and say once which others `file` has.

    Args:
        values: fields in which `field_problems` finds no problem.
    """
    values = {name: value for name, value in values.items() if name not in (*NEUTRAL, *_WRITTEN_ANEW)}
    for name in _LEFT_OUT.keys() & values.keys():
        if values.pop(name):
            _say_once(f"{file}: {name} is left out of what is saved: {_LEFT_OUT[name]}")
    known = {*LlamaConfig().to_dict(), *_KEPT}
    unknown = sorted(name for name in values if name not in known and not name.startswith("_"))
    if scaling := values.get("rope_scaling"):
        kind = rope_type(scaling)
        used = {"rope_type": kind} | {name: scaling[name] for name in ROPE_FIELDS[kind] if name in scaling}
        values["rope_scaling"] = used
        unknown += [f"{name} of rope_scaling" for name in scaling if name not in (*used, "type")]
    if unknown:
        _say_once(f"{file}: not used and not saved, as LLaMA has no such fields: {', '.join(unknown)}")
    return {name: value for name, value in values.items() if name in known and (value is not None or name not in _KEPT)}


def field_problems(values: dict) -> list[str]:
    """Return a line for each field whose value is impossible, or which no layout trains."""
    problems = _range_problems(values)
    for name in (name for name in SWITCHES if values.get(name) not in (None, True, False)):
        problems.append(f"{name} is {json.dumps(values[name])}; it must be true or false")
    for name, neutral in NEUTRAL.items():
        value = values.get(name)
        if name == "sliding_window" and values.get("use_sliding_window") is False:
            continue
        if value is not None and value not in neutral:
            instead = f"set it to {json.dumps(neutral[0])}" if neutral else "remove it"
            problems.append(
                f"{name} is {json.dumps(value)}, which these programs do not train; {instead} if the model is a "
                "LLaMA without it"
            )
    activation = values.get("hidden_act", "silu")
    if not isinstance(activation, str) or activation not in ACT2CLS:
        problems.append(f"hidden_act is {json.dumps(activation)}; choose from {', '.join(sorted(ACT2CLS))}")
    elif list(ACT2FN[activation].parameters()):
        problems.append(f"hidden_act is {json.dumps(activation)}, which has weights of its own; choose another")
    return problems + _rope_problems(values)


def _range_problems(values: dict) -> list[str]:
    derived = {name for name in DERIVED if values.get(name) is None}
    problems = []
    for name in (name for name in (*COUNTS, *RANGES) if name in values and name not in derived):
        value = values[name]
        least, greatest = RANGES.get(name, (1, math.inf))
        if type(value) not in ((int,) if name in COUNTS else (int, float)) or not least <= value <= greatest:
            kind = "a whole number" if name in COUNTS else "a number"
            upwards = "upwards" if greatest == math.inf else f"to {greatest}"
            problems.append(f"{name} is {json.dumps(value)}; it must be {kind} from {least} {upwards}")
    return problems


def rope_type(scaling: dict) -> Any:
    """Return the type of rotary frequencies, which older files call `type`."""
    return scaling.get("rope_type", scaling.get("type"))


def _rope_problems(values: dict) -> list[str]:
    scaling = values.get("rope_scaling")
    if scaling is None:
        return []
    kinds = ", ".join(ROPE_FIELDS)
    if not isinstance(scaling, dict):
        return [f"rope_scaling is {json.dumps(scaling)}; it must be null, or have a rope_type of {kinds}"]
    kind = rope_type(scaling)
    if not isinstance(kind, str) or kind not in ROPE_FIELDS:
        return [f"rope_scaling has the rope_type {json.dumps(kind)}; choose from {kinds}"]
    others = {"type": kind, "rope_theta": values.get("rope_theta", 10000.0), "truncate": True}
    others["partial_rotary_factor"] = 1  # of transformers 5, which reads them here too
    return [
        f"rope_scaling has the {name} {json.dumps(scaling[name])}, which these programs do not train beside the rest; "
        f"set it to {json.dumps(other)} or remove it"
        for name, other in others.items()
        if scaling.get(name) not in (None, other)
    ]


def shape_problems(config: LlamaConfig) -> list[str]:
    """Return a line for each pair of sizes that do not fit, and for rotary frequencies that are no numbers."""
    problems = []
    hidden, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    if hidden % heads:
        problems.append(f"hidden size {hidden} is not divisible by {heads} heads")
    elif heads % kv_heads:
        problems.append(f"{heads} heads are not divisible by {kv_heads} key-value heads")
    elif config.head_dim % 2:
        problems.append(f"heads of {config.head_dim} numbers each; rotary embeddings need an even number")
    padding, vocabulary = config.pad_token_id, config.vocab_size
    if padding is not None and not -vocabulary <= padding < vocabulary:  # from the end, as in LLaMA-1's first files
        problems.append(f"pad_token_id {padding} is outside the vocabulary of {vocabulary}; give another, or null")
    if not problems:
        rotary = LlamaRotaryEmbedding(config)
        frequencies = rotary.inv_freq.double() * rotary.attention_scaling
        if not (frequencies.isfinite() & (frequencies > 0)).all():
            problems.append(
                f"rope_theta {config.rope_theta} and rope_scaling {json.dumps(config.rope_scaling)} give frequencies "
                "that are no positive numbers; correct their factors"
            )
    return problems


def rotates_alike(first: LlamaConfig, second: LlamaConfig) -> bool:
    """Return True if two configurations rotate positions alike, up to the shorter context of both."""
    context = min(first.max_position_embeddings, second.max_position_embeddings)

    def rotations(config: LlamaConfig, length: int) -> torch.Tensor:
        frequencies, scaling = LlamaRotaryEmbedding(config).rope_init_fn(config, torch.device("cpu"), length)
        return torch.cat([frequencies, torch.tensor([scaling])])

    return all(torch.equal(rotations(first, length), rotations(second, length)) for length in (1, context))


def mixed_length_problem(config: LlamaConfig, max_length: int) -> str | None:
    """Return a line if rotary frequencies depend on the longest sequence of a batch, for batches of several lengths.

    A sequence would be trained differently beside a longer one, and differently in each layout.
    """
    least = getattr(config, "original_max_position_embeddings", config.max_position_embeddings)
    if (config.rope_scaling or {}).get("rope_type") != "longrope" or max_length <= least:
        return None
    return (
        f"--max_length: {max_length} is above {least}, beyond which rope_scaling longrope changes the frequencies of "
        f"the whole batch; with documents or examples of several lengths give at most {least}"
    )


# One line a model: layers, hidden size, FFN size, heads, KV heads, context, vocabulary, RMSNorm epsilon, other fields.
# Sizes: Touvron et al. 2023, "LLaMA" (arXiv:2302.13971) table 2 and "Llama 2" (arXiv:2307.09288) table 1;
# epsilon: 1e-6 in LLaMA-1's params.json, 1e-5 in LLaMA-2's. Llama 3: "The Llama 3 Herd of Models" (arXiv:2407.21783)
# table 3, and the config.json of meta-llama/Meta-Llama-3-8B, Meta-Llama-3-70B, Llama-3.2-1B and Llama-3.2-3B.
_LLAMA_3 = {"rope_theta": 500000.0}
_LLAMA_3_2 = {
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
_SIZES: dict[str, tuple] = {
    "7b": (32, 4096, 11008, 32, 32, 4096, 32000, 1e-5),
    "13b": (40, 5120, 13824, 40, 40, 4096, 32000, 1e-5),
    "30b": (60, 6656, 17920, 52, 52, 2048, 32000, 1e-6),
    "65b": (80, 8192, 22016, 64, 64, 2048, 32000, 1e-6),
    "70b": (80, 8192, 28672, 64, 8, 4096, 32000, 1e-5),
    "llama3-8b": (32, 4096, 14336, 32, 8, 8192, 128256, 1e-5, _LLAMA_3),
    "llama3-70b": (80, 8192, 28672, 64, 8, 8192, 128256, 1e-5, _LLAMA_3),
    "llama3.2-1b": (16, 2048, 8192, 32, 8, 131072, 128256, 1e-5, _LLAMA_3_2),
    "llama3.2-3b": (28, 3072, 8192, 24, 8, 131072, 128256, 1e-5, _LLAMA_3_2),
    "tiny": (4, 256, 688, 4, 4, 1024, 4096, 1e-5),  # for laptops
    "test": (4, 64, 176, 4, 2, 128, 1024, 1e-5),  # for tests
}


def _config(
    layers: int,
    hidden: int,
    ffn: int,
    heads: int,
    kv_heads: int,
    context: int,
    vocab: int,
    epsilon: float,
    others: dict[str, Any] | None = None,
) -> LlamaConfig:
    fields = {"rope_theta": 10000.0, "tie_word_embeddings": False, **(others or {})}
    return LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=context,
        vocab_size=vocab,
        rms_norm_eps=epsilon,
        initializer_range=0.02,
        use_cache=False,
        **fields,
    )


MODEL_CONFIGS = {name: _config(*sizes) for name, sizes in _SIZES.items()}


def load_config(name_or_path: str, flag: str = "--config") -> LlamaConfig:
    """Read the configuration that `flag` names: a built-in one, a config.json, or a folder that holds one.

    Raises:
        InputError: unknown name, unreadable file, a model that is not LLaMA, or a field that is not trained.
    """
    if name_or_path in MODEL_CONFIGS:
        return LlamaConfig.from_dict(MODEL_CONFIGS[name_or_path].to_dict())
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            raise InputError(
                f"{flag}: {name_or_path} has no config.json; give a model's folder: `final`, or `model` in a checkpoint"
            )
    if not path.is_file():
        known = ", ".join(MODEL_CONFIGS)
        raise InputError(f"{flag}: {name_or_path!r} is neither a known model ({known}) nor a config.json or its folder")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or values.get("model_type") != "llama":
            found = values.get("model_type") if isinstance(values, dict) else type(values).__name__
            raise InputError(f"{flag}: {path} describes model_type {found!r}; this program trains only 'llama'")
        values = _as_transformers_4(values)
        problems = field_problems(values)
        if not problems:
            config = LlamaConfig.from_dict(used_fields(values, path))
            problems = shape_problems(config)
        if problems:
            raise InputError(*(f"{flag}: {path}: {problem}" for problem in problems))
        build_model(config, torch.device("meta"))
    except (OSError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise InputError(f"{flag}: {path} cannot be read as a LLaMA config.json: {first_line(error)}") from error
    config.use_cache = False
    return config


def _as_transformers_4(values: dict) -> dict:
    """Rename the fields that transformers 5 renamed, which this version would ignore.

    `rope_parameters` holds the base and, except for the type `default`, the scaling; `dtype` was `torch_dtype`. A dtype
    in which no weights are trained, such as `auto` or one of 8 bits, is dropped: --mixed_precision decides.
    """
    values = dict(values)
    if rope := values.pop("rope_parameters", None):
        if any(isinstance(value, dict) for value in rope.values()):
            raise ValueError("rope_parameters are of several kinds of layers, and LLaMA has one")
        before = {name: values[name] for name in ("rope_scaling", "rope_theta") if values.get(name)}
        scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
        values["rope_scaling"] = None if scaling in ({}, {"rope_type": "default"}) else scaling
        outside = ["rope_theta", "partial_rotary_factor"]
        if scaling.get("rope_type") == "longrope":  # there it divides short from long, and stood beside the scaling
            outside.append("original_max_position_embeddings")
        values |= {name: rope[name] for name in outside if name in rope}
        if other := [name for name, value in before.items() if values[name] != value]:
            raise ValueError(f"{other[0]} and rope_parameters say different things; leave one of them in it")
    dtype = values.pop("dtype", None)
    name = str(values.pop("torch_dtype", None) or dtype).removeprefix("torch.")
    found = getattr(torch, name, None)
    if isinstance(found, torch.dtype) and found.is_floating_point and found.itemsize > 1:
        values["torch_dtype"] = name
    return values


@dataclass(frozen=True)
class ParameterSpec:
    """Name and full (unsharded) shape of one parameter, in Hugging Face's layout."""

    name: str
    shape: torch.Size

    @functools.cached_property
    def group(self) -> str:
        """Part of the model that it belongs to: 'model.layers.7', or the module's own name outside the layers."""
        parts = self.name.split(".")
        return ".".join(parts[:3]) if parts[:2] == ["model", "layers"] else self.name.removesuffix(".weight")


def parameter_specs(config: LlamaConfig) -> list[ParameterSpec]:
    """Return every parameter of the model, in the model's order, without allocating any."""
    return list(_specs(sizes_of(config)))


def sizes_of(config: LlamaConfig) -> tuple[tuple[str, Any], ...]:
    """Return the fields that decide the names and shapes of parameters, with their values."""
    return tuple((name, getattr(config, name)) for name in _DECIDING_SHAPES)


@functools.lru_cache(maxsize=64)
def _specs(sizes: tuple[tuple[str, Any], ...]) -> tuple[ParameterSpec, ...]:
    model = build_model(LlamaConfig(**dict(sizes)), torch.device("meta"))
    return tuple(ParameterSpec(name, parameter.shape) for name, parameter in model.named_parameters())


def plain_name(name: str) -> str:
    """Return a parameter's name without peft's additions: `PREFIX.MODULE.lora_A.weight` for an adapter."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".default.", ".")


def trained_specs(config: LlamaConfig, adapters: LoraConfig | None) -> list[ParameterSpec]:
    """Return the parameters that training changes: those of the adapters if there are any, else all."""
    if adapters is None:
        return parameter_specs(config)
    # A copy, because peft writes the name of its model into it, and this model has none.
    model = get_peft_model(build_model(config, torch.device("meta")), copy.deepcopy(adapters))
    parameters = model.named_parameters()
    return [ParameterSpec(plain_name(name), value.shape) for name, value in parameters if value.requires_grad]


def count_parameters(config: LlamaConfig, input_embedding: bool = True) -> int:
    """Return the number of parameters, without the input embedding if asked and if it is not tied to the output."""
    skipped = "" if input_embedding or config.tie_word_embeddings else "model.embed_tokens.weight"
    return sum(spec.shape.numel() for spec in parameter_specs(config) if spec.name != skipped)


def attention_size(config: LlamaConfig) -> int:
    """Return the size of the query and of attention's output, all heads together: mostly the hidden size."""
    return config.num_attention_heads * config.head_dim


def model_flops_per_token(config: LlamaConfig, seq_length: int, adapted: bool = False) -> int:
    """Return the FLOPs of a token, forward and backward: 6 N + 12 L H S.

    N counts the parameters without the input embedding, H is the `attention_size`.

    With adapters it is 4 N, since the weights are frozen. As in PaLM (arXiv:2204.02311, appendix B) and torchtitan,
    attention counts in full, not halved for causality, and recomputation does not count.
    """
    attention = 12 * config.num_hidden_layers * attention_size(config) * seq_length
    return (4 if adapted else 6) * count_parameters(config, input_embedding=False) + attention


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


def build_model(
    config: LlamaConfig, context: contextlib.AbstractContextManager, dtype: torch.dtype = torch.float32
) -> LlamaForCausalLM:
    """Return the model, made inside `context`, its weights not yet set (see `initial_weight`).

    Args:
        context: decides where parameters are allocated, a torch.device or ColossalAI's LazyInitContext.
        dtype: of the parameters.
    """
    with no_init_weights(), _default_dtype(dtype), context:
        model = LlamaForCausalLM(config)
        # torch gives the padding row no gradient, and it is often EOS's; no label here counts after padding.
        model.model.embed_tokens.padding_idx = None
        model.tie_weights()  # no_init_weights leaves it out; it ties only where the configuration says so
    return model


def initial_weight(spec: ParameterSpec, config: LlamaConfig, seed: int, device: torch.device) -> torch.Tensor:
    """Return the initial value of one parameter, full and float32: normal (std 0.02), ones for norms, zeros for biases.

    An adapter starts as zero: its first matrix is uniform, its second zeros. The value depends on seed and name alone,
    so every plugin, layout and number of ranks starts from the same weights.
    """
    if spec.name.endswith("norm.weight"):
        return torch.ones(spec.shape, dtype=torch.float32, device=device)
    if spec.name.endswith((".bias", ".lora_B.weight")):
        return torch.zeros(spec.shape, dtype=torch.float32, device=device)
    digest = hashlib.sha256(f"{seed}:{spec.name}".encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    weight = torch.empty(spec.shape, dtype=torch.float32, device=device)
    if spec.name.endswith(".lora_A.weight"):
        bound = spec.shape[1] ** -0.5  # peft's: kaiming_uniform_(a=sqrt(5))
        return weight.uniform_(-bound, bound, generator=generator)
    return weight.normal_(std=config.initializer_range, generator=generator)


def restore_rotary_precision(model: nn.Module, device: torch.device) -> None:
    """Recompute the rotary frequencies in float32 on `device`.

    Plugins cast a model's buffers to fp16 or bf16 with the rest. Rounded to bf16, a frequency is off by up to 2**-9 of
    itself, five radians at position 4096, and the trained model would differ from the one that Hugging Face runs.
    """
    for module in model.modules():
        if hasattr(module, "inv_freq"):
            module.inv_freq, module.attention_scaling = module.rope_init_fn(module.config, device)  # type: ignore[operator]
            module.original_inv_freq = module.inv_freq
