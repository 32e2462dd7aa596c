"""Products in float8: their error against float64, and training in every layout against plain PyTorch in float32."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from peft import LoraConfig
from torch.autograd.graph import saved_tensors_hooks
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from attn import TORCH_FUSED
from engine import device, float8
from engine.boost import Engine
from engine.job import Compute
from engine.shards import MASTER, initialize_weights, local_shards
from engine.step import forward_backward, optimizer_step
from model_utils import ParameterSpec, initial_weight, load_config
from processes import boosted, job, run_ranks

RECIPES = ["tensorwise", "rowwise"]
# Relative rounding errors of normal numbers, uniform in the mantissa, are 2^-(m+1)/sqrt(3) times 1.4 at most: 0.026 for
# e4m3 (m = 3) and 0.05 for e5m2. A product of two such matrices has the root of the sum of squares.
BOTH_E4M3, WITH_E5M2 = 0.04, 0.065
LENGTH = 32


def relative(ours: torch.Tensor, right: torch.Tensor) -> float:
    return ((ours.double() - right).norm() / right.norm()).item()


@pytest.fixture(autouse=True)
def eager(request):
    """Compile nothing, except in the test of it."""
    torch.compiler.set_stance("default" if "compile" in request.node.name else "force_eager")
    yield
    torch.compiler.set_stance("default")


class TestLinear:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("tokens", [64, 50])  # the second is not divisible by 16
    @pytest.mark.parametrize("rowwise", [False, True])
    def test_errors_are_those_of_rounding(self, tokens, rowwise, dtype):
        hidden = torch.randn(2, tokens // 2, 96).to(dtype).requires_grad_()
        weight = (torch.randn(112, 96) / 50).to(dtype).requires_grad_()
        gradient = (torch.randn(2, tokens // 2, 112) * 1e-3).to(dtype)
        wide = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
        right = F.linear(*wide)
        right.backward(gradient.double())
        output = float8.linear(hidden, weight, rowwise)
        output.backward(gradient)
        assert output.dtype == hidden.grad.dtype == weight.grad.dtype == dtype
        assert 0.02 < relative(output, right) < BOTH_E4M3
        for ours, theirs in zip((hidden, weight), wide, strict=True):
            assert 0.02 < relative(ours.grad, theirs.grad) < (BOTH_E4M3 if rowwise else WITH_E5M2)

    @pytest.mark.parametrize("tokens", [1, 50])
    @pytest.mark.parametrize("rowwise", [False, True])
    def test_kernels_get_the_sizes_that_a_gpu_takes(self, rowwise, tokens, monkeypatch):
        """All but the rows of the left matrix must be divisible by 16; the CPU's kernel takes any size."""
        multiply, sizes = torch._scaled_mm, []

        def recorded(left: torch.Tensor, right: torch.Tensor, *args, **kwargs) -> torch.Tensor:
            sizes.append((*left.shape[1:], *right.shape))
            return multiply(left, right, *args, **kwargs)

        monkeypatch.setattr(torch, "_scaled_mm", recorded)
        hidden, weight = (torch.randn(rows, 96).bfloat16().requires_grad_() for rows in (tokens, 112))
        float8.linear(hidden, weight, rowwise).sum().backward()
        assert len(sizes) == 3
        assert not any(size % 16 for found in sizes for size in found)

    @pytest.mark.parametrize("magnitude", [1e-25, 1e-12, 1e12])
    @pytest.mark.parametrize("rowwise", [False, True])
    def test_any_magnitude_has_the_same_error(self, rowwise, magnitude):
        """Gradients of a mean over millions of tokens are tiny."""
        hidden, weight = torch.randn(32, 64).bfloat16().requires_grad_(), torch.randn(48, 64).bfloat16()
        gradient = (torch.randn(32, 48) * magnitude).bfloat16()
        float8.linear(hidden, weight, rowwise).backward(gradient)
        assert relative(hidden.grad, gradient.double() @ weight.double()) < WITH_E5M2

    @pytest.mark.parametrize("value", [torch.inf, torch.nan])
    @pytest.mark.parametrize("rowwise", [False, True])
    def test_what_is_not_finite_stays_so(self, rowwise, value):
        hidden, weight = torch.randn(32, 64).bfloat16(), torch.randn(48, 64).bfloat16()
        hidden[3, 5] = value
        assert not float8.linear(hidden, weight, rowwise)[3].isfinite().any()

    def test_rows_have_their_own_scale(self):
        """One row is larger by more than the range of e4m3."""
        hidden, weight = torch.randn(32, 64).bfloat16(), torch.randn(48, 64).bfloat16()
        hidden[0] *= 1e7
        right = hidden.double() @ weight.double().t()
        whole, each = (float8.linear(hidden, weight, rowwise) for rowwise in (False, True))
        assert not whole[1:].any()
        assert relative(each[1:], right[1:]) < BOTH_E4M3

    def test_zeros(self):
        hidden = torch.zeros(32, 64).bfloat16().requires_grad_()
        output = float8.linear(hidden, torch.zeros(48, 64).bfloat16(), False)
        output.backward(torch.zeros(32, 48).bfloat16())
        assert not output.any()
        assert not hidden.grad.any()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_layer_compiles_as_one_graph_and_keeps_less(recipe):
    config = load_config("test")
    config._attn_implementation = "sdpa"
    kept = []
    for fp8 in (False, True):
        torch.compiler.reset()
        layer = LlamaDecoderLayer(config, 0).bfloat16()
        float8.convert(layer, Compute(fp8=fp8, fp8_recipe=recipe))
        hidden = torch.randn(2, 64, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        positions = LlamaRotaryEmbedding(config)(hidden, torch.arange(64)[None])
        layer.compile(fullgraph=True, backend="aot_eager_decomp_partition")
        output = layer(hidden, position_embeddings=positions)[0]
        weights = {parameter.data_ptr() for parameter in layer.parameters()}
        saved = [tensor for tensor in output.grad_fn.saved_tensors if tensor.data_ptr() not in weights]
        kept.append(sum(tensor.nbytes for tensor in saved) / 128)  # per token
        output.sum().backward()
    h, f = config.hidden_size, config.intermediate_size
    assert kept[0] - kept[1] == pytest.approx(6 * h + 2 * f, rel=0.1)  # as planning.memory estimates


def test_varying_shapes_stay_compiled(monkeypatch):
    """torch runs a function eagerly after too many compilations, one for each shape of a weight and kind of pass."""
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    float8.convert(torch.nn.Module(), Compute(fp8=True))
    torch.compiler.reset()
    function = torch.compile(float8._Linear.apply, backend="eager")
    shapes = ((64, 64), (32, 64), (192, 64), (64, 192))
    weights = [torch.nn.Parameter(torch.randn(shape).bfloat16()) for shape in shapes]  # torch fixes parameters' sizes
    for tokens, train in ((64, True), (64, False), (48, False), (48, True), (80, True)):
        with torch.set_grad_enabled(train):
            for weight in weights:
                hidden = torch.randn(tokens, weight.shape[1]).bfloat16().requires_grad_(train)
                function(hidden, weight, False, None, None)


def plain_gradients(config, ids: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_weight(ParameterSpec(name, parameter.shape), config, 42, torch.device("cpu")))
    loss = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


def sequences() -> torch.Tensor:
    return torch.randint(1024, (8, LENGTH), generator=torch.Generator().manual_seed(0))


CHANGES = dict(intermediate_size=192, attention_bias=True, mlp_bias=True)  # divisible by 16 on two ranks


def step(flags: str, references: dict[str, torch.Tensor]) -> tuple[float, list[tuple[float, float]]]:
    """Return this rank's summed loss, and the squared errors and squares of its first moments in the layers."""
    run = boosted(f"{flags} -l {LENGTH} --gradient_clipping 0", **CHANGES)
    initialize_weights(run)
    split = run.layout.tp * run.layout.pp * run.layout.sp
    mine = sequences().chunk(run.layout.dp)[dist.get_rank() // split]
    batches = [{"input_ids": ids, "labels": ids} for ids in mine.split(run.job.batch.batch_size)]
    total = forward_backward(run, batches, 8 * (LENGTH - 1)).item()
    optimizer_step(run)
    found = []
    for shard in local_shards(run):
        if shard.start < shard.stop and "proj.weight" in shard.spec.name:
            right = shard.read(references[shard.spec.name])
            found.append((((10 * shard.tensor("exp_avg") - right) ** 2).sum().item(), (right**2).sum().item()))
    return total, found


@pytest.fixture(scope="module")
def reference():
    config = load_config("test")
    config.update(CHANGES)
    return plain_gradients(config, sequences())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (1, "-p zero2 -b 8"),
        (1, "-p zero2 -b 8 --fp8_recipe rowwise"),
        (1, "-p zero2 -b 8 -x fp16"),
        (2, "-p zero2 -b 1 --accumulation_steps 4 -g -a"),
        (1, "-p zero2_cpu -b 8 --recompute 0.5 -a --keep_attention"),
        (2, "-p gemini -b 4"),
        (2, "-p gemini -b 4 --fp8_recipe rowwise -g"),
        (1, "-p gemini_auto -b 4 --accumulation_steps 2"),
        (2, "-p hybrid_parallel --tp 2 --pp 1 -b 8"),
        (2, "-p hybrid_parallel --tp 2 --pp 1 -b 8 --fp8_recipe rowwise -g"),
        (2, "-p hybrid_parallel --tp 1 --pp 2 -b 8"),
        (2, "-p hybrid_parallel --tp 1 --pp 1 --sp 2 -b 8 -a"),
        (2, "-p hybrid_parallel --tp 1 --pp 1 --zero 2 -b 4"),
    ],
)
def test_every_layout_trains_in_it(ranks, flags, reference):
    loss, gradients = reference
    results = run_ranks(ranks, step, f"{flags} --fp8", gradients)
    pairs = [pair for _, found in results for pair in found]
    error = (sum(error for error, _ in pairs) / sum(square for _, square in pairs)) ** 0.5
    assert 0.03 < error < 0.12  # measured: 0.076 to 0.103; in bf16 0.007
    split = 2 if "tp 2" in flags else 1
    assert sum(total for total, _ in results) / split / (8 * (LENGTH - 1)) == pytest.approx(loss, rel=2e-3)


