"""A run on two hosts of two ranks that is disturbed again and again for some minutes, while nobody intervenes.

Each fault comes 20 to 60 s after the run has recovered from the one before. At the end the run gets SIGTERM, saves and
ends; an undisturbed run to the same step must have the same bits. See scripts/torture.py --minutes.
"""

import contextlib
import hashlib
import json
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from checkpointing.folder import complete_checkpoints
from corpus.tokenizer import load_tokenizer, vocabulary_size
from launching import ROOT, Run, free_port
from machines import INTERFACE, NAMES, Machine, obstacle, two_machines
from model_utils import load_config
from runtime.process import INTERRUPTED

HANG_SECONDS = 15  # --hang_timeout
SSH_SECONDS = 10  # after which the launcher gives up a connection without an answer
LOST_SSH = f"ssh -o ServerAliveInterval=2 -o ServerAliveCountMax={SSH_SECONDS // 2}"
SAVE_INTERVAL = 25  # steps
DISK_BYTES = 256 * 10**6  # of the file system with the checkpoints
OUTAGE_SECONDS = (5, 30)  # of the link
FULL_SECONDS = 30  # of the disk, unless a save fails before
END_SECONDS = 900  # for a run to do what it is waited for


@dataclass
class Fault:
    """A fault and what followed; times are those of time.monotonic()."""

    kind: str
    place: str
    step: int  # the last before it
    begun: float
    found: float = 0.0  # by when the run can have noticed it, and what it needs is there again
    recovered: float = 0.0  # end of the next step
    lost: int = 0  # steps that were trained again

    def __str__(self) -> str:
        effect = f"next step after {self.seconds:.1f} s, {self.beyond:.1f} s beyond detection, {self.lost} steps lost"
        return f"{self.kind}, {self.place}: {effect}"

    @property
    def seconds(self) -> float:
        return self.recovered - self.begun

    @property
    def beyond(self) -> float:
        return max(0.0, self.recovered - self.found)


@dataclass
class Output:
    """The lines of a run's output with the times at which they came."""

    run: Run
    step: int = 0
    furthest: int = 0
    step_at: float = 0.0
    attempts: int = 0  # that have begun to train
    resumed_at: int = 0  # step
    errors: list[tuple[float, str]] = field(default_factory=list)
    over: bool = False

    def follow(self) -> None:
        """Read both streams until `over`; run it in a thread."""
        with open(self.run.folder / "stdout") as out, open(self.run.folder / "stderr") as errors:
            while not self.over:
                for line in self._lines(out):
                    if match := re.match(r"step (\d+)/", line):
                        self.step, self.step_at = int(match[1]), time.monotonic()
                        self.furthest = max(self.furthest, self.step)
                    elif match := re.match(r"resumed: .*-step(\d+),", line):
                        self.resumed_at = int(match[1])
                    elif line.startswith("global batch:"):
                        self.attempts, self.resumed_at = self.attempts + 1, 0
                self.errors += [(time.monotonic(), line) for line in self._lines(errors)]
                time.sleep(0.05)

    @staticmethod
    def _lines(file) -> Iterator[str]:
        while True:
            place, line = file.tell(), file.readline()
            if not line.endswith("\n"):
                file.seek(place)
                return
            yield line.rstrip()

    def error_since(self, moment: float, text: str) -> float | None:
        """Return when a line with `text` came after a moment, or None."""
        return next((when for when, line in self.errors if when > moment and text in line), None)


class Cluster:
    """Two hosts with a disk that they share, and the runs on them."""

    def __init__(self, hosts: list[Machine], folder: Path, data: str, tokenizer: str):
        self.hosts, self.folder, self.disk = hosts, folder, folder / "disk"
        (folder / "hosts.txt").write_text("".join(f"{name}\n" for name in NAMES))
        config = load_config("test")
        config.vocab_size = max(config.vocab_size, vocabulary_size(load_tokenizer(tokenizer)))
        config.save_pretrained(folder / "model")
        self.flags = ["-c", folder / "model", "-p", "zero2", "-x", "fp32", "-l", 64, "-b", 2, "-s", 2, "-e", 10**6]
        self.flags += ["-d", data, "--tokenizer", tokenizer, "--lr_schedule", "constant", "--log_interval", 1]
        self.flags += ["-i", SAVE_INTERVAL, "--keep_checkpoints", 3, "--hang_timeout", HANG_SECONDS]

    def launch(self, name: str, saved: Path, *flags, restarts: int) -> Run:
        command = [sys.executable, ROOT / "scripts" / "run_on_hosts.py", "--nproc_per_node", 2]
        command += ["--hostfile", self.folder / "hosts.txt", "--master_port", free_port(), "--max_restarts", restarts]
        folders = ["-o", saved, "-t", self.folder / name / "tb_logs", "-f", "latest"]
        environment = {"GLOO_SOCKET_IFNAME": INTERFACE, "OMP_NUM_THREADS": "1", "LAUNCH_SSH": LOST_SSH}
        command += ["pretrain.py", *self.flags, *folders, *flags]
        return self.hosts[0].run(*command, folder=self.folder / name, **environment)

    def ranks(self) -> list[tuple[str, psutil.Process]]:
        """Return the ranks with the names of their hosts."""
        found = []
        for host in self.hosts:
            for process in host.processes("pretrain.py"):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if "--serve" in process.parent().cmdline():
                        found.append((host.name, process))
        return found

    def cut(self, down: bool) -> None:
        self.hosts[1].call("ip", "link", "set", INTERFACE, "down" if down else "up")


