"""Ranks of a launch: the variables that describe them, the store in which they meet, and waiting for one another."""

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
import zlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.console import InputError, RunError, first_line, local_rank, rank, world_size

if TYPE_CHECKING:
    import psutil
    from torch.distributed import Store, TCPStore

REQUIRED = ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # beside RANK
SEVERAL = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
NOT_FIRST = ("LOCAL_RANK", "GROUP_RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
START = "start with torchrun or colossalai run"
SLURM = "set RANK and the others as scripts/slurm/pretrain.sbatch does"
BEAT_SECONDS = 10  # between a rank's signs of life; a rank that has waited as long prints a line
GONE_SECONDS = 120  # without a sign of life, a rank counts as ended
JOIN_SECONDS = 600  # for a rank to be started at all
LAUNCHER_SECONDS = 30  # for torchrun's store to answer; it is there before the ranks
PROBE_SECONDS = 3  # for a host to accept or refuse a connection
CHUNK_BYTES = 2**22  # torch's store accepts 8 MiB per value


def launch_problems() -> list[str]:
    """Return one line if variables of a launcher are set, but do not describe a rank as torchrun's do."""
    if "RANK" not in os.environ:
        for names, harmless in ((SEVERAL, 1), (NOT_FIRST, 0)):
            for name in names:
                if (value := os.environ.get(name, "")).isdecimal() and int(value) > harmless:
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
    if _keeps_store() and not _has_met() and (error := _port_error(int(port))):
        return [f"MASTER_PORT: port {port} of this machine cannot be used ({error}); give a free port, or unset RANK"]
    return []


def once_per_node(function: Callable[[], Any]) -> Any:
    """Run a function on local rank 0, for as long as it takes, and return its value on every rank of the node.

    No process group is needed, so nothing times out. The value must survive JSON. All ranks of a node must make these
    calls in the same order.

    Raises:
        InputError: `function` raised it on local rank 0, or the ranks cannot meet.
        RunError: local rank 0 failed otherwise, or has ended.
    """
    return function() if world_size() == 1 else meeting().once_per_node(function)


def assemble(gpu: str = "") -> None:
    """Wait until every rank has called this, so that the process group's timeout covers no rank's earlier work.

    Args:
        gpu: identifies this rank's GPU, if it has one.

    Raises:
        InputError: a rank was not started, or two ranks have the same GPU.
        RunError: a rank has ended.
    """
    meeting().assemble(gpu)


def part() -> None:
    """Wait until every rank has called this, unless they have assembled or never met; raise as `assemble` does.

    Rank 0 may keep the store, which late ranks still have to read.
    """
    if _has_met() and not meeting().over.is_set():
        meeting().part()


@functools.cache
def meeting() -> "Meeting":
    """Return this process's connection to the other ranks, made on first use; see `Meeting`."""
    return Meeting(connect(LAUNCHER_SECONDS if launcher_keeps_store() else JOIN_SECONDS))


def launch_store(seconds: float) -> "Store":
    """Return the store of this launch, also for ranks that have not met; see `connect`."""
    return meeting().store if _has_met() else _of_this_attempt(connect(seconds))


def connect(seconds: float) -> "TCPStore":
    """Return a client of the store at MASTER_ADDR:MASTER_PORT; rank 0 creates the store if no launcher keeps one.

    torch.distributed's own initialization finds the same store there later.

    Raises:
        InputError: no store answers within `seconds`, or rank 0 cannot create it.
    """
    from torch.distributed import TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    options: dict[str, Any] = {"wait_for_workers": False, "multi_tenant": True}
    try:
        if _keeps_store():
            store = TCPStore("localhost", port, is_master=True, timeout=timedelta(seconds=JOIN_SECONDS), **options)
            _wait_for_port(address, port, PROBE_SECONDS)  # MASTER_ADDR has to lead to this machine
        else:
            _wait_for_port(address, port, seconds)
            store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=LAUNCHER_SECONDS), **options)
    except (OSError, RuntimeError) as error:
        if launcher_keeps_store():
            remedy = "torchrun, which keeps the store of its ranks there, is gone; start it again, or unset RANK"
        elif rank() == 0:
            remedy = "give a free port and the address of this machine, which has RANK 0"
        else:
            remedy = "start rank 0 there, and check that no firewall blocks the port"
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else first_line(error)
        raise InputError(
            f"MASTER_ADDR, MASTER_PORT: rank {rank()} cannot reach {address}:{port} ({reason}); {remedy}"
        ) from error
    return store


