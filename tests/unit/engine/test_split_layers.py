"""Layers split over tensor- and sequence-parallel ranks, compared with transformers' own model in plain PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from attn import EAGER, TORCH_FUSED
from engine import split_layers
from engine.shards import initialize_weights, local_shards
from engine.step import forward_backward, optimizer_step
from model_utils import ParameterSpec, initial_weight, load_config
from processes import boosted, run_ranks

pytestmark = pytest.mark.slow

BATCH, LENGTH = 4, 24


def sequences() -> torch.Tensor:
    return torch.randint(load_config("test").vocab_size, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))


def plain_step(changes: dict) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the summed loss, and the float32 gradients of the mean."""
    config = load_config("test")
    config.update(changes)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_weight(ParameterSpec(name, parameter.shape), config, 42, torch.device("cpu")))
    ids = sequences()
    loss = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    loss.backward()
    tokens = BATCH * (LENGTH - 1)
    return loss.item(), {name: parameter.grad / tokens for name, parameter in model.named_parameters()}


def step(flags: str, changes: dict, gradients: dict[str, torch.Tensor]) -> tuple[float, dict[str, float]]:
    """Return this rank's loss, and the relative error of its part of each gradient."""
    split_layers.WORTHWHILE = 8  # products in parts
    run = boosted(f"{flags} -b {BATCH} --gradient_clipping 0", **changes)
    initialize_weights(run)
    ids = sequences()
    loss = forward_backward(run, [{"input_ids": ids, "labels": ids}], BATCH * (LENGTH - 1)).item()
    optimizer_step(run)
    errors = {}
    for shard in local_shards(run):
        if shard.start < shard.stop:
            expected = shard.read(gradients[shard.spec.name])
            errors[shard.spec.name] = ((10 * shard.tensor("exp_avg") - expected).norm() / expected.norm()).item()
    return loss, errors


BIASED = {"attention_bias": True, "mlp_bias": True}


@pytest.mark.parametrize("compiled", ["", "--compile"])
@pytest.mark.parametrize(
    ("ranks", "flags", "changes"),
    [
        (2, "--tp 2 --pp 1", {}),
        (2, "--tp 2 --pp 1 -g", {"_attn_implementation": EAGER, **BIASED}),
        (2, "--tp 1 --pp 1 --sp 2", {"num_key_value_heads": 2}),
        (4, "--tp 2 --pp 1 --sp 2 --recompute 0.5", {"num_key_value_heads": 4, "attention_bias": True}),
        (4, "--tp 2 --pp 2 --zero 0", {}),
    ],
)
def test_loss_and_gradients_are_those_of_the_whole_model(ranks, flags, changes, compiled):
    changes = {"_attn_implementation": TORCH_FUSED, **changes}
    loss, gradients = plain_step(changes)
    results = run_ranks(ranks, step, f"-p hybrid_parallel -x fp32 {flags} {compiled}", changes, gradients)
    total = sum(own for own, _ in results)
    copies = 2 if "--tp 2" in flags else 1
    assert total / copies == pytest.approx(loss, rel=1e-5)
    for _, errors in results:
        assert max(errors.values()) < 1e-4, errors
