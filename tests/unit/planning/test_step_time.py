"""The estimate of a step's time: against measured steps, torch's count of FLOPs, and a simulated pipeline."""

import copy
import itertools
import json
import os
import statistics
import tomllib
from dataclasses import asdict, replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import benchmark
from benchmarks.estimated_steps import PUBLISHED, RESULTS, Published, estimated, measured_rows
from engine.job import Job
from model_utils import build_model, load_config
from planning.cards import CARDS, find_card
from planning.facts import BUILT_IN, Facts, at, facts_of, read_facts, write_facts
from planning.machines import DryRun, Machines, planned_machines
from planning.step_time import StepTime, estimate_step
from runtime.console import InputError

ROWS = list(measured_rows(RESULTS.read_text(encoding="utf-8")))
TIMELESS = replace(  # everything but what a test sets takes no time
    BUILT_IN["H100"],
    **dict.fromkeys(("products", "float8_products", "rowwise_products"), ((1.0, 1e30),)),
    **dict.fromkeys(("float32", "memory", "collectives", "copies", "host_link", "host_adam", "loader"), 1e30),
    **dict(
        attention=((1, 1e30),),
        attention_backward=((1, 1e30),),
        latency=(0.0, 0.0),
        overlap=(0.0, 0.0),
        spread=0.0,
        bubble=1.0,
        idle=0.0,
        launch=0.0,
    ),
)


def planned(flags: str) -> Job:
    job, _ = benchmark.load_job(benchmark.parse_args(f"--dry_run {flags}".split()))
    assert not job.problems()
    return job


def step(flags: str, facts: Facts = BUILT_IN["H100"], per_host: int = 8, network: float = 40.0) -> StepTime:
    return estimate_step(planned(flags), Machines(facts, per_host, network))


def tokens_per_second(flags: str, **machines) -> float:
    return planned(flags).tokens_per_step / step(flags, **machines).total


class TestMeasured:
    def test_rows_of_one_two_and_four_gpus_in_both_precisions(self):
        assert len(ROWS) >= 55
        assert {row.job.layout.ranks for row in ROWS} == {1, 2, 4}
        assert {row.job.compute.fp8 for row in ROWS} == {False, True}

    @pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.job.layout.ranks}x{row.gpu} {row.flags}")
    def test_each_within_5_percent(self, row):
        assert estimated(row).total == pytest.approx(row.seconds, rel=0.05)

    def test_median_within_3_percent(self):
        assert statistics.median(abs(estimated(row).total / row.seconds - 1) for row in ROWS) < 0.03


class TestPublished:
    @pytest.mark.parametrize("run", tomllib.loads(PUBLISHED.read_text())["run"], ids=lambda run: run["job"])
    def test_within_half_and_explained_from_a_tenth(self, run):
        row = Published(**run)
        ratio = row.estimated() / row.tokens
        assert 2 / 3 < ratio < 1.5
        assert (0.9 < ratio < 1.1) or row.why