class Disturber:
    """Injects faults into a run, and waits after each until the run trains again."""

    def __init__(self, cluster: Cluster, run: Run, saved: Path, chance: random.Random):
        self.cluster, self.run, self.saved, self.chance = cluster, run, saved, chance
        self.output = Output(run)
        self.faults: list[Fault] = []
        self.kinds: list[Callable[[], Fault]] = []
        threading.Thread(target=self.output.follow, daemon=True).start()

    def wait_until(self, condition: Callable[[], bool], what: str, seconds: float = END_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.run.returncode is None, f"the run has ended before: {what}\n{self.run.output()}"
            assert time.monotonic() < deadline, f"not within {seconds} s: {what}\n{self.run.output()}"
            time.sleep(0.05)

    def wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        self.wait_until(lambda: time.monotonic() > end, "the next fault")

    def disturb(self) -> Fault:
        """Inject the next fault, each kind equally often, and wait for the next step."""
        if not self.kinds:
            self.kinds = [self.kill, self.stop, self.cut, self.fill, self.corrupt]
            self.chance.shuffle(self.kinds)
        furthest, attempts = self.output.furthest, self.output.attempts
        fault = self.kinds.pop()()
        if self.output.attempts > attempts or self._fails(fault):
            attempts = max(attempts + 1, self.output.attempts)
            self.wait_until(lambda: self.output.attempts >= attempts, f"an attempt after {fault.kind}")
            self._wait_for_step()
            fault.lost = max(0, max(furthest, self.output.furthest) - self.output.resumed_at)
        fault.recovered = self.output.step_at
        self.faults.append(fault)
        return fault

    def _wait_for_step(self) -> None:
        """Wait for a step of the latest attempt; that may fail too, as on a disk that is full."""
        attempts, now = -1, 0.0

        def stepped() -> bool:
            nonlocal attempts, now
            if attempts != self.output.attempts:
                attempts, now = self.output.attempts, time.monotonic()
            return self.output.step_at > now

        self.wait_until(stepped, "a step")

    def _fails(self, fault: Fault) -> bool:
        """Return True if the run has to start again; False if it trains on, some steps after the fault is over."""
        if fault.kind in ("cut link", "full disk"):
            step = self.output.step + 3
            deadline = time.monotonic() + 2 * HANG_SECONDS + SSH_SECONDS
            while time.monotonic() < deadline:
                if self.output.error_since(fault.begun, "restart "):
                    return True
                if self.output.step > step and time.monotonic() > fault.begun + SSH_SECONDS + 3:
                    return False
                time.sleep(0.05)
        return True

    def _fault(self, kind: str, place: str, detection: float = 0.0) -> Fault:
        now = time.monotonic()
        return Fault(kind, place, self.output.step, now, now + detection)

    def _rank(self) -> tuple[str, psutil.Process]:
        name, process = self.chance.choice(self.cluster.ranks())
        return f"rank {process.environ()['RANK']} on {name}", process

    def kill(self) -> Fault:
        place, process = self._rank()
        process.kill()
        return self._fault("killed rank", place)

    def stop(self) -> Fault:
        place, process = self._rank()
        process.suspend()
        return self._fault("stopped rank", place, HANG_SECONDS)

    def cut(self) -> Fault:
        outage = self.chance.uniform(*OUTAGE_SECONDS)
        self.cluster.cut(down=True)
        fault = self._fault("cut link", f"for {outage:.0f} s")
        time.sleep(outage)
        self.cluster.cut(down=False)
        fault.found = max(time.monotonic(), fault.begun + SSH_SECONDS)
        return fault

    def fill(self) -> Fault:
        """Fill the disk until a save has failed; then another run's files make room again."""
        fault, filler = self._fault("full disk", ""), self.cluster.disk / "filler"
        with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(2**12)):
                pass
        while time.monotonic() < fault.begun + FULL_SECONDS:
            if self.output.error_since(fault.begun, "could not be written"):
                break
            time.sleep(0.1)
        time.sleep(self.chance.uniform(0, 30))
        filler.unlink()
        fault.found = time.monotonic()
        fault.place = f"for {fault.found - fault.begun:.0f} s"
        return fault

    def corrupt(self) -> Fault:
        """Damage a file of the newest checkpoint, and kill a rank before there is a newer one."""
        _, newest = next(complete_checkpoints(self.saved))
        path = self.chance.choice(sorted(path for path in newest.rglob("*") if path.is_file()))
        content = bytearray(path.read_bytes())
        place = self.chance.randrange(len(content))
        if self.chance.random() < 0.5:
            content, damage = content[:place], "cut short"
        else:
            content[place] ^= 255
            damage = "a byte changed"
        path.write_bytes(content)
        self._rank()[1].kill()
        return self._fault("corrupted newest checkpoint", f"{path.relative_to(self.saved)} {damage}, a rank killed")


