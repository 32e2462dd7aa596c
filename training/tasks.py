"""The tasks of lm-evaluation-harness, an optional package, on which a run's checkpoints are evaluated."""

import difflib
import importlib
import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpointing.writer import Retention
from runtime.console import InputError, below, first_line, local_world_size, rank
from runtime.ranks import once_per_node
from runtime.requirements import installed

PACKAGE, VERSION = "lm_eval", "0.4.13"  # the tested one
CPU = "cpu"
LOADED = "loaded"  # file by which an evaluation tells that it has read the checkpoint
CLOSE = 0.6  # similarity of a task's name to an unknown one, from 0 to 1 (difflib)
KINDS = ("group", "task")  # keys that name what a task file describes


@dataclass(frozen=True)
class Tasks:
    """The tasks, and when and where they are evaluated; the fields are the flags of their names."""

    eval_tasks: tuple[str, ...] = ()  # names, files, and folders of files
    eval_tasks_interval: int | None = None  # steps; None: --save_interval
    eval_tasks_device: str | None = None  # None: the CPU
    tokenizer: str | None = None

    def interval(self, retention: Retention) -> int:
        """Return the steps between evaluations; 0: only the end of the run is evaluated."""
        return retention.save_interval if self.eval_tasks_interval is None else self.eval_tasks_interval

    @property
    def device(self) -> str:
        return CPU if self.eval_tasks_device is None else self.eval_tasks_device

    def describe(self, retention: Retention) -> str:
        every = f"every {interval:,} steps and " if (interval := self.interval(retention)) else ""
        return f"{', '.join(self.eval_tasks)}: evaluated {every}at the end, on {self.device}, beside the training"

    def problems(self, retention: Retention) -> list[str]:
        """Return a line for each flag that is wrong or without effect."""
        given = {"interval": self.eval_tasks_interval, "device": self.eval_tasks_device}
        if not self.eval_tasks:
            return [
                f"--eval_tasks_{name}: takes effect only with --eval_tasks; give that too, or leave it out"
                for name, value in given.items()
                if value is not None
            ]
        problems = below(1, eval_tasks_interval=self.eval_tasks_interval)
        interval, saved = self.eval_tasks_interval, retention.save_interval
        if not problems and interval is not None and not retention.is_due(interval):
            remedy = f"give {-(-interval // saved) * saved}" if saved > 0 else "leave it out, as only the end is saved"
            problems.append(
                f"--eval_tasks_interval: {interval} is not a multiple of --save_interval {saved}, and only saved "
                f"checkpoints can be evaluated; {remedy}, or give -i {interval}"
            )
        return problems + device_name_problems(self.device)


def check_tasks(tasks: Tasks, dry_run: bool) -> None:
    """Check on rank 0, whose machine evaluates, that the tasks exist, and that the GPU is no rank's.

    Args:
        dry_run: the GPUs of the run need not be there.

    Raises:
        InputError: on every rank of that machine.
    """

    def check() -> None:
        if rank() > 0:
            return
        if not importlib.util.find_spec(PACKAGE):
            install = f"install it with `pip install {PACKAGE}=={VERSION}`"
            raise InputError(f"--eval_tasks: the package {PACKAGE} is not installed; {install}, or leave the flag out")
        if problems := [] if dry_run else device_problems(tasks.device, local_world_size()):
            raise InputError(*problems)
        resolve(tasks.eval_tasks)

    if tasks.eval_tasks:
        once_per_node(check)


def device_name_problems(device: str) -> list[str]:
    """Return a line if the name is neither the CPU's nor a GPU's."""
    if device == CPU or re.fullmatch(r"cuda:\d+", device):
        return []
    return [f"--eval_tasks_device: '{device}' is neither {CPU} nor cuda:N; give one of these"]


def device_problems(device: str, used: int = 0) -> list[str]:
    """Return a line if the device is a GPU that is not there, or one of the first `used`, on which ranks train."""
    if device == CPU:
        return []
    number, gpus = gpu_number(device), torch.cuda.device_count()
    if used <= number < gpus:
        return []
    free = " or ".join([*(f"cuda:{other}" for other in range(used, gpus)), CPU])
    if number < gpus:
        remedy = f"give {free}" if used < gpus else f"start fewer ranks (--nproc_per_node), or give {CPU}"
        return [f"--eval_tasks_device: the run trains on {device}; {remedy}"]
    return [f"--eval_tasks_device: {device} is none of the {gpus} visible GPUs; give {free}"]


def gpu_number(device: str) -> int:
    return int(device.removeprefix("cuda:"))


