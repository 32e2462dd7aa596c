"""The compiled pieces of the model compared with transformers' own, also on tensors of Gemini's class."""

from functools import partialmethod

import pytest
import torch
import torch.fx.traceback as fx_traceback
import torch.nn.functional as F
from colossalai.tensor.colo_tensor import ColoTensor
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._higher_order_ops import wrap
from torch.fx import Interpreter
from torch.utils.checkpoint import CheckpointPolicy, _CachingTorchDispatchMode, checkpoint
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, apply_rotary_pos_emb

from attn import TORCH_FUSED
from engine import compilation, patching
from engine.compilation import Fusion, forget_shapes, fuse
from engine.loss import summed_cross_entropy
from engine.recomputation import checkpoint_layers, recomputed
from model_utils import IGNORE_INDEX, build_model, load_config
from processes import job


@pytest.fixture(autouse=True)
def no_patch_left(monkeypatch):
    """Take back what a test patches in this process, which runs other files' tests after it."""
    monkeypatch.setattr("transformers.models.llama.modeling_llama.apply_rotary_pos_emb", apply_rotary_pos_emb)
    monkeypatch.setattr(patching, "_originals", {})
    yield
    fuse(torch.nn.Module(), Fusion.NONE)


@pytest.fixture(params=[Fusion.NONE, Fusion.PIECES], ids=["as written", "compiled"])
def stance(request):
    fuse(torch.nn.Module(), request.param)
    return request.param


def bf16(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.bfloat16).requires_grad_()


def assert_alike(ours, theirs, inputs) -> None:
    """Compare value and gradients; compiled code rounds less often."""
    assert ours.dtype == theirs.dtype
    assert torch.allclose(ours, theirs, rtol=2e-2, atol=2e-3)
    weights = torch.rand_like(ours)
    for own, other in zip(
        torch.autograd.grad((ours * weights).sum(), inputs),
        torch.autograd.grad((theirs * weights).sum(), inputs),
        strict=True,
    ):
        assert own.dtype == other.dtype
        assert (own - other).norm() < 1e-2 * other.norm()


def test_norm(stance):
    norm, hidden = LlamaRMSNorm(64).bfloat16(), bf16(3, 5, 64)
    assert_alike(compilation._rms_norm(norm, hidden), norm(hidden), (hidden, norm.weight))


def test_mlp(stance):
    mlp, hidden = LlamaMLP(load_config("test")).bfloat16(), bf16(3, 5, 64)
    assert_alike(compilation._mlp(mlp, hidden), mlp(hidden), (hidden, *mlp.parameters()))


def test_rotary(stance):
    query, key = bf16(2, 4, 5, 16), bf16(2, 2, 5, 16, seed=1)
    cos, sin = bf16(1, 5, 16, seed=2).detach(), bf16(1, 5, 16, seed=3).detach()
    for index, rotated in enumerate((query, key)):
        ours, theirs = (rotary(query, key, cos, sin)[index] for rotary in (compilation._rotary, apply_rotary_pos_emb))
        assert_alike(ours, theirs, (rotated,))


@pytest.mark.parametrize("at_a_time", [2**24, 100])  # 100: two rows
@pytest.mark.parametrize("compiled", [True, False])
def test_loss_is_computed_in_float32_and_skips_ignored_labels(stance, compiled, at_a_time, monkeypatch):
    monkeypatch.setattr("engine.loss.EAGER_LOGITS", at_a_time)
    logits, targets = bf16(7, 50), torch.tensor([3, IGNORE_INDEX, 0, 49, 1, IGNORE_INDEX, 2])
    loss = summed_cross_entropy(logits, targets, compiled=compiled)
    counted = targets != IGNORE_INDEX
    expected = F.cross_entropy(logits.double()[counted], targets[counted], reduction="sum")
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    (other,) = torch.autograd.grad(3 * expected, logits)
    (gradient,) = torch.autograd.grad(3 * loss, logits)
    assert torch.allclose(gradient, other.to(gradient.dtype), rtol=1e-2, atol=1e-4)
    assert gradient.data_ptr() == logits.data_ptr()  # written over them


def test_precision_is_kept_on_geminis_tensors(stance):
    hidden = bf16(3, 5, 64).detach().as_subclass(ColoTensor)
    assert compilation._rms_norm(LlamaRMSNorm(64).bfloat16(), hidden).dtype == torch.bfloat16


@pytest.mark.parametrize("fusion", [Fusion.PIECES, Fusion.LAYERS])
def test_lengths_that_differ_compile_twice_at_most(fusion, monkeypatch):
    """Compile for the first length, then once for all others: fine-tuning pads each batch to its longest sequence."""
    monkeypatch.setattr("transformers.models.llama.modeling_llama.apply_rotary_pos_emb", apply_rotary_pos_emb)
    config = load_config("test")
    config.num_hidden_layers, config._attn_implementation = 1, "sdpa"
    model = build_model(config, torch.device("cpu"))
    torch._dynamo.reset()
    counters.clear()
    fuse(model, fusion)
    compiled = []
    for number in range(30):
        ids = torch.zeros(2, 8 * (7 * number % 30 + 1), dtype=torch.int64)
        summed_cross_entropy(model(ids).logits.flatten(0, 1), ids.flatten(), compiled=True).backward()
        compiled.append(counters["stats"]["unique_graphs"])
    assert 2 <= compiled[0] <= 5
    assert compiled[-1] <= 2 * compiled[0]