@contextlib.contextmanager
def gathered(run: Engine, weight: torch.nn.Parameter) -> Iterator[None]:
    """Gather the chunk that has the float8 values of a weight, if there are chunks."""
    chunk = run.optimizer.chunk_manager.get_chunk(weight) if run.layout.traits.module == "gemini" else None
    if chunk:
        chunk.access_chunk()
    yield
    if chunk:
        chunk.release_chunk()


def stored_weights(flags: str) -> list[tuple[bool, torch.Tensor, torch.Tensor]]:
    """Return, at first and after a step: True if a weight has neither values nor memory; the float8 values times their
    scale; and this rank's master.
    """
    run = boosted(f"{flags} --lr 1e-2 --fp8", **CHANGES)
    initialize_weights(run)
    module = run.model.unwrap().model.layers[0].mlp.down_proj
    ids = sequences()[dist.get_rank() :][:2]
    found = []
    for _ in range(2):
        (shard,) = (shard for shard in local_shards(run) if "layers.0.mlp.down_proj.w" in shard.spec.name)
        with gathered(run, module.weight):
            values = module.weight8.float() * module.weight_scale
        empty = bool(module.weight.isnan().all()) and module.weight.untyped_storage().nbytes() == 2
        found.append((empty, values.flatten(), shard.tensor(MASTER).clone()))
        forward_backward(run, [{"input_ids": ids, "labels": ids}], 6 * (LENGTH - 1))
        optimizer_step(run)
    return found