def is_path(item: str) -> bool:
    """Return True if an item of --eval_tasks is a task file or a folder of them, not a name."""
    return "/" in item or item.endswith((".yaml", ".yml"))


def resolve(items: Sequence[str]) -> tuple[Any, list[str]]:
    """Return lm_eval's manager of tasks, and the names of those whose scores are asked for.

    Args:
        items: names, in which `*` stands for any text; task files; folders of task files.

    Raises:
        InputError: with a line for each item that is unknown or cannot be read.
    """
    problems: list[str] = []
    own: dict[str, Any] = {}  # by name, what the files describe
    try:
        read = {item: _read(Path(item), own, problems) for item in items if is_path(item)}
        inner = inside(list(own), own)
        # Its own thousands of files take seconds to read.
        defaults = len(read) < len(items) or not inner <= own.keys()
        manager = importlib.import_module(f"{PACKAGE}.tasks").TaskManager(include_defaults=defaults)
        manager.task_index.update(own)
        found = {item: read[item] if item in read else manager.match_tasks([item]) for item in items}
    except Exception as error:  # another version, or one whose packages are missing
        raise InputError(
            f"--eval_tasks: {PACKAGE} {installed(PACKAGE)} cannot list its tasks ({first_line(error)}); "
            f"install {VERSION}, or leave the flag out"
        ) from error
    index = manager.task_index
    problems += [_unknown(item, manager.all_tasks) for item in items if item not in read and not found[item]]
    problems += [
        f"--eval_tasks: a group of yours has '{member}', which is no task; give its file too, or their folder"
        for member in sorted(inner - index.keys())
    ]
    names = [name for item in items for name in found[item] if item not in read or name not in inner]
    problems += [
        f"--eval_tasks: {name} runs programs that the model writes, which is not supported; leave it out"
        for name in names
        if (index[name].cfg or {}).get("unsafe_code")
    ]
    if problems:
        raise InputError(*problems)
    return manager, list(dict.fromkeys(names))


def inside(names: Sequence[str], index: dict[str, Any]) -> set[str]:
    """Return the names in the groups and tags among `names`, and in those inside them.

    Args:
        index: lm_eval's entries by name.
    """
    found: set[str] = set()
    for entry in (index[name] for name in names if name in index):
        members = list(entry.tags) if entry.kind.name == "TAG" else (entry.cfg or {}).get("task")
        for member in members if isinstance(members, list) else ():  # else it is a task's name
            changed = {"task": member} if isinstance(member, str) else member
            name = changed.get("task", changed.get("group"))
            if isinstance(name, str) and "dataset_path" not in changed:  # else it is described right there
                found |= {name, *inside([name], index)}
    return found


def _read(path: Path, own: dict[str, Any], problems: list[str]) -> list[str]:
    """Add what a task file, or each in a folder, describes to `own`, and return the names."""
    parse = importlib.import_module(f"{PACKAGE}.tasks._index").TaskIndex.process_cfg
    load = importlib.import_module(f"{PACKAGE}.tasks._yaml_loader").load_yaml
    if not path.exists():
        problems.append(f"--eval_tasks: {path} does not exist; give a task file (.yaml), a folder of them, or a name")
        return []
    names, wrong = [], []
    for file in sorted(path.absolute().rglob("*.yaml")) if path.is_dir() else [path.absolute()]:
        try:
            content = load(file, resolve_func=False)
            name = next((content[kind] for kind in KINDS if isinstance(content.get(kind), str)), None)
            if name is None:  # it is for other files to include
                continue
            if name not in own:
                parse(content, file, own)
            elif own[name].yaml_path != file:
                wrong.append(f"--eval_tasks: {file} and {own[name].yaml_path} both describe {name}; rename one")
            names.append(name)
        except Exception as error:  # of many kinds
            wrong.append(f"--eval_tasks: {file} cannot be read ({first_line(error)}); correct it")
    if not names and not wrong:
        where = "no .yaml file in it has" if path.is_dir() else "it lacks"
        wrong.append(f"--eval_tasks: {path} describes no task: {where} a line `task: NAME`")
    problems += wrong
    return names


def _unknown(item: str, known: list[str]) -> str:
    close = difflib.get_close_matches(item, known, 1, CLOSE)
    advice = f"did you mean {close[0]}? `lm_eval ls tasks` lists all" if close else "`lm_eval ls tasks` lists all"
    if Path(item).is_dir():
        advice = f"for the folder of that name give {item}/"
    return f"--eval_tasks: {PACKAGE} has no task '{item}'; {advice}"
