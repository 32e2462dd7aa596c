"""Whether memory of Gemini's chunks is written or read by one stream before another is done with it, without a GPU.

Streams are vector clocks: waiting for a stream is knowing what it has done up to now. Collective operations take place
at once, but count as done on the stream that would do them, NCCL's own if they are asynchronous. Memory that is freed
goes back to the stream that asked for it, as in torch's allocator, and the next user has to know of all earlier uses.
"""

from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import contextmanager

import torch
import torch.distributed as dist
from colossalai.accelerator import get_accelerator
from colossalai.zero.gemini.chunk import TensorState
from colossalai.zero.gemini.chunk import chunk as chunks
from colossalai.zero.gemini.chunk.chunk import Chunk

NCCL = "NCCL"


class Streams:
    """Streams by name, and what each knows of the others: how many of their operations are done before its next one."""

    def __init__(self) -> None:
        self.known: dict[str, Counter] = defaultdict(Counter)
        self.current = ["default"]
        self.made = 0

    def install(self) -> None:
        accelerator = type(get_accelerator())
        accelerator.Stream = lambda *_, **__: self.stream()
        accelerator.current_stream = lambda *_: _Stream(self, self.current[-1])
        accelerator.stream = lambda _, stream: self.entered(stream)

    def stream(self) -> "_Stream":
        self.made += 1
        return _Stream(self, f"stream {self.made}")

    @contextmanager
    def entered(self, stream: "_Stream | None"):
        self.current.append(stream.name if stream else self.current[-1])
        yield
        self.current.pop()

    def wait(self, waiting: str, other: str) -> None:
        self.known[waiting] |= self.known[other]


class _Stream:
    def __init__(self, streams: Streams, name: str):
        self.streams, self.name = streams, name

    def wait_stream(self, other: "_Stream") -> None:
        self.streams.wait(self.name, other.name)

    def synchronize(self) -> None:
        self.streams.wait("default", self.name)  # and so all that the host submits later


class Memory:
    """The blocks that chunks lie in. `hazards` counts the uses that are not ordered after a former owner's."""

    def __init__(self, streams: Streams):
        self.streams = streams
        self.hazards: Counter[str] = Counter()
        self.free: dict[tuple[str, int], list[list]] = defaultdict(list)
        self.owned: dict[int, tuple[tuple[str, int], list, list]] = {}

    def use(self, tensor: torch.Tensor, what: str, stream: str | None = None) -> None:
        stream = stream or self.streams.current[-1]
        known = self.streams.known[stream]
        known[stream] += 1
        if id(tensor) not in self.owned:
            return
        _, earlier, uses = self.owned[id(tensor)]
        for where, count, other in earlier:
            if known[where] < count:
                self.hazards[f"{what} on {stream} does not wait for {other} on {where}"] += 1
        uses.append((stream, known[stream], what))

    def allocate(self, tensor: torch.Tensor) -> None:
        pool = (self.streams.current[-1], tensor.numel())
        self.owned[id(tensor)] = pool, self.free[pool].pop() if self.free[pool] else [], []

    def release(self, tensor: torch.Tensor) -> None:
        if id(tensor) not in self.owned:
            return
        pool, _, uses = self.owned.pop(id(tensor))
        self.free[pool].append(uses)
        for where, count, what in uses:
            if pool[0] == "default" and self.streams.known["default"][where] < count:  # activations may take it at once
                self.hazards[f"memory goes back to default, which does not wait for {what} on {where}"] += 1


def watch() -> Memory:
    """Begins to watch. Call before the model is boosted; for the life of the process."""
    streams = Streams()
    streams.install()
    memory = Memory(streams)
    allocate, release = chunks.alloc_storage, chunks.free_storage

    def alloc_storage(tensor: torch.Tensor) -> None:
        if chunks.is_storage_empty(tensor):
            memory.allocate(tensor)
        allocate(tensor)

    def free_storage(tensor: torch.Tensor) -> None:
        memory.release(tensor)
        release(tensor)

    chunks.alloc_storage, chunks.free_storage = alloc_storage, free_storage
    order: Counter = Counter()  # collective operations of one group, which NCCL does one after another

    class Work:
        def wait(self) -> None:
            streams.wait(streams.current[-1], NCCL)

    def collective(operation: Callable) -> Callable:
        def run(output: torch.Tensor, source: torch.Tensor, *args, async_op: bool = False, **kwargs) -> Work | None:
            operation(output, source, *args, **kwargs)
            stream = NCCL if async_op else streams.current[-1]
            streams.known[stream] |= streams.known[streams.current[-1]] | order
            memory.use(output, operation.__name__, stream)
            memory.use(source, operation.__name__, stream)
            order.update(streams.known[stream] - order)
            return Work() if async_op else None

        return run

    dist.reduce_scatter_tensor = collective(dist.reduce_scatter_tensor)
    dist.all_gather_into_tensor = collective(dist.all_gather_into_tensor)

    def using(name: str, what: str, when: Callable[..., bool] = lambda *_: True) -> None:
        method = getattr(Chunk, name)

        def watched(chunk: Chunk, *args, **kwargs):
            if chunk.cuda_global_chunk is not None and when(chunk, *args):
                memory.use(chunk.cuda_global_chunk, what)
            return method(chunk, *args, **kwargs)

        setattr(Chunk, name, watched)

    computes = (TensorState.COMPUTE, TensorState.HOLD, TensorState.HOLD_AFTER_BWD)
    using("tensor_trans_state", "computation", lambda _, tensor, state: state in computes)
    using("copy_tensor_to_chunk_slice", "a gradient copied")
    using("add_tensor_to_chunk_slice", "a gradient added")
    using("_Chunk__scatter", "a shard copied", lambda chunk: chunk.is_gathered and not chunk.keep_gathered)
    return memory
