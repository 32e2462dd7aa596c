"""Layers split over tensor- and sequence-parallel ranks, compared with transformers' own model in plain PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from attn import EAGER, TORCH_FUSED
from engine.shards import initialize_weights, local_shards
from engine.step import forward_backward, optimizer_step
from model_utils import ParameterSpec, initial_weight, load_config
from processes import boosted, run_ranks

pytestmark = pytest.mark.slow

EVEN, ODD = (4, 24), (3, 25)  # sequences and their length


def sequences(shape: tuple[int, int]) -> torch.Tensor:
    return torch.randint(load_config("test").vocab_size, shape, generator=torch.Generator().manual_seed(0))


def plain_step(shape: tuple[int, int], changes: dict) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the summed loss, and the float32 gradients of the mean."""
    config = load_config("test")
    config.update(changes)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_weight(ParameterSpec(name, parameter.shape), config, 42, torch.device("cpu")))
    ids = sequences(shape)
    loss = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    loss.backward()
    return loss.item(), {name: parameter.grad / ids[:, 1:].numel() for name, parameter in model.named_parameters()}


def step(
    flags: str, shape: tuple[int, int], changes: dict, gradients: dict[str, torch.Tensor]
) -> tuple[float, dict[str, float]]:
    """Return this rank's loss, and the relative error of its part of each gradient."""
    run = boosted(f"{flags} -b {shape[0]} --gradient_clipping 0", **changes)
    initialize_weights(run)
    ids = sequences(shape)
    loss = forward_backward(run, [{"input_ids": ids, "labels": ids}], ids[:, 1:].numel()).item()
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
    ("ranks", "flags", "shape", "changes"),
    [
        (2, "--tp 2 --pp 1", EVEN, {}),
        (2, "--tp 2 --pp 1", ODD, BIASED),
        (2, "--tp 2 --pp 1 -g", EVEN, {"_attn_implementation": EAGER, **BIASED}),
        (2, "--tp 1 --pp 1 --sp 2", EVEN, {"num_key_value_heads": 2}),
        (4, "--tp 2 --pp 1 --sp 2 --recompute 0.5", EVEN, {"num_key_value_heads": 4, "attention_bias": True}),
        (4, "--tp 2 --pp 2 --zero 0", ODD, {}),
    ],
)
def test_loss_and_gradients_are_those_of_the_whole_model(ranks, flags, shape, changes, compiled):
    changes = {"_attn_implementation": TORCH_FUSED, **changes}
    loss, gradients = plain_step(shape, changes)
    results = run_ranks(ranks, step, f"-p hybrid_parallel -x fp32 {flags} {compiled}", shape, changes, gradients)
    total = sum(own for own, _ in results)
    copies = 2 if "--tp 2" in flags else 1
    assert total / copies == pytest.approx(loss, rel=1e-5)
    for _, errors in results:
        assert max(errors.values()) < 1e-4, errors