class TestFlops:
    @pytest.mark.parametrize("flags", ["-c test -l 64 -b 3", "-c test -l 64 -b 3 -g"])
    def test_are_those_that_torch_counts(self, flags):
        job = planned(f"{flags} -p zero2 --no-compile -a -x")
        config = copy.deepcopy(job.config)
        config._attn_implementation = "eager"  # torch counts no FLOPs of the CPU's fused kernel
        model = build_model(config, torch.device("cpu"))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
        if job.recomputed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        ids = torch.zeros(3, 64, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            model.train()(ids).logits.sum().backward()
        counted = {str(name): flops for name, flops in counter.get_flop_counts()["Global"].items()}
        scores = sum(flops for name, flops in counted.items() if "bmm" in name)
        again = int(job.recomputed)
        one = replace(TIMELESS, products=((1.0, 1.0),), attention=((1, 1.0),), attention_backward=((1, 1.0),))
        found = estimate_step(job, Machines(one, 8, 1))
        assert found.products * 1e12 == pytest.approx(sum(counted.values()) - scores, rel=1e-6)
        # Plain attention has two products of whole matrices in the forward pass, and four in the backward pass. A fused
        # kernel has one more there, since it keeps no scores, and only half of each.
        product = scores / (6 + 2 * again)
        assert found.attention * 1e12 == pytest.approx(product * (1 + 2.5 + again), rel=1e-3)

    def test_of_a_tensor_parallel_rank(self):
        one = replace(TIMELESS, products=((1.0, 1.0),), attention=((1, 1.0),), attention_backward=((1, 1.0),))
        whole, half = (step(f"-c tiny -l 128 -a -p 3d --gpus 2 --tp {tp} -b 2", one) for tp in (1, 2))
        assert half.products == pytest.approx(whole.products / 2)
        assert half.attention == pytest.approx(whole.attention / 2)

    @pytest.mark.parametrize(("tp", "parts"), [(2, 4), (4, 4), (8, 8)])
    def test_of_tensor_parallel_ranks_are_in_parts(self, tp, parts):
        """But for gradients of weights: a product of half the FLOPs, or fewer, is slower here."""
        flops = 2 * 2 * 4096 * 4096 * 11008 / tp / 1e9  # of the largest
        speeds = replace(TIMELESS, products=((flops / parts, 1.0), (flops / parts * 1.001, 2.0)))
        config = load_config("7b")
        config.vocab_size = 11008
        job = replace(planned(f"-c 7b -a -p 3d --gpus {tp} --tp {tp} -b 2"), config=config)
        found = estimate_step(job, Machines(speeds, 8, 1)).products
        one = estimate_step(job, Machines(replace(TIMELESS, products=((1.0, 1.0),)), 8, 1)).products
        assert found == pytest.approx(one * (2 + 1 / 2) / 3, rel=1e-6)

    def test_of_attention_in_fp32_are_slower(self):
        job = planned("-c 7b -p zero2 -a -b 2")
        in_fp32 = replace(job, compute=replace(job.compute, mixed_precision="fp32"))
        here = Machines(BUILT_IN["H100"], 8, 1)
        assert estimate_step(in_fp32, here).attention > 10 * estimate_step(job, here).attention

    def test_of_adapters_leave_out_the_frozen_weights_gradients(self):
        job = planned("-c test -l 64 -p zero2 -a")
        from peft import LoraConfig

        one = Machines(replace(TIMELESS, products=((1.0, 1.0),)), 8, 1)
        adapted = replace(job, adapters=LoraConfig(r=4, target_modules=["q_proj"]))
        assert estimate_step(adapted, one).products == pytest.approx(estimate_step(job, one).products * 2 / 3)


def simulated_1f1b(stages: list[tuple[float, float]], microbatches: int) -> float:
    """Return the end of a 1F1B schedule, each stage's (forward, backward) seconds given, by simulating its events."""
    count = len(stages)
    orders = []
    for stage in range(count):
        ahead = min(count - stage - 1, microbatches)
        forward, backward = (iter([(name, number) for number in range(microbatches)]) for name in "FB")
        order = list(itertools.islice(forward, ahead))
        for each in forward:
            order += [each, next(backward)]
        orders.append(order + list(backward))
    ends: dict[tuple[str, int, int], float] = {}
    clocks, places = [0.0] * count, [0] * count
    while any(place < len(order) for place, order in zip(places, orders, strict=True)):
        for stage, order in enumerate(orders):
            while places[stage] < len(order):
                kind, number = order[places[stage]]
                if kind == "F":
                    needed = ("F", stage - 1, number) if stage else None
                else:
                    needed = ("B", stage + 1, number) if stage + 1 < count else None
                if needed and needed not in ends:
                    break
                start = max(clocks[stage], ends[needed] if needed else 0)
                clocks[stage] = start + stages[stage][kind == "B"]
                ends[kind, stage, number] = clocks[stage]
                places[stage] += 1
    return max(clocks)


class TestPipeline:
    @pytest.mark.parametrize("microbatches", [4, 8, 32])
    @pytest.mark.parametrize("stages", [2, 4])
    def test_equals_a_simulated_schedule(self, stages, microbatches):
        flags = f"-c 7b -l 512 -a -p 3d --gpus {stages} --pp {stages} -b {microbatches}"
        only_products = replace(TIMELESS, products=((1.0, 500.0),))
        found = step(flags, only_products)
        job = planned(flags)
        layer = 2 * 512 * (4 * 4096**2 + 3 * 4096 * 11008) * 32 / stages / 500e12
        head = 2 * 512 * 4096 * 32000 / 500e12
        times = [
            (layer + head * (stage == stages - 1), 2 * (layer + head * (stage == stages - 1)))
            for stage in range(stages)
        ]
        assert job.layout.pp == stages
        assert found.total == pytest.approx(simulated_1f1b(times, microbatches), rel=0.02)

    def test_interleaving_divides_the_bubble(self):
        flags = "-c 7b -l 512 -a -p 3d --gpus 4 --pp 4 -b 8"
        plain = step(flags)
        interleaved = step(f"{flags} --pp_style interleaved --model_chunks 2")
        assert interleaved.bubble == pytest.approx(plain.bubble / 2, rel=0.01)


class TestExchange:
    def test_of_gradients_and_weights_moves_their_bytes_once(self):
        facts = replace(TIMELESS, collectives=1.0, overlap=(1.0, 1.0))
        found = step("-c 7b -p zero2 -a --gpus 4 --reduce_dtype bf16", facts)
        parameters = 6_738_415_616
        assert found.exchange == pytest.approx(2 * 2 * parameters * 3 / 4 / 1e9, rel=1e-6)

    def test_between_hosts_takes_the_slower_of_both_links(self):
        flags, moved = "-c 7b -p zero2 -a --gpus 16 --reduce_dtype bf16", 2 * 2 * 6_738_415_616 / 1e9
        facts = replace(TIMELESS, collectives=10.0, overlap=(1.0, 1.0))
        # In a ring each GPU sends 15/16 of the bytes; those of a host's last GPU go through the host's eight links.
        assert step(flags, facts, per_host=16).exchange == pytest.approx(moved * 15 / 16 / 10, rel=1e-6)
        assert step(flags, facts, network=1e30).exchange == pytest.approx(moved * 15 / 16 / 10, rel=1e-6)
        assert step(flags, facts, network=0.1).exchange == pytest.approx(moved * 15 / 16 / 8 / 0.1, rel=1e-6)

    def test_of_sums_once_a_step_moves_float32(self):
        """Narrow gradients travel as they are within a host, but sums over micro-batches are float32."""
        job = planned("-c 7b -p zero2 -a --gpus 4")
        facts = replace(TIMELESS, collectives=1.0)
        job = replace(job, batch=replace(job.batch, accumulation_steps=2))
        at_end = replace(job, exchange=replace(job.exchange, exchange="step"))
        parameters = 6_738_415_616
        assert estimate_step(at_end, Machines(facts, 8, 1)).exchange == pytest.approx(
            (4 + 2) * parameters * 3 / 4 / 1e9, rel=1e-6
        )

    def test_between_pipeline_stages_every_tensor_parallel_rank_sends_the_whole(self):
        facts = replace(TIMELESS, latency=(0.0, 0.0))
        flags = "-c 7b -p 3d -a -b 8 --gpus 16 --pp 4"
        one, four = (step(f"{flags} --tp {tp}", facts, per_host=4, network=1.0) for tp in (1, 4))
        sent = 8 * 4096 * 4096 * 2 / 1e9  # in each direction, half of it beside products
        exposed = four.exchange - 10 * 8 * 8 * 35e-6  # but for the first parts of tensor parallelism's own exchanges
        assert exposed == pytest.approx(sent, rel=0.01)
        assert one.exchange > sent

    def test_of_gemini_counts_a_chunk_a_layer(self):
        far = replace(TIMELESS, latency=(0.0, 1000.0))
        found = step("-c 7b -p gemini -a --gpus 2", far, per_host=1, network=1e30)
        assert found.exchange == pytest.approx(3 * 32 * 2e-3)

    def test_of_small_weights_is_one_operation(self):
        far = replace(TIMELESS, latency=(0.0, 1000.0))
        found = step("-c tiny -p zero2 -a --gpus 2", far, per_host=1, network=1e30)
        assert found.exchange == pytest.approx(2 * 3 * 2e-3)  # those of the embeddings and the output are large

    def test_of_copies_of_gemini(self):
        """The ranks of a copy are in different hosts, and gather less than without copies; their sums are reduced."""
        flags = "-c 7b -p gemini -a --gpus 32"
        facts = replace(TIMELESS, overlap=(1.0, 1.0))
        whole, copies = (step(f"{flags} {more}", facts, network=1.0).exchange for more in ("", "--extra_dp 4"))
        parameters = 6_738_415_616
        assert whole == pytest.approx((2 + 2 + 4) * parameters * 31 / 32 / 8 / 1e9, rel=1e-6)
        assert copies == pytest.approx((2 + 2 + 4) * parameters * 7 / 8 / 2 / 1e9, rel=1e-6)

    def test_of_geminis_tensor_parallelism(self):
        facts = replace(TIMELESS, collectives=1.0)
        found = step("-c 7b -p gemini -a -b 1 --gpus 2 --tp 2 --extra_dp 1", facts)
        assert found.exchange == pytest.approx(4 * 32 * 2 * 4096 * 4096 * 2 / 2 / 1e9)

    def test_beside_kernels_costs_less_than_after_them(self):
        hidden = replace(BUILT_IN["H100"], overlap=(0.0, 0.0))
        assert (
            step("-c 7b -p zero2 -a -b 2 --gpus 8", hidden).exchange < step("-c 7b -p zero2 -a -b 2 --gpus 8").exchange
        )

    def test_a_slower_network_never_makes_a_step_faster(self):
        times = [step("-c 7b -p gemini -a -b 1 --gpus 32", network=speed).total for speed in (100, 50, 20, 5, 1)]
        assert times == sorted(times)

    def test_tensor_parallelism_across_hosts_costs_more(self):
        flags = "-c 7b -p 3d -a -b 8 --gpus 8 --tp 8"
        assert step(flags, per_host=4).exchange > 2 * step(flags).exchange


class TestMore:
    def test_recomputation_and_offloading_take_longer(self):
        plain = step("-c 7b -p zero2 -a -b 2")
        assert step("-c 7b -p zero2 -a -b 2 --recompute 0.5").total > plain.total
        assert step("-c 7b -p zero2 -a -b 2 -g").total > step("-c 7b -p zero2 -a -b 2 -g --keep_attention").total
        assert step("-c 7b -p zero2_cpu -a -b 2").host > 1
        assert step("-c 7b -p gemini -a -b 2 --offload_optim_frac 0.5").host > 0
        assert step("-c 7b -p gemini -a -b 2 --offload_param_frac 1.0").host > 0.5

    def test_float8_and_fused_attention_are_faster(self):
        assert tokens_per_second("-c 7b -p zero2 -a --fp8") > 1.25 * tokens_per_second("-c 7b -p zero2 -a")
        assert tokens_per_second("-c 7b -p zero2 -a") > 1.2 * tokens_per_second("-c 7b -p zero2")

    @pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
    def test_every_card_has_a_plausible_speed(self, card):
        machines = planned_machines(DryRun(dry_run=True, gpu=card.name))
        assert machines is not None
        job = planned("-c 7b -p zero2 -a -b 2 --gpus 8")
        seconds = estimate_step(job, machines).total
        assert 0.15 < 16 * 4096 * 46.1e9 / seconds / 8 / (card.peak_tflops * 1e12) < 0.75

    def test_a_small_model_waits_for_the_host(self):
        many, once = (step(f"-c tiny -l 256 -p zero2 -a -b {size}").idle for size in (1, 512))
        assert many > once == BUILT_IN["H100"].idle / 1e3
        assert many == pytest.approx(once + 4 * BUILT_IN["H100"].launch / 1e3, rel=0.1)

    def test_waiting_for_a_slow_loader(self):
        machines = Machines(replace(BUILT_IN["H100"], loader=0.001), 8, 40)
        job = planned("-c 7b -p zero2 -a -b 2")
        found = estimate_step(job, machines, loaders=2)
        assert found.total == pytest.approx(2 * 4096 / 2000, rel=0.01)
        assert estimate_step(job, machines).data == 0


class TestFacts:
    def test_speeds_between_points_are_between_their_speeds(self):
        curve = ((1.0, 100.0), (100.0, 300.0))
        assert [at(curve, size) for size in (0.1, 1, 10, 100, 1e9)] == [100, 100, 200, 300, 300]

    def test_written_and_read(self, tmp_path):
        write_facts(tmp_path / "facts.json", BUILT_IN["H200"])
        assert read_facts(tmp_path / "facts.json") == BUILT_IN["H200"]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"memory": -1}, "memory is -1, not a positive number"),
            ({"memory": "fast"}, "memory is 'fast'"),
            ({"memory": True}, "memory is True"),
            ({"memory": float("nan")}, "memory is nan"),
            ({"memory": 10**400}, "memory is 1000"),
            ({"latency": 5}, "latency is 5, not two positive numbers"),
            ({"overlap": [5, -1]}, "overlap is (5, -1)"),
            ({"attention": [[4096, 0]]}, "attention is not a list of pairs of tokens and TFLOPS"),
            ({"attention": []}, "the sizes of attention do not ascend"),
            ({"products": []}, "the sizes of products do not ascend"),
            ({"products": [[2, 1], [1, 1]]}, "the sizes of products do not ascend"),
            ({"products": [[2, 0]]}, "products is not a list of pairs"),
            ({"products": 7}, "products is not a list of pairs"),
            ({"overlap": [0.5, 1.5]}, "overlap is (0.5, 1.5), not two positive numbers up to 1;"),
            ({"spread": 2}, "spread is 2, not a positive number up to 1;"),
            ({"memory": [1] * 1000}, "memory is (1, 1, 1, 1, 1, 1, ...), not"),
            ({"card": 7}, "card is not a printable text"),
            ({"card": ""}, "card is not a printable text"),
            ({"card": "H100\n"}, "card is not a printable text"),
            ({"card": "\ud800"}, "card is not a printable text"),
            ({"speed": 7}, "missing or unknown are ['speed']"),
        ],
    )
    def test_mistakes_in_a_file(self, change, message, tmp_path):
        (tmp_path / "facts.json").write_text(json.dumps(asdict(BUILT_IN["H100"]) | change))
        with pytest.raises(InputError) as error:
            read_facts(tmp_path / "facts.json")
        assert message in str(error.value)
        assert "--facts: " in str(error.value)

    @pytest.mark.parametrize("text", ["", "[]", "null", "\x00", "{}", "[" * 100_000])
    def test_other_files(self, text, tmp_path):
        (tmp_path / "facts.json").write_text(text)
        with pytest.raises(InputError, match="--facts: "):
            read_facts(tmp_path / "facts.json")

    def test_a_pipe_is_refused(self, tmp_path):
        os.mkfifo(tmp_path / "facts.json")
        with pytest.raises(InputError, match="is not a regular file; write one"):
            read_facts(tmp_path / "facts.json")

    def test_of_a_card_without_float8(self):
        assert facts_of(find_card("A100")).float8_products == ()
