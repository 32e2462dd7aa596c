"""The ranks of a launch: the variables that describe them, the store where they meet, and waiting for one another."""

import contextlib
import errno
import functools
import itertools
import json
import os
import socket
import sys
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.console import InputError, RunError, local_rank, rank, world_size

if TYPE_CHECKING:
    from torch.distributed import Store, TCPStore


REQUIRED = ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # beside RANK
SEVERAL = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
NOT_FIRST = ("LOCAL_RANK", "GROUP_RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
START = "start with torchrun or colossalai run"
SLURM = "set RANK and the others as scripts/slurm/pretrain.sbatch does"
BEAT_SECONDS = 10  # between signs of life of a rank; a rank that waits says so after as long
GONE_SECONDS = 120  # without a sign of life
JOIN_SECONDS = 600  # for a rank to be started at all
LAUNCHER_SECONDS = 30  # for torchrun's store to answer, which is there before its ranks
PROBE_SECONDS = 3  # for a host to accept or refuse a connection
ASK_SECONDS = 1  # for a living rank to answer
CHUNK_BYTES = 2**22  # torch's store takes 8 MiB a value


def launch_problems() -> list[str]:
    """Return one line where the environment does not describe a rank as torchrun does, though a part of it is set."""
    if "RANK" not in os.environ:
        for names, least in ((SEVERAL, 1), (NOT_FIRST, 0)):
            for name in names:
                if (value := os.environ.get(name, "")).isdecimal() and int(value) > least:
                    start = SLURM if name.startswith("SLURM") else START
                    return [f"{name} is {value}, but RANK is not set; {start}, or unset {name}"]
        return []
    if missing := [name for name in REQUIRED if not os.environ.get(name)]:
        return [f"RANK is set, but not {', '.join(missing)}; {START}, or unset RANK"]
    if not world_size():
        return [f"WORLD_SIZE is 0; {START}, or unset RANK"]
    for name, bound in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE"), ("GROUP_RANK", "GROUP_WORLD_SIZE")):
        bound = bound if bound in os.environ else "WORLD_SIZE"
        if (number := int(os.environ.get(name, 0))) >= (end := int(os.environ[bound])):
            return [f"{name} {number} is not below {bound} {end}; {START}"]
    if (here := int(os.environ.get("LOCAL_WORLD_SIZE", 1))) > world_size():
        return [f"LOCAL_WORLD_SIZE {here} is above WORLD_SIZE {world_size()}; {START}"]
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if not port.isdecimal() or not 0 < int(port) < 2**16:
        return [f"MASTER_PORT: '{port}' is not a number from 1 to 65535; give a free port of {address}"]
    try:
        socket.getaddrinfo(address, int(port), type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return [f"MASTER_ADDR: '{address}' is not the name or address of a host; give that of rank 0"]
    if _keeps_store() and not meeting.cache_info().currsize and (error := _port_error(int(port))):
        return [f"MASTER_PORT: {port} of this machine cannot be used ({error}); give a free port, or unset RANK"]
    return []


def once_per_node(function: Callable[[], Any]) -> Any:
    """Return on every rank of a node what `function` returns on its local rank 0, for as long as that takes.

    It needs no process group, so nothing times out. The value must go through JSON. All ranks of a node must call this
    in the same order.

    Raises:
        InputError: `function` has raised it on local rank 0, or the ranks cannot meet.
        RunError: local rank 0 has failed otherwise, or is gone.
    """
    return function() if world_size() == 1 else meeting().once_per_node(function)


def assemble(gpu: str = "") -> None:
    """Return when every rank has called this, so that none spends the process group's patience on another's work.

    Args:
        gpu: identifies the GPU of this rank, if it has one.

    Raises:
        InputError: a rank was not started, or two were given one GPU.
        RunError: a rank is gone.
    """
    meeting().assemble(gpu)


def part() -> None:
    """Return when every rank has come, if any had to meet: rank 0 answers those that are late. Raises as assemble."""
    if meeting.cache_info().currsize and not meeting().over.is_set():
        meeting().part()


@functools.cache
def meeting() -> "Meeting":
    """Return this process's connection to the other ranks, made on first use; see Meeting."""
    return Meeting(connect(LAUNCHER_SECONDS if _launcher_keeps_store() else JOIN_SECONDS))


def board(seconds: float) -> "Store":
    """Return the store of the launch, for what ranks say that may not have met; see connect."""
    from torch.distributed import PrefixStore

    store = meeting().connection if meeting.cache_info().currsize else connect(seconds)
    return PrefixStore(f"board/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


@contextlib.contextmanager
def _connected() -> Iterator[None]:
    """Turn the loss of the store into a line."""
    from torch.distributed import DistNetworkError

    try:
        yield
    except DistNetworkError as error:
        keeper = "torchrun" if _launcher_keeps_store() else "rank 0"
        raise RunError(f"{keeper} at {_place()} has ended, with other ranks waiting; see its own message") from error


class Meeting:
    """A rank's place in the store of its launch.

    Every rank shows there that it lives, until all have assembled: whoever waits for it waits as long as it works.
    torchrun keeps one store for all attempts of a run, so each attempt has keys of its own: rank 0 gives the prefix.
    """

    def __init__(self, store: "TCPStore"):
        from torch.distributed import PrefixStore

        self.connection = store
        self.calls = itertools.count()
        self.over = threading.Event()
        identity = uuid.uuid4().hex
        if rank() == 0:
            attempt = identity
            store.set("attempt", attempt)
            _in_background(self._answer_questions, store.clone(), attempt)  # type: ignore[attr-defined]
        else:
            attempt = _find_attempt(store, identity)
        self.store = PrefixStore(attempt, store)
        if not _launcher_keeps_store():
            self._take_rank()
        self.store.set(f"host/{rank()}", socket.gethostname())
        _in_background(self._beat, PrefixStore(attempt, store.clone()))  # type: ignore[attr-defined]
        if local_rank() == 0:
            self.store.set(f"leader/{_node()}", str(rank()))

    def once_per_node(self, function: Callable[[], Any]) -> Any:
        key = f"answer/{_node()}/{next(self.calls)}"
        if local_rank() > 0:
            return self._read_answer(key)
        try:
            value = function()
        except BaseException as error:
            with contextlib.suppress(RuntimeError):  # the store is gone too
                self._publish(key, {"problems": list(error.problems) if isinstance(error, InputError) else None})
            raise
        self._publish(key, {"value": value})
        return value

    @_connected()
    def assemble(self, gpu: str) -> None:
        """Return when every rank has come; `gpu` identifies this one's, if it has one."""
        self.store.set(f"gpu/{rank()}", json.dumps([_node(), gpu]))
        if rank() > 0:
            self._wait("assembled", 0)
        else:
            owners: dict[str, int] = {}
            for number in range(world_size()):
                self._wait(f"gpu/{number}", number)
                own = self.store.get(f"gpu/{number}").decode()
                if json.loads(own)[1] and owners.setdefault(own, number) != number:
                    problem = f"ranks {owners[own]} and {number} were given one GPU of {self._host(number)}"
                    self.store.set("problem", f"CUDA_VISIBLE_DEVICES: {problem}; give each rank a GPU of its own")
            self.store.set("assembled", "")
        self.over.set()
        if self.store.check(["problem"]):
            raise InputError(self.store.get("problem").decode())

    def part(self) -> None:
        """Return when every rank has come and, on rank 0, has read that: its store may end with it."""
        self.assemble("")
        if rank() > 0:
            self.store.set(f"parted/{rank()}", "")
        else:
            for number in range(1, world_size()):
                self._wait(f"parted/{number}", number)

    def _publish(self, key: str, answer: dict) -> None:
        data = zlib.compress(json.dumps(answer).encode(), 1)
        chunks = [data[start : start + CHUNK_BYTES] for start in range(0, len(data), CHUNK_BYTES)]
        for index, chunk in enumerate(chunks):
            self.store.set(f"{key}/{index}", chunk)  # type: ignore[arg-type]  # bytes will do
        self.store.set(key, str(len(chunks)))

    @_connected()
    def _read_answer(self, key: str) -> Any:
        self._wait(f"leader/{_node()}", None)
        leader = int(self.store.get(f"leader/{_node()}"))
        self._wait(key, leader)
        data = b"".join(self.store.get(f"{key}/{index}") for index in range(int(self.store.get(key))))
        answer = json.loads(zlib.decompress(data))
        if "value" in answer:
            return answer["value"]
        if answer["problems"] is None:
            raise RunError(f"rank {leader} on {self._host(leader)} has failed; see its own message")
        raise InputError(*answer["problems"])

    def _wait(self, key: str, number: int | None) -> None:
        """Block until `key` is set, for as long as rank `number` shows that it lives; None: the one of LOCAL_RANK 0.

        Raises:
            InputError: that rank has never been started.
            RunError: it is gone.
        """
        from torch.distributed import DistStoreError

        beat, beaten, told = 0, time.monotonic(), False
        while True:
            with contextlib.suppress(DistStoreError):
                self.store.wait([key], timedelta(seconds=BEAT_SECONDS))
                return
            now = time.monotonic()
            if number is not None and (latest := self.store.add(f"beat/{number}", 0)) != beat:
                beat, beaten = latest, now
            missing = f"rank {number}" if number is not None else f"the rank of LOCAL_RANK 0 on {_host()}"
            if not beat and now - beaten > JOIN_SECONDS:
                raise InputError(
                    f"WORLD_SIZE: {missing} has not come to {_place()} within {JOIN_SECONDS} s; "
                    f"start all {world_size()} ranks, or lower WORLD_SIZE"
                )
            if beat and now - beaten > GONE_SECONDS:
                raise RunError(
                    f"rank {number} on {self._host(number)} has shown no sign of life for {GONE_SECONDS} s, with "
                    "other ranks waiting; it has ended or is stopped: see its own message"
                )
            if not told and self.store.add(f"told/{_node()}/{key}", 1) == 1:  # one of a node is enough
                whom = f"rank {number} on {self._host(number)}" if beat else f"{missing}, which is not there yet"
                _tell(f"rank {rank()} on {_host()} waits for {whom}, at {_place()}")
            told = True

    def _host(self, number: int | None) -> str:
        return self.store.get(f"host/{number}").decode()

    def _beat(self, store: "Store") -> None:
        """Show that this rank lives."""
        while True:
            store.add(f"beat/{rank()}", 1)
            if self.over.wait(BEAT_SECONDS):
                return

    def _answer_questions(self, store: "Store", attempt: str) -> None:
        """Tell each rank that asks for it that this attempt is the living one."""
        from torch.distributed import DistStoreError

        number = 1
        while not self.over.is_set():
            with contextlib.suppress(DistStoreError):  # nobody has asked
                store.wait([f"{attempt}/question/{number}"], timedelta(seconds=BEAT_SECONDS))
                store.set(f"{attempt}/living/{store.get(f'{attempt}/question/{number}').decode()}", "")
                number += 1

    def _take_rank(self) -> None:
        """Refuse a rank that another living process of this machine has: two runs were given the same port."""
        import psutil

        own = f"{_node()} {os.getpid()} {psutil.Process().create_time()}"
        other = self.store.compare_set(f"process/{rank()}", "", own).decode()
        if other == own:
            return
        node, process, created = other.rsplit(" ", 2)
        with contextlib.suppress(psutil.NoSuchProcess):
            if node == _node() and psutil.Process(int(process)).create_time() == float(created):
                raise InputError(
                    f"MASTER_PORT: process {process} is rank {rank()} at {_place()} already; "
                    "give each run a port of its own, and each process its own RANK"
                )
        self.store.set(f"process/{rank()}", own)  # that one has ended


def _find_attempt(store: "Store", identity: str) -> str:
    """Return the prefix that the living rank 0 has given; that of an earlier attempt does not answer."""
    from torch.distributed import DistStoreError

    patience = timedelta(seconds=ASK_SECONDS)
    for elapsed in _elapsed(f"rank {rank()} on {_host()} waits for rank 0, which is not there yet, at {_place()}"):
        if elapsed > JOIN_SECONDS:
            raise InputError(f"MASTER_ADDR, MASTER_PORT: rank 0 has not come to {_place()} within {JOIN_SECONDS} s")
        with contextlib.suppress(DistStoreError), _connected():
            store.wait(["attempt"], patience)
            attempt = store.get("attempt").decode()
            number = store.add(f"{attempt}/questions", 1)
            store.set(f"{attempt}/question/{number}", identity)
            store.wait([f"{attempt}/living/{identity}"], patience)
            return attempt
    raise AssertionError("unreachable")


def _in_background(function: Callable, *arguments: Any) -> None:
    def run() -> None:
        with contextlib.suppress(RuntimeError):  # the store is gone, as the thread that waits sees too
            function(*arguments)

    threading.Thread(target=run, daemon=True).start()


def connect(seconds: float) -> "TCPStore":
    """Return a client of the store at MASTER_ADDR:MASTER_PORT; rank 0 makes the store where no launcher keeps one.

    torch.distributed's own initialization later finds the same store there.

    Raises:
        InputError: there is none within `seconds`, or rank 0 cannot make it.
    """
    from torch.distributed import TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    options: dict[str, Any] = {"wait_for_workers": False, "multi_tenant": True}
    try:
        if _keeps_store():
            store = TCPStore("localhost", port, is_master=True, timeout=timedelta(seconds=JOIN_SECONDS), **options)
            _wait_for_port(address, port, PROBE_SECONDS)
        else:
            _wait_for_port(address, port, seconds)
            store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=LAUNCHER_SECONDS), **options)
    except (OSError, RuntimeError) as error:
        if _launcher_keeps_store():
            remedy = "torchrun, which keeps the store of its ranks there, is gone; start it again, or unset RANK"
        elif rank() == 0:
            remedy = "give a free port and the address of this machine, which has RANK 0"
        else:
            remedy = "start rank 0 there, and see that no firewall is between"
        text = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error).splitlines()[0]
        raise InputError(
            f"MASTER_ADDR, MASTER_PORT: rank {rank()} cannot reach {address}:{port} ({text}); {remedy}"
        ) from error
    return store


