"""Deterministic operations: the settings of a real process, and what is compiled."""

from dataclasses import replace

import pytest

from engine.compilation import Fusion, choose_fusion
from processes import job
from programs import run_program

LAUNCHED = """
import os, torch
from engine.launch import launch
launch(0, {deterministic})
print(torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
print(torch._inductor.config.deterministic, torch.utils.deterministic.fill_uninitialized_memory)
print(os.environ.get("CUBLAS_WORKSPACE_CONFIG"), os.environ.get("NCCL_NVLS_ENABLE"), flush=True)
os._exit(0)
"""


@pytest.mark.parametrize(
    ("deterministic", "variables", "settings"),
    [
        (True, {}, ["True False", "True False", ":4096:8 0"]),
        (True, {"CUBLAS_WORKSPACE_CONFIG": ":16:8"}, ["True False", "True False", ":16:8 0"]),
        (False, {}, ["False False", "False True", "None None"]),
    ],
)
def test_settings(deterministic, variables, settings):
    """With torch's warnings instead of errors, its flash attention would not be deterministic."""
    launched = run_program(LAUNCHED.format(deterministic=deterministic), **variables)
    assert launched.stdout.splitlines()[-3:] == settings, launched.stderr


def test_nothing_is_compiled_for_lengths_that_vary():
    """A compiled function is general or special in the lengths that it has met."""
    asked = job("-p zero2 --deterministic")
    assert choose_fusion(asked, on_gpu=True) is Fusion.LAYERS
    assert choose_fusion(replace(asked, length_varies=True), on_gpu=True) is Fusion.NONE
    assert choose_fusion(replace(job("-p zero2"), length_varies=True), on_gpu=True) is Fusion.LAYERS


@pytest.mark.parametrize("flag", ["--compile", "--fp8"])
def test_compilation_for_lengths_that_vary_is_refused(flag):
    asked = job(f"-p zero2 --deterministic {flag}")
    remedy = f"which a resume does not repeat; leave it or {flag} out"
    assert replace(asked, length_varies=True).problems() == [
        f"--deterministic: compiled kernels depend on the lengths met before, {remedy}"
    ]
