"""The sizes of Gemini's chunks, which it gathers and releases as a whole."""

import functools
import math
from collections.abc import Iterable

import torch
from colossalai.zero.gemini.chunk.search_utils import _get_unused_byte
from transformers import LlamaConfig

from engine import float8
from engine.job import Job
from model_utils import count_parameters, parameter_specs

OFFLOADED_CHUNK_PARAMETERS = 32 * 2**20


def keeps_whole(job: Job) -> bool:
    """Return True if there is only one data-parallel rank and nothing is offloaded.

    Gemini then keeps the model in one chunk that is never sharded. Sharding over one rank would copy each chunk four
    times per step.
    """
    return job.layout.dp == 1 and not job.offloads


def chunk_parameters(job: Job) -> int:
    """Return the smallest chunk size, in parameters: that of a decoder layer, whose parameters are gathered at once.

    Chunks that move between GPU and host memory are smaller. Gemini replicates a model smaller than one chunk, and then
    counts accumulated gradients once too often per rank. A small model therefore gets small chunks and is sharded like
    a large one, unless a rank keeps it whole.
    """
    parameters = count_parameters(job.config)
    if keeps_whole(job):
        return parameters + 1
    smallest = OFFLOADED_CHUNK_PARAMETERS if job.offloads else layer_parameters(job.config)
    return min(smallest, parameters // 8) // job.layout.tp


def layer_parameters(config: LlamaConfig) -> int:
    """Return the number of parameters of one decoder layer."""
    return sum(spec.shape.numel() for spec in parameter_specs(config) if spec.group == "model.layers.0")


@functools.cache
def chunk_sizes(sizes: tuple[int, ...], smallest: int, hidden: int) -> list[int]:
    """Return the sizes of Gemini's chunks for parameters of these sizes, filled in order as ColossalAI does.

    ColossalAI takes the chunk size that wastes least memory, leaving out parameters more than three standard deviations
    above the mean (search_chunk_configuration). A parameter larger than a chunk gets a chunk of its own
    (ChunkManager.register_tensor).
    """
    mean = sum(sizes) / len(sizes)
    bound = mean + 3 * math.sqrt(sum((size - mean) ** 2 for size in sizes) / len(sizes))
    packed = [size for size in sizes if size <= bound]
    start = math.ceil(max(smallest, *packed) / hidden) * hidden
    candidates = range(start, start + smallest // 8 + 1, hidden)
    return filled(sizes, min(candidates, key=lambda size: _get_unused_byte(packed, size)))


def filled(sizes: Iterable[int], chunk: int) -> list[int]:
    """Return the sizes of the chunks that these parameters fill in order; one larger than `chunk` has its own."""
    chunks, left = [], 0
    for size in sizes:
        if size > left:
            left = max(chunk, size)
            chunks.append(left)
        left -= size
    return chunks


def float8_chunks(job: Job, sizes: dict[str, int], on_gpu: bool) -> tuple[set[str], int, int]:
    """Return which parameters have chunks in float8, and the sizes of these chunks and of the others.

    A chunk in float8 has a layer's weights. A chunk of others has all that is small: RMSNorm's weights. Embeddings are
    larger and have chunks of their own.

    Args:
        sizes: of all parameters, by name.
    """
    names = float8.stored(job, sizes, on_gpu)
    inside = sum(sizes[name] for name in names) // job.config.num_hidden_layers
    others = [size for name, size in sizes.items() if name not in names and ".layers." in name]
    return names, inside, max(*others, min(sum(others), OFFLOADED_CHUNK_PARAMETERS))


def keeps_gradients_apart(job: Job) -> bool:
    """Return True if gradients have chunks of their own; else they overwrite weights, where float8 has no room."""
    sizes = {spec.name: spec.shape.numel() for spec in parameter_specs(job.config)}
    return job.accumulates or bool(float8.stored(job, sizes, torch.cuda.is_available()))


def prefetched_chunks(job: Job) -> int:
    """Return the number of chunks to prefetch: as many as a layer has.

    It is 0 if a rank holds all chunks, or if some are in host memory: the GPU may not have room for more.
    """
    if job.layout.dp == 1 or job.offloads:
        return 0
    return math.ceil(layer_parameters(job.config) / job.layout.tp / chunk_parameters(job))