@contextlib.contextmanager
def _loss_of_store_is_a_run_error() -> Iterator[None]:
    from torch.distributed import DistNetworkError

    try:
        yield
    except DistNetworkError as error:
        keeper = "torchrun" if launcher_keeps_store() else "rank 0"
        raise RunError(f"{keeper} at {place()} has ended, with other ranks waiting; see its own message") from error


class Meeting:
    """A rank's place in the store of its launch.

    A beat in the store shows that the rank lives, until all ranks have assembled. Ranks wait for one another as long as
    the other's beat continues.
    """

    def __init__(self, connection: "TCPStore"):
        self.connection = connection
        self.store = _of_this_attempt(connection)
        self.over = threading.Event()  # all ranks have assembled
        self.calls = itertools.count()
        if launcher_keeps_store():
            self.store.set(f"process/{rank()}", _identity())
        else:
            self._take_rank()
        self.store.set(f"host/{rank()}", socket.gethostname())
        threading.Thread(target=self._beat, args=(self.another_connection(),), daemon=True).start()
        if local_rank() == 0:
            self.store.set(f"leader/{_node()}", str(rank()))

    def another_connection(self) -> "Store":
        """Return a connection to the store for another thread."""
        return _of_this_attempt(self.connection.clone())  # type: ignore[attr-defined]

    def once_per_node(self, function: Callable[[], Any]) -> Any:
        key = f"answer/{_node()}/{next(self.calls)}"
        if local_rank() > 0:
            return self._read_answer(key)
        try:
            value = function()
        except BaseException as error:
            with contextlib.suppress(RuntimeError):  # the store may be gone too
                self._publish(key, {"problems": list(error.problems) if isinstance(error, InputError) else None})
            raise
        self._publish(key, {"value": value})
        return value

    @_loss_of_store_is_a_run_error()
    def assemble(self, gpu: str) -> None:
        """Wait until every rank has called this; see the function of the same name."""
        self.store.set(f"gpu/{rank()}", json.dumps([_node(), gpu]))
        if rank() > 0:
            self._wait("assembled", 0)
        else:
            self._wait_for_all("gpu")
            self.store.set("problem", self._gpu_problem())
            self.store.set("assembled", "")
        self.over.set()
        if problem := self.store.get("problem").decode():
            raise InputError(problem)

    def part(self) -> None:
        """Assemble; then rank 0, whose store may end with it, waits until the others have read the result."""
        self.assemble("")
        if rank() > 0:
            self.store.set(f"parted/{rank()}", "")
        else:
            self._wait_for_all("parted")

    def _wait_for_all(self, key: str) -> None:
        for number in range(1, world_size()):
            self._wait(f"{key}/{number}", number)

    def _gpu_problem(self) -> str:
        """Return a line if two ranks have the same GPU, else an empty text."""
        owners: dict[str, int] = {}
        for number in range(world_size()):
            device = self.store.get(f"gpu/{number}").decode()
            if json.loads(device)[1] and owners.setdefault(device, number) != number:
                ranks = f"ranks {owners[device]} and {number} were given the same GPU of {self._host(number)}"
                return f"CUDA_VISIBLE_DEVICES: {ranks}; give each rank a GPU of its own"
        return ""

    def _publish(self, key: str, answer: dict) -> None:
        data = zlib.compress(json.dumps(answer).encode(), 1)
        chunks = [data[start : start + CHUNK_BYTES] for start in range(0, len(data), CHUNK_BYTES)]
        for index, chunk in enumerate(chunks):
            self.store.set(f"{key}/{index}", chunk)  # type: ignore[arg-type]  # it takes bytes
        self.store.set(key, str(len(chunks)))

    @_loss_of_store_is_a_run_error()
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
        """Wait until `key` is set, for as long as rank `number` shows its beat; None: this node's local rank 0.

        Raises:
            InputError: that rank was never started.
            RunError: its beat has stopped.
        """
        from torch.distributed import DistStoreError

        beat, changed, printed = 0, time.monotonic(), False
        while True:
            with contextlib.suppress(DistStoreError):
                self.store.wait([key], timedelta(seconds=BEAT_SECONDS))
                return
            now = time.monotonic()
            if number is not None and (latest := self.store.add(f"beat/{number}", 0)) != beat:
                beat, changed = latest, now
            missing = f"rank {number}" if number is not None else f"the rank of LOCAL_RANK 0 on {socket.gethostname()}"
            if not beat and now - changed > JOIN_SECONDS:
                raise InputError(
                    f"WORLD_SIZE: {missing} has not come to {place()} within {JOIN_SECONDS} s; "
                    f"start all {world_size()} ranks, or lower WORLD_SIZE"
                )
            if beat and now - changed > GONE_SECONDS:
                raise RunError(
                    f"rank {number} on {self._host(number)} has shown no sign of life for {GONE_SECONDS} s, with "
                    "other ranks waiting; it has ended or is stopped: see its own message"
                )
            if not printed and self.store.add(f"printed/{_node()}/{key}", 1) == 1:  # one rank of a node is enough
                _print_waiting(f"rank {number} on {self._host(number)}" if beat else f"{missing}, not started yet")
            printed = True

    def _host(self, number: int | None) -> str:
        return self.store.get(f"host/{number}").decode()

    def _beat(self, store: "Store") -> None:
        with contextlib.suppress(RuntimeError):  # the store is gone; a rank that waits reports that
            while True:
                store.add(f"beat/{rank()}", 1)
                if self.over.wait(BEAT_SECONDS):
                    return

    def _take_rank(self) -> None:
        """Refuse a rank that another living process of this machine has, since two runs then share a port."""
        own = _identity()
        other = self.store.compare_set(f"process/{rank()}", "", own).decode()
        if other == own:
            return
        if process := process_here(other):
            raise InputError(
                f"MASTER_PORT: process {process.pid} is rank {rank()} at {place()} already; "
                "give each run a port of its own, and each process its own RANK"
            )
        self.store.set(f"process/{rank()}", own)  # the other process has ended