def saved_for_backward(flags: str) -> tuple[int, int]:
    """Return how many tensors a step keeps for its backward pass, and how many of them in float8 outside chunks."""
    run = boosted(f"{flags} -b 2 --fp8 --compile", **CHANGES, _attn_implementation=TORCH_FUSED)
    initialize_weights(run)
    ids, saved = sequences()[:2], []
    chunks = run.optimizer.chunk16_set

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        of_chunks = {chunk.cuda_global_chunk.untyped_storage().data_ptr() for chunk in chunks}
        outside = tensor.untyped_storage().data_ptr() not in of_chunks
        saved.append(tensor.dtype == float8.E4M3 and outside)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        forward_backward(run, [{"input_ids": ids, "labels": ids}], 2 * (LENGTH - 1))
    return len(saved), sum(saved)


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["", "--fp8_recipe rowwise"])
def test_gemini_keeps_no_copies_of_float8_weights_for_the_backward_pass(flags):
    for saved, copies in run_ranks(2, saved_for_backward, f"-p gemini {flags}"):
        assert saved > 0
        assert copies == 0


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["-p zero2 -b 2", "-p gemini -b 2", "-p hybrid_parallel --tp 1 --pp 1 --zero 0 -b 2"])
def test_trained_weights_are_stored_in_float8_alone(flags):
    """They are the ranks' master weights, rounded; after these are set, and after an update."""
    before, after = zip(*run_ranks(3, stored_weights, flags), strict=True)
    for ranks in (before, after):
        own = [master for *_, master in ranks]
        master = own[0] if "hybrid" in flags else torch.cat(own)
        scale = master.abs().max() / 448
        for empty, values, _ in ranks:
            assert empty
            assert torch.allclose(values, (master / scale).to(torch.float8_e4m3fn).float() * scale, atol=0)
    assert not torch.equal(before[0][1], after[0][1])


