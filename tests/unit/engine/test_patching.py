"""The patches of ColossalAI, torch and transformers, and the sources that they were written for."""

import ast
import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from colossalai.nn.optimizer import HybridAdam
from colossalai.zero.gemini.memory_tracer import ChunkMemStatsCollector
from colossalai.zero.gemini.placement_policy import AutoPlacementPolicy

from engine import compilation, gemini, patching, shards
from engine.compilation import Fusion
from engine.launch import shut_down
from engine.patching import digest, digests, full_name, replace, source_object
from engine.step import forward_backward, optimizer_step
from processes import boosted, run_ranks
from runtime.console import InputError

TABLE = Path(__file__).with_name("patched.sha256")
READ = {name: digest for digest, name in map(str.split, TABLE.read_text().splitlines())}
WITH_A_GPU = {full_name(HybridAdam)}  # patched there only
HYBRID = "-p hybrid_parallel --pp 1 --tp 1"
RUNS = [  # together they apply every patch
    (2, "-p zero2 -x fp16 -g", ""),
    (1, f"{HYBRID} --zero 0 -x fp16", "pieces"),
    (2, f"{HYBRID} --zero 1", ""),
    (2, "-p hybrid_parallel --tp 1 --pp 2 --pp_style interleaved", ""),
    (1, "-p gemini -x fp16", "layers"),
    (1, "-p gemini", "automatic placement"),
    (2, "-p gemini --accumulation_steps 2 --exchange step", ""),
]
OWN_FIELDS = {  # of our classes; gradients; marks that our code leaves on models, and options of a plugin
    *("gradient", "gradient_norm", "reducer", "summed", "parts", "updated", "divisor", "grad", "data"),
    *("checkpoint_function", "checkpointed", "__class__", "name_or_path", "make_vocab_size_divisible_by"),
    *("recompile_limit", "deterministic", "fill_uninitialized_memory"),  # settings of torch's, meant to be set
    *("rowwise", "weight8", "weight_scale", "stored"),  # of linear layers in float8
    *("_growth_step", "_hysteresis_step"),  # the state of a loss scaler, from a checkpoint
}


def replaced(flags: str, prepare: str) -> dict[str, str]:
    """Return the digests of all originals that a run replaces: start, a step, one that overflows in fp16, and end."""
    run = boosted(f"{flags} -b 2")
    shards.initialize_weights(run)
    if prepare == "pieces":
        compilation.fuse(run.model, Fusion.PIECES)
    elif prepare == "layers":
        gemini.compile_layers(run.model)
        gemini.reduce_norm_over_tensor_parallel(run.optimizer, torch.distributed.group.WORLD)  # as with --tp
    elif prepare == "automatic placement":  # which trains on a GPU only
        manager, chunks = run.model.gemini_manager, run.model.chunk_manager
        manager._mem_stats_collector = ChunkMemStatsCollector(chunks)
        manager._placement_policy = AutoPlacementPolicy(chunks, manager._mem_stats_collector)
        gemini.prefetch_only_in_training(run.model)
        gemini.reset_memory_plan_each_pass(run.model)
        manager.reset_attributes()
        return digests()
    torch.compiler.set_stance("force_eager")
    ids = torch.randint(run.config.vocab_size, (2, 32))
    for label_tokens in (62, 1e-6):
        forward_backward(run, [{"input_ids": ids, "labels": ids}] * run.job.batch.accumulation_steps, label_tokens)
        optimizer_step(run)
    torch.distributed.destroy_process_group = lambda *_: None  # run_ranks ends with a barrier
    shut_down(run.plugin)
    return digests()


def resolve(name: str):
    """Return the module, function or class that a name in the table stands for."""
    found = pkgutil.resolve_name(name)
    return source_object(found) or found


class TestSources:
    def test_are_those_that_the_patches_were_written_for(self):
        changed = [name for name in READ if digest(resolve(name)) != READ[name]]
        assert not changed, (
            f"the installed packages changed {changed}: review the patches of these in engine/, "
            f"then write the new digests into {TABLE.name}"
        )

    @pytest.mark.slow
    def test_of_all_patches_are_in_the_table(self):
        found = {}
        for run in RUNS:
            for recorded in run_ranks(run[0], replaced, *run[1:]):
                found |= recorded
        assert found == {name: digest for name, digest in READ.items() if name not in WITH_A_GPU}

    def test_that_change_have_another_digest(self, tmp_path, monkeypatch):
        monkeypatch.syspath_prepend(tmp_path)
        source = "class Colossal:\n    def step(self):\n        return 1\n"
        seen = set()
        for text in (source, source.replace("1", "2")):
            (tmp_path / f"patched_{len(seen)}.py").write_text(text)
            importlib.invalidate_caches()
            module = importlib.import_module(f"patched_{len(seen)}")
            seen |= {digest(module.Colossal), digest(module.Colossal.step)}
        assert len(seen) == 4


class TestReplace:
    @pytest.mark.parametrize("target", [ChunkMemStatsCollector, ChunkMemStatsCollector.__new__(ChunkMemStatsCollector)])
    def test_refuses_a_missing_name(self, target):
        message = r"ChunkMemStatsCollector has no attribute '_steps_idx' to replace; colossalai 0\.5\.0 is installed"
        with pytest.raises(InputError, match=message):
            replace(target, "_steps_idx", 0)
        assert not hasattr(target, "_steps_idx")

    def test_refuses_one_that_a_module_lacks(self):
        with pytest.raises(InputError, match=r"torch\.distributed has no attribute 'gone' .* torch 2\..* is installed"):
            replace(torch.distributed, "gone", print)


def functions_around(module: ast.Module) -> Iterator[tuple[ast.AST, list[ast.AST]]]:
    """Yield each node of a module with the module, classes and functions around it."""
    stack: list[tuple[ast.AST, list[ast.AST]]] = [(module, [])]
    while stack:
        node, around = stack.pop()
        yield node, around
        inner = [*around, node] if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) else around
        stack += [(child, inner) for child in ast.iter_child_nodes(node)]


MODULES = sorted(Path(patching.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
class TestModules:
    def test_patch_only_through_replace(self, path):
        """Allow assignments only to attributes of `self` and to our own fields; `replace` does not see others."""
        targets = [
            node
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and node.attr not in OWN_FIELDS
        ]
        own = ("self", "ctx")  # ctx is autograd's, of our functions
        foreign = [ast.unparse(node) for node in targets if ast.unparse(node.value) not in own]
        assert not foreign
        assert path.stem == "patching" or "setattr(" not in path.read_text()

    def test_head_each_patch(self, path):
        for node, around in functions_around(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "replace":
                texts = " ".join(ast.get_docstring(outer) or "" for outer in around)
                for heading in ("Symptom:", "Cause:", "Fix:", "Remove when:"):
                    assert heading in texts, f"{path.name}:{node.lineno} has no {heading}"


def test_importing_patches_nothing():
    """Check this process, which has imported all modules with patches; the tests apply them in other processes."""
    assert digests() == {}