def _identity() -> str:
    """Return a text that names this process among those of all nodes."""
    import psutil

    return f"{_node()} {os.getpid()} {psutil.Process().create_time()}"


def process_here(identity: str) -> "psutil.Process | None":
    """Return the process with this identity, which its rank has in the store, if it lives on this node."""
    import psutil

    node, process, created = identity.rsplit(" ", 2)
    with contextlib.suppress(psutil.NoSuchProcess):
        if node == _node() and (found := psutil.Process(int(process))).create_time() == float(created):
            return found
    return None


def _wait_for_port(address: str, port: int, seconds: float) -> None:
    """Wait until a port accepts connections; TCPStore would print pages of retries meanwhile."""
    start, printed = time.monotonic(), False
    while True:
        elapsed = time.monotonic() - start
        try:
            socket.create_connection((address, port), PROBE_SECONDS).close()
            return
        except OSError as error:
            if elapsed > seconds or isinstance(error, socket.gaierror):
                raise
        if not printed and elapsed > BEAT_SECONDS:
            printed = True
            _print_waiting("rank 0, not started yet")
        time.sleep(min(2.0, 0.1 + elapsed / 5))


def _print_waiting(whom: str) -> None:
    line = f"rank {rank()} on {socket.gethostname()} waits for {whom}, at {place()}"
    print(line, file=sys.stderr, flush=True)


def _of_this_attempt(store: "Store") -> "Store":
    """Separate the attempts of a run: torchrun keeps one store for all of them."""
    from torch.distributed import PrefixStore

    return PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _has_met() -> bool:
    return meeting.cache_info().currsize > 0


def place() -> str:
    """Return the address and port of the store."""
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def launcher_keeps_store() -> bool:
    """Return True if torchrun keeps the store, which rank 0 does otherwise."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)  # the test in torch.distributed.rendezvous


def _keeps_store() -> bool:
    return rank() == 0 and not launcher_keeps_store()


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
    """Return a unique name of this node: hosts may share a name, and one host may play two nodes."""
    boot = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{os.environ.get('GROUP_RANK', '')}@{socket.gethostname()}@{boot}"
