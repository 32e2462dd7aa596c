"""Detection of missing waits between streams, without a GPU: one stream uses memory before another is done with it.

Streams are vector clocks: waiting for a stream means knowing what it has done so far. Collective operations run at
once, but count as done on the stream that would run them, NCCL's own if they are asynchronous. Freed memory returns to
the stream that allocated it, as in torch's allocator, and its next user has to know of all earlier uses.

`watch_chunks` follows Gemini's chunks, whose memory is allocated and freed by hand; `watch_storages` follows every
tensor.
"""

import threading
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from colossalai.accelerator import get_accelerator
from colossalai.zero.gemini.chunk import TensorState
from colossalai.zero.gemini.chunk import chunk as chunks
from colossalai.zero.gemini.chunk.chunk import Chunk
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

NCCL = "NCCL"


class Streams:
    """Streams by name, each with the number of the others' operations that are done before its own next one.

    Args:
        ignored: a wait to leave out, as if the code lacked it: the waiting stream and the method called.
    """

    def __init__(self, ignored: tuple[str, str] | None = None) -> None:
        self.known: dict[str, Counter] = defaultdict(Counter)
        self.current = ["default"]
        self.made = 0
        self.ignored = ignored

    def install(self) -> None:
        accelerator = type(get_accelerator())
        accelerator.Stream = lambda *_, **__: self.stream()
        accelerator.Event = lambda *_, **__: _Event(self)
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
        if self.streams.ignored != (self.name, "wait_stream"):
            self.streams.wait(self.name, other.name)

    def wait_event(self, event: "_Event") -> None:
        if self.streams.ignored != (self.name, "wait_event"):
            self.streams.known[self.name] |= event.known

    def synchronize(self) -> None:
        self.streams.wait("default", self.name)  # the host submits later work only after this


class _Event:
    def __init__(self, streams: Streams):
        self.streams, self.known = streams, Counter()

    def record(self) -> None:
        self.known = self.streams.known[self.streams.current[-1]].copy()


class Memory:
    """The memory blocks of chunks. `hazards` counts the uses that are not ordered after those of a former owner."""

    def __init__(self, streams: Streams):
        self.streams = streams
        self.hazards: Counter[str] = Counter()
        self.free: dict[tuple[str, int], list[list]] = defaultdict(list)
        self.owned: dict[int, tuple[tuple[str, int], list, list]] = {}

    def use(self, tensor: torch.Tensor, what: str, stream: str | None = None, write: bool = True) -> None:
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


class Storages(TorchDispatchMode):
    """Every storage that torch's operations read, write or allocate while the mode is on.

    `hazards` counts the operations that miss a wait. A read has to wait for the last writes, a write for all earlier
    uses, and an allocation for all uses of the memory freed on its stream, any of which torch's allocator may return.
    """

    def __init__(self, streams: Streams):
        super().__init__()
        self.streams = streams
        self.hazards: Counter[str] = Counter()
        self.uses: dict[int, dict[tuple[str, bool], tuple[int, str]]] = {}  # the last by stream and kind
        self.owners: dict[int, tuple[StorageWeakRef, str]] = {}  # the stream that allocated it
        self.freed: dict[str, list[tuple[str, int, str]]] = defaultdict(list)

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if threading.current_thread() is not threading.main_thread():  # Gloo's
            return function(*args, **(kwargs or {}))
        self._reap()
        result = function(*args, **(kwargs or {}))
        read, written = [], []
        for position, argument in enumerate(function._schema.arguments):
            value = args[position] if position < len(args) else (kwargs or {}).get(argument.name)
            tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
            (written if argument.alias_info and argument.alias_info.is_write else read).extend(tensors)
        inputs = {_address(tensor) for tensor in (*read, *written)}
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        allocated = [tensor for tensor in outputs if _address(tensor) not in inputs]
        if not allocated and not written:
            return result  # a view, or a number for the host
        for tensor in allocated:
            self._allocate(tensor, str(function))
        for tensors, write in ((read, False), (written, True), (allocated, True)):
            for tensor in tensors:
                self.use(tensor, str(function), write=write)
        return result

    def use(self, tensor: torch.Tensor, what: str, stream: str | None = None, write: bool = True) -> None:
        stream = stream or self.streams.current[-1]
        known = self.streams.known[stream]
        known[stream] += 1
        if _address(tensor) not in self.owners:
            self._own(tensor, "default")
        uses = self.uses[_address(tensor)]
        for (where, written), (count, other) in uses.items():
            if (write or written) and known[where] < count:
                self.hazards[f"{what} on {stream} does not wait for {other} on {where}"] += 1
        uses[stream, write] = known[stream], what

    def _own(self, tensor: torch.Tensor, stream: str) -> None:
        self.owners[_address(tensor)] = StorageWeakRef(tensor.untyped_storage()), stream
        self.uses[_address(tensor)] = {}

    def _allocate(self, tensor: torch.Tensor, what: str) -> None:
        stream = self.streams.current[-1]
        for where, count, other in self.freed.pop(stream, []):
            if self.streams.known[stream][where] < count:
                self.hazards[f"{what} on {stream} gets memory and does not wait for {other} on {where}"] += 1
        self._own(tensor, stream)

    def _reap(self) -> None:
        """Return the memory of deleted storages to the streams that allocated them."""
        for address in [address for address, (storage, _) in self.owners.items() if storage.expired()]:
            _, owner = self.owners.pop(address)
            self.freed[owner] += [(where, count, what) for (where, _), (count, what) in self.uses.pop(address).items()]


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _watch_collectives(streams: Streams, use: Callable) -> None:
    order: Counter = Counter()  # collective operations of one group, which NCCL does one after another

    class Work:
        def __init__(self, *tensors: torch.Tensor):
            self.tensors: tuple[torch.Tensor, ...] = tensors  # torch keeps them until it has waited

        def wait(self) -> None:
            if streams.ignored != (streams.current[-1], "wait"):
                streams.wait(streams.current[-1], NCCL)
            self.tensors = ()

    def collective(operation: Callable) -> Callable:
        def run(output: torch.Tensor, source: torch.Tensor, *args, async_op: bool = False, **kwargs) -> Work | None:
            with _disable_current_modes():  # Gloo copies on the host
                operation(output, source, *args, **kwargs)
            stream = NCCL if async_op else streams.current[-1]
            streams.known[stream] |= streams.known[streams.current[-1]] | order
            use(output, operation.__name__, stream, write=True)
            use(source, operation.__name__, stream, write=False)
            order.update(streams.known[stream] - order)
            return Work(output, source) if async_op else None

        return run

    for name in ("reduce_scatter_tensor", "all_gather_into_tensor", "all_to_all_single"):
        setattr(dist, name, collective(getattr(dist, name)))


def watch_storages(ignored: tuple[str, str] | None = None) -> Storages:
    """Simulate streams for the life of the process; the returned mode watches storages inside a `with` block.

    Call before the model is boosted. `ignored` as in Streams.
    """
    streams = Streams(ignored)
    streams.install()
    storages = Storages(streams)
    _watch_collectives(streams, storages.use)
    return storages


def watch_chunks() -> Memory:
    """Watch Gemini's chunks for the life of the process. Call before the model is boosted."""
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
    _watch_collectives(streams, memory.use)

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
