"""Restored optimizer states compared in full on every rank, with padding and empty parts, and the next update.

The models are so small that many ranks hold no element of some parameters.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from colossalai.zero import LowLevelZeroOptimizer
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from checkpointing.adapters import MODULES
from checkpointing.folder import read_running_states
from checkpointing.reader import load_checkpoint
from checkpointing.writer import CheckpointWriter, Retention
from engine import shards
from engine.boost import Engine
from engine.job import Job
from engine.shards import MASTER, MOMENTS
from engine.step import forward_backward, optimizer_step
from model_utils import build_model, plain_name, trained_specs
from processes import boosted, run_ranks

pytestmark = pytest.mark.slow

KEYS = (MASTER, *MOMENTS)
ZERO, HYBRID = "-p zero2 -b 2", "-p hybrid_parallel -b 2"
TINY = {
    "hidden_size": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 2,
    "intermediate_size": 6,
    "num_hidden_layers": 2,
    "vocab_size": 64,
    "tie_word_embeddings": False,
}
LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}


def tiny(flags: str, changes: dict[str, Any]) -> Engine:
    changes = TINY | changes
    if "adapters" in changes:
        changes["adapters"] = LoraConfig(**changes["adapters"], base_model_name_or_path="tiny")
    engine = boosted(f"{flags} --lr 1e-2", **changes)
    for number, parameter in enumerate(shards.frozen_parameters(engine.model).values()):
        parameter.data.copy_(random(number, parameter.shape))
    return engine


def random(seed: int, shape: torch.Size) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / 4


def random_states(job: Job) -> dict[str, torch.Tensor]:
    """Return full master weights and moments by 'parameter.key', always the same."""
    states = {}
    for number, spec in enumerate(trained_specs(job.config, job.adapters)):
        values = [random(3 * number + place, spec.shape) for place in range(3)]
        named = zip(KEYS, (values[0], values[1] / 50, values[2].square() / 50), strict=True)
        states |= {f"{spec.name}.{key}": value for key, value in named}
    return states


def restore_random(engine: Engine, adam_steps: int) -> None:
    states = random_states(engine.job)
    shards.restore(engine, lambda name, key: states[f"{name}.{key}"], adam_steps)


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(64, (2, 32), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def train(engine: Engine, steps: int) -> int:
    """Take steps on one batch, the same on all ranks; return the number of steps that fp16 did not skip."""
    updates = 0
    for _ in range(steps):
        forward_backward(engine, [batch()], label_tokens=2 * 31 * engine.layout.dp)
        _, skipped = optimizer_step(engine)
        updates += not skipped
    return updates


def assert_states(engine: Engine, expected: dict[str, torch.Tensor], adam_steps: int, tolerance: float = 0) -> int:
    """Compare this rank's entire optimizer state with full tensors; return the number of its empty parts."""
    adam = engine.optimizer.optim
    owned = [parameter for group in adam.param_groups for parameter in group["params"]]
    steps = [adam.state[parameter].get("step", 0) for parameter in owned]
    assert steps == [adam_steps] * len(owned)  # on a GPU Adam uses the last one for all
    empty = 0
    for shard in shards.local_shards(engine):
        ranks, number = dist.get_world_size(shard.data_group), dist.get_rank(shard.data_group)
        start, stop = shard.start, shard.stop
        if isinstance(engine.optimizer, LowLevelZeroOptimizer):
            size = -(-shard.tp_shape.numel() // ranks)
            assert (start, stop) == tuple(min(place * size, shard.tp_shape.numel()) for place in (number, number + 1))
        empty += start == stop
        for key in KEYS if adam_steps else (MASTER,):
            whole = expected[f"{shard.spec.name}.{key}"]
            if shard.split_dim is not None:
                whole = whole.chunk(shard.tp_size, shard.split_dim)[shard.tp_rank]
            found = shard.storage if key == MASTER else shard.adam_state.get(key, torch.empty(0))
            wanted = F.pad(whole.flatten()[start:stop], (0, shard.storage.numel() - (stop - start)))
            assert found.numel() == wanted.numel(), (shard.spec.name, key)
            error = (found.flatten() - wanted).norm()
            assert error <= tolerance * wanted.norm(), (shard.spec.name, key, error.item(), wanted.norm().item())
    return int(empty)


# -------------------------------------------------------------------------------------- every layout in every other


def layouts(ranks: int) -> st.SearchStrategy[tuple[str, dict]]:
    """Return a strategy for the flags of a layout of so many ranks."""
    one = "--tp 1 --pp 1"
    found = [
        st.sampled_from([f"{ZERO} -x {precision}" for precision in ("fp32", "bf16", "fp16")]),
        st.sampled_from(["-p zero2_cpu -b 2 -x bf16", "-p gemini -b 2 -x bf16", "-p gemini -b 2 -x fp16"]),
        st.sampled_from([f"{HYBRID} {one} --zero {zero} -x bf16" for zero in (0, 1, 2)]),
    ]
    if ranks % 2 == 0:
        split = [
            f"{HYBRID} --tp 2 --pp 1 --zero 0",
            f"{HYBRID} --tp 2 --pp 1 --zero 1",
            f"{HYBRID} --tp 1 --pp 2 --zero 1",
        ]
        split.append(f"{HYBRID} {one} --sp 2 --zero 1")
        found.append(st.sampled_from([f"{flags} -x bf16" for flags in split]))
    return st.one_of(found)


@st.composite
def cases(draw, ranks: int, other_ranks: int) -> dict[str, Any]:
    """Draw a model, a layout to save it in, another to resume it in, and the steps taken before the save."""
    model = {
        "hidden_size": draw(st.sampled_from([4, 8, 20])),
        "intermediate_size": draw(st.sampled_from([2, 6, 10])),
        "vocab_size": draw(st.sampled_from([64, 70])),
        "tie_word_embeddings": draw(st.booleans()),
    }
    flags = [draw(layouts(number)) for number in (ranks, other_ranks)]
    whole = all("tp 2" not in text and "pp 2" not in text and "sp 2" not in text for text in flags)
    if whole and not any("gemini" in text for text in flags) and draw(st.booleans()):
        modules = st.lists(st.sampled_from(MODULES), min_size=1, unique=True)
        model["adapters"] = {"r": draw(st.integers(1, 3)), "target_modules": draw(modules), "task_type": "CAUSAL_LM"}
    if any("pp 2" in text for text in flags):
        model["tie_word_embeddings"] = False
    adam_steps, trained = draw(st.sampled_from([0, 1, 2, 999])), draw(st.integers(0, 2))
    return {"model": model, "flags": flags, "adam_steps": adam_steps, "trained": trained}


@given(st.data())
@settings(
    max_examples=4,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],  # each example takes seconds
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_any_layout_resumes_from_any_other(tmp_path_factory, data):
    """Save three checkpoints per example, and compare each with its files in both layouts."""
    ranks, other_ranks = (data.draw(st.sampled_from([1, 2, 3, 4, 6]), label=label) for label in ("saved", "resumed"))
    drawn = data.draw(st.lists(cases(ranks, other_ranks), min_size=3, max_size=3), label="cases")
    folder = tmp_path_factory.mktemp("checkpoints")
    run_ranks(ranks, save_cases, folder, drawn)
    run_ranks(other_ranks, load_cases, folder, drawn)


def save_cases(folder, drawn):
    for number, case in enumerate(drawn):
        engine, steps = tiny(case["flags"][0], case["model"]), case["adam_steps"]
        restore_random(engine, steps)
        assert_states(engine, random_states(engine.job), steps)
        updates = train(engine, case["trained"])
        writer = CheckpointWriter(folder / str(number), engine, Retention())
        writer.save({"epoch": 0, "step": 1, "adam_steps": steps + updates})
        writer.wait()
        assert_states(engine, saved_states(writer.latest), steps + updates)


def load_cases(folder, drawn):
    for number, case in enumerate(drawn):
        checkpoint = folder / str(number) / "epoch0-step1"
        engine = tiny(case["flags"][1], case["model"])
        load_checkpoint(checkpoint, engine)
        assert_states(engine, saved_states(checkpoint), read_running_states(checkpoint)["adam_steps"])


def saved_states(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return all optimizer tensors of a checkpoint, as safetensors reads them."""
    states: dict[str, torch.Tensor] = {}
    for file in (checkpoint / "optimizer").iterdir():
        states |= load_file(file)
    return states


# ------------------------------------------------------------------------------------------------------ the next update

LAYOUTS = [
    (6, f"{ZERO} -x bf16", {"tie_word_embeddings": True}),
    (3, "-p zero2_cpu -b 2 -x fp32", {}),
    (3, "-p gemini -b 2 -x bf16", {"tie_word_embeddings": True}),
    (2, f"{HYBRID} --tp 1 --pp 1 --zero 0 -x bf16", {}),
    (6, f"{HYBRID} --tp 1 --pp 2 --zero 1 -x bf16", {}),
    (3, f"{ZERO} -x fp32", {"adapters": LORA | {"r": 1, "target_modules": ["q_proj"]}}),
]


@pytest.mark.parametrize(("ranks", "flags", "changes"), LAYOUTS)
def test_an_update_after_a_resume_is_adamw_at_that_step(ranks, flags, changes):
    empty = run_ranks(ranks, check_next_update, flags, changes)
    assert any(empty) or "--zero 0" in flags


def check_next_update(flags, changes):
    engine, adam_steps = tiny(flags, changes), 7
    restore_random(engine, adam_steps)
    empty = assert_states(engine, random_states(engine.job), adam_steps)
    train(engine, 1)
    reference = reference_update(engine, random_states(engine.job), adam_steps)
    before, tolerance = random_states(engine.job), 1e-4 if "fp32" in flags else 0.08
    assert_states(engine, reference, adam_steps + 1, tolerance)
    # An update is small compared with the weights, so compare it separately too.
    for shard in shards.local_shards(engine):
        name = f"{shard.spec.name}.{MASTER}"
        update, expected = (shard.tensor(MASTER) - shard.read(before[name])), shard.read(reference[name] - before[name])
        assert (update - expected).norm() <= tolerance * expected.norm(), name
    return empty


def reference_update(engine: Engine, states: dict[str, torch.Tensor], adam_steps: int) -> dict[str, torch.Tensor]:
    """Return the states after one step of plain PyTorch on the whole model in float32."""
    config, optimization = engine.config, engine.job.optimization
    model: Any = build_model(config, torch.device("cpu"))
    if engine.job.adapters:
        model = get_peft_model(model, engine.job.adapters)
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    for number, parameter in enumerate(frozen):
        parameter.data.copy_(random(number, parameter.shape))
    trained = {plain_name(name): value for name, value in model.named_parameters() if value.requires_grad}
    adam = torch.optim.AdamW(
        trained.values(), optimization.lr, optimization.adam_betas, weight_decay=optimization.weight_decay
    )
    for name, parameter in trained.items():
        parameter.data.copy_(states[f"{name}.{MASTER}"])
        adam.state[parameter] = {key: states[f"{name}.{key}"].clone() for key in MOMENTS}
        adam.state[parameter]["step"] = torch.tensor(float(adam_steps))
    logits = model(batch()["input_ids"]).logits[:, :-1].flatten(0, 1)
    F.cross_entropy(logits, batch()["labels"][:, 1:].flatten()).backward()
    torch.nn.utils.clip_grad_norm_(trained.values(), optimization.gradient_clipping)
    adam.step()
    return {
        f"{name}.{key}": (parameter if key == MASTER else adam.state[parameter][key]).detach()
        for name, parameter in trained.items()
        for key in KEYS
    }
