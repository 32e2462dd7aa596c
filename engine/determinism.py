"""Reproducible arithmetic on GPUs: equal runs, and a run and its resume, give the same bits with --deterministic.

Sources of different bits, and the remedy:
- The backward pass of attention adds up the gradient of queries with atomic operations. cuDNN's kernel, torch's first
  choice on H100 and H200, has no other way, and flash-attn's package is told by its callers. attn.py selects torch's
  attention, and torch in its deterministic mode takes the flash kernel that adds in a fixed order.
- cuBLAS may share one workspace between streams; CUBLAS_WORKSPACE_CONFIG gives each its own.
- torch.compile tries configurations of a reduction and takes the fastest, which differs from process to process, and
  adds up in another order. Inductor's deterministic mode tries none that change results.
- NVLink SHARP adds up inside the switch, in the order of arrival. NCCL's rings and trees have a fixed order.
- A compiled function is general or special in the lengths that it has met, which a resume meets in another order.
  `choose_fusion` compiles nothing then.

The embedding's gradient is sorted by token, and AdamW and the norms of gradients are free of atomic operations.
"""

import os

import torch

# The variable must have one of these values; the first is set if it has none. Megatron-LM's deterministic mode asks for
# the same of cuBLAS and NCCL.
VARIABLES = {"CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"), "NCCL_NVLS_ENABLE": ("0",)}


def environment_problems() -> list[str]:
    """Return a line for each variable that the user has set to a value that does not go with --deterministic."""
    return [
        f"--deterministic: needs {name}={values[0]}, not {os.environ[name]}; unset the variable, or leave the flag out"
        for name, values in VARIABLES.items()
        if os.environ.get(name, values[0]) not in values
    ]


def make_deterministic() -> None:
    """Switch this process to deterministic operations. Call before its first operation on a GPU.

    An operation that has no deterministic form then raises a RuntimeError.
    """
    for name, values in VARIABLES.items():
        os.environ.setdefault(name, values[0])
    torch.use_deterministic_algorithms(True)
    # It would write NaN to all new memory, to expose misuse.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch._inductor.config.deterministic = True