def digest(saved: Path, step: int) -> str:
    """Return a hash of a checkpoint's master weights and moments."""
    result = hashlib.sha256()
    (folder,) = saved.glob(f"epoch*-step{step}")
    for path in sorted((folder / "optimizer").iterdir()):
        result.update(path.read_bytes())
    return result.hexdigest()


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """Mount a small file system, which hosts that start later share."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def report(faults: list[Fault], elapsed: float, step_seconds: float, own: str) -> None:
    """Print a table of the faults, and the goodput that they leave beside the run's own figure."""
    print("\n| fault | times | to the next step: median, worst, s | worst beyond detection, s | steps lost: mean |")
    print("|---|---|---|---|---|")
    for kind in [*sorted({fault.kind for fault in faults}), "all"]:
        of_kind = [fault for fault in faults if kind in (fault.kind, "all")]
        seconds = [fault.seconds for fault in of_kind]
        beyond, lost = max(fault.beyond for fault in of_kind), statistics.mean(fault.lost for fault in of_kind)
        median, worst = statistics.median(seconds), max(seconds)
        print(f"| {kind} | {len(of_kind)} | {median:.1f}, {worst:.1f} | {beyond:.1f} | {lost:.0f} |")
    waited, repeated = sum(fault.seconds for fault in faults), step_seconds * sum(fault.lost for fault in faults)
    left = 1 - (waited + repeated) / elapsed
    print(
        f"\n{len(faults)} faults in {elapsed / 60:.1f} minutes. Of that time {waited / elapsed:.1%} passed between a "
        f"fault and the next step, and {repeated / elapsed:.1%} in steps trained again ({step_seconds * 1000:.0f} ms "
        f"each): the faults leave {left:.1%}\n{own}"
    )


def steps_logged(logs: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (logs / "metrics.jsonl").read_text().splitlines()]


def torture(data: str, tokenizer: str, minutes: float, seed: int, pause: tuple[float, float] = (20, 60)) -> bool:
    """Disturb a run for some minutes, print what happened, and return True if nothing was lost.

    Args:
        pause: least and most seconds between a recovery and the next fault.
    """
    if reason := obstacle():
        print(f"two hosts are not possible here: {reason}")
        return False
    chance, folder = random.Random(seed), Path(tempfile.mkdtemp(prefix="torture-"))
    saved = folder / "disk" / "checkpoint"
    with small_disk(folder / "disk"), two_machines(folder) as hosts:
        cluster = Cluster(hosts, folder, data, tokenizer)
        with cluster.launch("disturbed", saved, restarts=1000) as run:
            disturber = Disturber(cluster, run, saved, chance)
            output = disturber.output
            disturber.wait_until(lambda: output.step > SAVE_INTERVAL + 5, "the first checkpoint")
            started = time.monotonic()
            while time.monotonic() < started + 60 * minutes:
                disturber.wait(chance.uniform(*pause))
                fault = disturber.disturb()
                print(f"{(fault.begun - started) / 60:4.1f} min, step {fault.step}: {fault}", flush=True)
            elapsed = time.monotonic() - started
            hosts[0].processes("--max_restarts")[0].send_signal(signal.SIGTERM)
            status = run.wait(END_SECONDS)
            output.over = True
        steps = steps_logged(folder / "disturbed" / "tb_logs")
        whole = status == INTERRUPTED and steps == list(range(1, steps[-1] + 1))
        print(f"the disturbed run ended with status {status} after {steps[-1]} steps", flush=True)
        shutil.copytree(saved, folder / "disturbed" / "checkpoint", ignore=shutil.ignore_patterns("*.damaged"))
        shutil.rmtree(saved)
        disturbed = digest(folder / "disturbed" / "checkpoint", steps[-1])
        with cluster.launch("undisturbed", saved, "--max_steps", steps[-1], restarts=0) as quiet:
            assert quiet.wait(60 * 60) == 0, quiet.output()
        same = digest(saved, steps[-1]) == disturbed
    rows = (folder / "undisturbed" / "tb_logs" / "metrics.jsonl").read_text().splitlines()
    tokens = statistics.median(json.loads(row)["tokens_per_second"] for row in rows)
    step_seconds = json.loads(rows[-1])["tokens"] / len(rows) / tokens
    own = re.findall(r"^goodput: .*", run.stdout, re.MULTILINE)
    report(disturber.faults, elapsed, step_seconds, own[-1] if own else "the run has printed no goodput")
    print(f"every step logged once: {'yes' if whole else 'NO'}; the undisturbed run's bits: {'yes' if same else 'NO'}")
    if same and whole:
        shutil.rmtree(folder)
    else:
        print(f"kept in {folder}")
    return same and whole
