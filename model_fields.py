"""Fields of a config.json: those that make the model, those that are refused, and those that are left out.

The rest of LlamaConfig, such as the defaults of `generate`, changes no training and is kept for whoever loads the
trained model.
"""

import functools
import json
import math
from typing import Any

from transformers import LlamaConfig
from transformers.activations import ACT2CLS, ACT2FN
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from console import say

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
# Of files that were saved otherwise than those of the trained model are, or of how they are to be loaded.
_LEFT_OUT = {
    "quantization_config": "the trained weights are not quantized",
    "compression_config": "the trained weights are not quantized",
    "auto_map": "the model is transformers' own LLaMA",
}
_WRITTEN_ANEW = ("_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "attn_implementation")
_KEPT = ("original_max_position_embeddings", "num_labels")  # beside the fields of LlamaConfig itself
_say_once = functools.cache(say)


def used_fields(values: dict, file: object) -> dict:
    """The fields of `values`, which `field_problems` finds nothing wrong with, that LlamaConfig has a use for.

    Says once which others `file` has.
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
    """One line for each field whose value is none that it can have, or that no layout trains."""
    problems = _range_problems(values)
    for name in (name for name in SWITCHES if values.get(name) not in (None, True, False)):
        problems.append(f"{name} is {json.dumps(values[name])}; it has to be true or false")
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
        problems.append(f"hidden_act is {json.dumps(activation)}; choose of {', '.join(sorted(ACT2CLS))}")
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
            problems.append(f"{name} is {json.dumps(value)}; it has to be {kind} from {least} {upwards}")
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
        return [f"rope_scaling is {json.dumps(scaling)}; it has to be null, or have a rope_type of {kinds}"]
    kind = rope_type(scaling)
    if not isinstance(kind, str) or kind not in ROPE_FIELDS:
        return [f"rope_scaling has the rope_type {json.dumps(kind)}; choose of {kinds}"]
    others = {"type": kind, "rope_theta": values.get("rope_theta", 10000.0), "truncate": True}
    others["partial_rotary_factor"] = 1  # of transformers 5, which reads them here too
    return [
        f"rope_scaling has the {name} {json.dumps(scaling[name])}, which these programs do not train beside the rest; "
        f"set it to {json.dumps(other)} or remove it"
        for name, other in others.items()
        if scaling.get(name) not in (None, other)
    ]


def shape_problems(config: LlamaConfig) -> list[str]:
    """One line for each pair of sizes that do not fit together, or where rotary embeddings are no numbers."""
    problems = []
    hidden, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    if hidden % heads or heads % kv_heads:
        problems.append(f"hidden size {hidden}, {heads} heads and {kv_heads} key-value heads do not divide one another")
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


def mixed_length_problem(config: LlamaConfig, max_length: int) -> str | None:
    """The problem of rotary frequencies that depend on the longest sequence of a batch, where lengths differ.

    A sequence would then be trained otherwise beside a longer one, and no two layouts alike.
    """
    least = getattr(config, "original_max_position_embeddings", config.max_position_embeddings)
    if (config.rope_scaling or {}).get("rope_type") != "longrope" or max_length <= least:
        return None
    return (
        f"--max_length: {max_length} is above {least}, from where on rope_scaling longrope has other frequencies for a "
        f"whole batch; with documents or examples of several lengths give at most {least}"
    )