def test_other_lengths_are_compiled_for_alone_after_a_stage():
    """Code for any length would compute other bits than that of a process that resumes with one length."""
    general = []

    def backend(module, inputs):
        sizes = [node.meta["example_value"] for node in module.graph.nodes if node.op == "placeholder"]
        general.append(any(isinstance(size, torch.SymInt) for size in sizes))
        return module.forward

    double = torch.compile(lambda values: values.sin() * 2, backend=backend)
    torch._dynamo.reset()
    fuse(torch.nn.Module(), Fusion.PIECES)
    for length in (8, 16):
        double(torch.zeros(length))
    forget_shapes(Fusion.PIECES)
    double(torch.zeros(24))
    assert general == [False, True, False]


PRODUCT = torch.ops.aten.mm.default
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def operations(monkeypatch, flags: str, compiled: bool) -> tuple[dict[str, list[tuple[int, int]]], list[torch.Tensor]]:
    """Return matrix products and attentions in each compiled graph of four recomputed layers, and the gradients."""
    found: dict[str, list[tuple[int, int]]] = {"forward": [], "backward": []}

    def counted(of: str):
        def compiler(module, inputs):
            nodes = [(node.target, *node.args) for node in module.graph.nodes]  # operators with a seed wrap another one
            found[of].append(tuple(sum(operator in node for node in nodes) for operator in (PRODUCT, ATTENTION)))
            return make_boxed_func(module.forward)

        return compiler

    torch.manual_seed(0)
    config = load_config("test")
    config._attn_implementation = TORCH_FUSED
    model = build_model(config, torch.device("cpu"), torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    checkpoint_layers(job(flags), model.train())
    backend = aot_autograd(
        fw_compiler=counted("forward"),
        bw_compiler=counted("backward"),
        partition_fn=min_cut_rematerialization_partition,
    )
    if compiled:
        torch.compiler.set_stance("default")
        monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend=backend))
        compilation.compile_layers(model)
    model(torch.arange(64).view(2, 32)).logits.square().mean().backward()
    return found, [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize(("flags", "attentions"), [("-g", 1), ("-g -a --keep_attention", 0)])
def test_a_recomputed_layer_skips_its_last_product_and_kept_attention(monkeypatch, flags, attentions):
    found, gradients = operations(monkeypatch, flags, compiled=True)
    assert found == {"forward": [(7, 1)], "backward": [(2 * 7 + 6, attentions)]}
    for ours, theirs in zip(gradients, operations(monkeypatch, "-g", compiled=False)[1], strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-6)


class Product(torch.autograd.Function):
    """A matrix product as those of float8 and of tensor parallelism are written."""

    @staticmethod
    def forward(ctx, left, right):
        ctx.save_for_backward(left, right)
        return left @ right

    @staticmethod
    def backward(ctx, gradient):
        left, right = ctx.saved_tensors
        return gradient @ right.t(), left.t() @ gradient


def marked_as_by_torch_2_11(module, *inputs, **options):
    """Mark what is recomputed as torch 2.11 does: the operations of this graph, and not those of functions in it."""
    with fx_traceback.preserve_node_meta():
        if context := module.meta.get("_checkpoint_context_fn"):
            options |= {"preserve_rng_state": False, "context_fn": context}
            return checkpoint(Interpreter(module).run, *inputs, **options)
        for node in module.graph.nodes:
            node.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
        return Interpreter(module).run(*inputs)


@pytest.mark.parametrize("old", [False, True])
def test_products_of_autograd_functions_are_recomputed(monkeypatch, old):
    if old:
        monkeypatch.setattr(wrap, "tag_activation_checkpoint_impl", marked_as_by_torch_2_11, raising=False)
        monkeypatch.setattr(
            _CachingTorchDispatchMode, "ac_graph_id", property(lambda self: 0, lambda self, value: None), raising=False
        )
    kept = []

    def forward_compiler(module, inputs):
        outputs = next(node for node in module.graph.nodes if node.op == "output").args[0]
        kept.extend(output for output in outputs if output.op != "placeholder")
        return make_boxed_func(module.forward)

    def backward_compiler(module, inputs):
        return make_boxed_func(module.forward)

    backend = aot_autograd(
        fw_compiler=forward_compiler,
        bw_compiler=backward_compiler,
        partition_fn=min_cut_rematerialization_partition,
    )
    weights = [torch.randn(8, 8, requires_grad=True) for _ in range(3)]

    def layer(hidden):
        for weight in weights:
            hidden = Product.apply(hidden, weight).sin()
        return hidden

    torch.compiler.set_stance("default")
    compiled = torch.compile(lambda hidden: recomputed(layer, hidden), backend=backend)
    compiled(torch.randn(4, 8, requires_grad=True)).sum().backward()
    assert len(kept) == 1  # the result itself


def test_layers_or_pieces():
    model = build_model(load_config("test"), torch.device("meta"))
    norm, layer = model.model.layers[0].input_layernorm, model.model.layers[0]
    fuse(model, Fusion.LAYERS)
    assert layer._compiled_call_impl is not None
    assert "forward" not in vars(norm)
    other = build_model(load_config("test"), torch.device("meta"))
    fuse(other, Fusion.PIECES)
    assert vars(other.model.layers[0].mlp)["forward"].__func__ is compilation._mlp
    assert other.model.layers[0]._compiled_call_impl is None