def adapted() -> list[str]:
    """Return the linear layers that are in float8 in a model with adapters, after a step that trains these."""
    run = boosted("-p zero2 -b 2 --fp8", LoraConfig(r=16, target_modules=["q_proj", "up_proj"]))
    initialize_weights(run)
    for parameter in run.model.parameters():
        if not parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.02)
    ids = sequences()[:2]
    forward_backward(run, [{"input_ids": ids, "labels": ids}], 2 * (LENGTH - 1))
    norm, _ = optimizer_step(run)
    assert norm > 0
    names = [name for name, module in run.model.named_modules() if isinstance(module, float8._Float8)]
    return [name.partition("layers.0.")[2] for name in names if "layers.0." in name]


def test_adapters_stay_as_they_are_and_their_base_is_converted():
    (names,) = run_ranks(1, adapted)
    assert sorted(names) == [
        "mlp.down_proj",
        "mlp.gate_proj",
        "mlp.up_proj.base_layer",
        "self_attn.k_proj",
        "self_attn.o_proj",
        "self_attn.q_proj.base_layer",
        "self_attn.v_proj",
    ]


@pytest.mark.gpu
def test_the_kernel_rounds_as_torch_does():
    from engine.kernels import divide_

    weight = torch.randn(5000, device="cuda")
    weight[7] = torch.nan
    scale = torch.tensor(2.0**-9, device="cuda")  # exact in any order; the largest weights are above the range
    values = torch.empty(5000, dtype=torch.float8_e4m3fn, device="cuda")
    divide_(values, weight, scale)
    assert torch.equal(values.view(torch.uint8), float8.divide(weight, scale, values.dtype).view(torch.uint8))


@pytest.mark.parametrize(("capability", "expected"), [((8, 0), False), ((8, 9), True), ((9, 0), True)])
def test_gpus_that_have_it(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert device.has_float8() == expected


def test_small_layers_stay_as_they_are_on_a_gpu():
    large, small = job("-p zero2 --fp8", hidden_size=2048, intermediate_size=5632), job("-p zero2 --fp8")
    assert float8.converted(large, on_gpu=True) == (3, 7)  # of its FFN; its heads are small
    assert float8.converted(small, on_gpu=True) == (0, 7)
    assert float8.converted(small, on_gpu=False) == (7, 7)
