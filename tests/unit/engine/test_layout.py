"""Layouts and their problems, as tables."""

import re
from functools import partial

import pytest

from engine.layout import Layout
from model_utils import load_config
from pretrain import parse_args
from training.flags import job_of

HYBRID = "-p hybrid_parallel"
hybrid = partial(Layout, "hybrid_parallel")


def layout_of(ranks, flags, monkeypatch, model="7b", **changes):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    config = load_config(model)
    config.update(changes)
    asked = job_of(parse_args(flags.split()), config)
    return asked.problems() or asked.layout


class TestLayout:
    @pytest.mark.parametrize(
        ("ranks", "flags", "tp", "pp", "sp", "dp", "zero_stage"),
        [
            (8, HYBRID, 4, 2, 1, 1, 0),  # SPEC: the layout of eight GPUs
            (1, HYBRID, 1, 1, 1, 1, 0),
            (2, HYBRID, 2, 1, 1, 1, 0),
            (3, HYBRID, 1, 1, 1, 3, 1),
            (4, HYBRID, 4, 1, 1, 1, 0),
            (6, HYBRID, 2, 1, 1, 3, 1),
            (12, HYBRID, 4, 1, 1, 3, 1),
            (16, HYBRID, 4, 2, 1, 2, 1),
            (64, HYBRID, 4, 2, 1, 8, 1),
            (8, f"{HYBRID} --tp 2", 2, 2, 1, 2, 1),
            (8, f"{HYBRID} --tp 8", 8, 1, 1, 1, 0),
            (8, f"{HYBRID} --pp 4 -b 4", 2, 4, 1, 1, 0),
            (8, f"{HYBRID} --tp 1 --pp 1", 1, 1, 1, 8, 1),
            (8, f"{HYBRID} --tp 1 --pp 1 -x fp32", 1, 1, 1, 8, 0),
            (8, f"{HYBRID} --tp 1 --pp 1 --zero 2", 1, 1, 1, 8, 2),
            (8, f"{HYBRID} --tp 1 --pp 1 --zero 0", 1, 1, 1, 8, 0),
            (8, f"{HYBRID} -b 1", 4, 1, 1, 2, 1),  # one sequence is too few for two stages
            (8, f"{HYBRID} -b 1 --accumulation_steps 2", 4, 2, 1, 1, 0),
            # By default no pipeline if it would not combine with another flag.
            (16, f"{HYBRID} --zero 2", 4, 1, 1, 4, 2),
            (16, f"{HYBRID} --sp 2", 4, 1, 2, 2, 1),
            (8, "-p zero2", 1, 1, 1, 8, 2),
            (8, "-p gemini", 1, 1, 1, 8, 3),
        ],
    )
    def test_defaults_and_flags(self, monkeypatch, ranks, flags, tp, pp, sp, dp, zero_stage):
        assert layout_of(ranks, flags, monkeypatch) == Layout(flags.split()[1], tp, pp, sp, dp, zero_stage)
        assert ranks == tp * pp * sp * dp

    def test_interleaved(self, monkeypatch):
        interleaved = f"{HYBRID} --pp_style interleaved"
        assert layout_of(8, interleaved, monkeypatch) == hybrid(4, 2, 1, 1, 0, chunks=2)
        assert layout_of(16, f"{interleaved} --pp 4 --model_chunks 8 -b 4", monkeypatch).chunks == 8

    def test_default_divides_the_model(self, monkeypatch):
        assert layout_of(8, f"{HYBRID} -l 64", monkeypatch, "test") == Layout(
            "hybrid_parallel", 2, 2, 1, 2, 1
        )  # two key-value heads
        assert layout_of(8, HYBRID, monkeypatch, num_hidden_layers=31) == hybrid(4, 1, 1, 2, 1)
        assert layout_of(8, HYBRID, monkeypatch, tie_word_embeddings=True) == hybrid(4, 1, 1, 2, 1)
        assert layout_of(8, HYBRID, monkeypatch, vocab_size=32002) == hybrid(2, 2, 1, 2, 1)

    @pytest.mark.parametrize(
        ("ranks", "flags", "problem"),
        [
            (8, "-p zero2 --tp 2", "--tp: takes effect only with -p hybrid_parallel, not with -p zero2"),
            (8, "-p gemini --sp 2", "--sp: takes effect only with -p hybrid_parallel, not with -p gemini"),
            (1, "-p gemini -x fp32", "--mixed_precision: gemini trains only in fp16 or bf16; for fp32 use -p zero2"),
            (8, f"{HYBRID} --tp 0", "--tp: must be at least 1, not 0"),
            (8, f"{HYBRID} --pp -2", "--pp: must be at least 1, not -2"),
            (8, f"{HYBRID} --sp 0", "--sp: must be at least 1, not 0"),
            (8, f"{HYBRID} --microbatch_size 0", "--microbatch_size: must be at least 1, not 0"),
            (8, f"{HYBRID} --tp 3", "--tp/--pp/--sp: 3 x 1 x 1 = 3 does not divide the 8 ranks that were launched"),
            (8, f"{HYBRID} --tp 4 --pp 4", "4 x 4 x 1 = 16 does not divide the 8 ranks that were launched"),
            (12, f"{HYBRID} --tp 12", "--tp/--sp: 12 does not divide the model's 32 heads and 32 key-value heads"),
            (3, f"{HYBRID} --pp 3 -b 3", "--pp: 3 does not divide the model's 32 layers"),
            (8, f"{HYBRID} --pp 2 -b 1", "--pp: 2 stages need at least 2 microbatches, .* = 1"),
            (8, f"{HYBRID} --pp 2 -b 3 --microbatch_size 2", "2 does not divide --batch_size x .* = 3"),
            (8, f"{HYBRID} --pp_style interleaved -b 3", "--pp_style: interleaved needs several stages; give --pp"),
            (8, f"{HYBRID} --pp 2 --pp_style interleaved -b 3", "microbatches divisible by 2 stages, .* = 3"),
            (8, f"{HYBRID} --pp_style interleaved --pp 2 --model_chunks 5", "2 stages x 5 = 10 .* 32 layers"),
            (8, "-p zero2 --microbatch_size 2", "--microbatch_size: takes effect only with -p hybrid_parallel"),
            (8, f"{HYBRID} -b 3 --microbatch_size 2", "--microbatch_size: takes effect only with several stages"),
            (8, f"{HYBRID} --model_chunks 2", "--model_chunks: takes effect only with --pp_style interleaved"),
            (8, f"{HYBRID} --pp_style zbv", "--pp_style: ColossalAI's zero-bubble pipeline, zbv, .* use interleaved"),
            (8, "-p zero2 --pp_style interleaved", "--pp_style: takes effect only with -p hybrid_parallel"),
            (8, f"{HYBRID} --sp 2 --pp 2", "--sp: sequence parallelism does not combine with --pp; use --pp 1"),
            (8, f"{HYBRID} --zero 2 --pp 2", "--zero: stage 2 does not combine with --pp; use --zero 1"),
            (2, f"{HYBRID} --tp 1 --sp 2 -l 4095", "--sp: 2 does not divide --max_length 4095"),
            (2, f"{HYBRID} --tp 1 --zero 1 -x fp32", "--zero: stage 1 needs --mixed_precision fp16 or bf16, not fp32"),
        ],
    )
    def test_problem_is_one_line_with_the_flag_and_the_numbers(self, monkeypatch, ranks, flags, problem):
        (line,) = layout_of(ranks, flags, monkeypatch)
        assert re.search(problem, line), line
        assert "\n" not in line

    def test_problems_are_collected(self, monkeypatch):
        assert len(layout_of(8, "-p zero2 --tp 2 --pp 2 --zero 1", monkeypatch)) == 3
        assert len(layout_of(8, f"{HYBRID} --tp 0 --pp 0", monkeypatch)) == 2
        assert len(layout_of(8, f"{HYBRID} --zero 2 --sp 2 --pp 2", monkeypatch)) == 2

    def test_model_that_the_flags_do_not_fit(self, monkeypatch):
        (line,) = layout_of(2, f"{HYBRID} --tp 2", monkeypatch, vocab_size=32001)
        assert line == "--tp: 2 does not divide the model's vocabulary of 32001"
        (line,) = layout_of(2, f"{HYBRID} --pp 2", monkeypatch, tie_word_embeddings=True)
        assert line.startswith("--pp: the model ties its embeddings")