def _wait_for_port(address: str, port: int, seconds: float) -> None:
    """Block until a port accepts connections; TCPStore itself would complain at length meanwhile."""
    message = f"rank {rank()} on {_host()} waits for rank 0, which is not there yet, at {address}:{port}"
    for elapsed in _elapsed(message):
        try:
            socket.create_connection((address, port), PROBE_SECONDS).close()
            return
        except OSError as error:
            if elapsed > seconds or isinstance(error, socket.gaierror):
                raise
        time.sleep(min(2.0, 0.1 + elapsed / 5))


def _elapsed(message: str) -> Iterator[float]:
    """Yield the seconds since the start again and again, printing a message once these are BEAT_SECONDS."""
    start, told = time.monotonic(), False
    while True:
        elapsed = time.monotonic() - start
        yield elapsed
        if not told and elapsed > BEAT_SECONDS:
            told = True
            _tell(message)


def _host() -> str:
    return socket.gethostname()


def _tell(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _place() -> str:
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def _launcher_keeps_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)  # as torch.distributed.rendezvous asks


def _keeps_store() -> bool:
    return rank() == 0 and not _launcher_keeps_store()


def _port_error(port: int) -> str | None:
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("", port))
        except OSError as error:
            return "another program uses it" if error.errno == errno.EADDRINUSE else os.strerror(error.errno or 0)
    return None


@functools.cache
def _node() -> str:
    """Name this node among those of the launch: hosts may have one name, and one host may play two nodes."""
    boot = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{os.environ.get('GROUP_RANK', '')}@{socket.gethostname()}@{boot}"
