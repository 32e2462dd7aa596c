"""Stages of a run: other data, lengths, batches and learning rates from a token on, as `--stages FILE` describes them.

The flags describe stage 0. Each [[stage]] of the TOML file has the keys of KEYS; what it leaves out stays as it was.
legs.py plans the steps of each stage.
"""

import contextlib
import difflib
import math
import os
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

from engine.layout import Batch
from runtime.console import InputError
from runtime.files import expanded
from training.schedule import CONSTANT, PARTS, WSD, Schedule

MAX_BYTES = 2**20  # of the file
UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
END = "end_token"


@dataclass(frozen=True)
class Stage:
    """A stage after the first, as its file describes it; None: as in the stage before.

    Attributes:
        from_token: tokens after which it begins; a float below 1: that fraction of the run.
        data: weights by the names or paths of data sets.
        lr_schedule: one of PARTS; None: the learning rate goes on as without the stage.
        lr: at the beginning; None: that which the schedule before has reached.
        min_lr_ratio: fraction of `--lr` at the end; None: the run's.
    """

    from_token: int | float
    data: dict[str, float] | None = None
    max_length: int | None = None
    batch_size: int | None = None
    accumulation_steps: int | None = None
    lr_schedule: str | None = None
    lr: float | None = None
    min_lr_ratio: float | None = None


@dataclass(frozen=True)
class Stages:
    """The stages after the first, numbered from 1, and the length of the run.

    Attributes:
        end_token: tokens after which the run ends; None: `--max_steps` gives its length.
    """

    file: Path | None = None
    later: tuple[Stage, ...] = ()
    end_token: int | None = None

    def place(self, number: int, key: str) -> str:
        """Return the beginning of a message about a key of a stage."""
        return f"--stages: {self.file}, stage {number}, {key}"

    @contextlib.contextmanager
    def errors(self, number: int, key: str) -> Iterator[None]:
        """Let an InputError raised inside name a stage and its key instead of the flag."""
        try:
            yield
        except InputError as error:
            own = (problem.removeprefix("--dataset: ").removeprefix("--max_length: ") for problem in error.problems)
            raise InputError(*(f"{self.place(number, key)}: {problem}" for problem in own)) from error

    def batches(self, first: Batch) -> list[Batch]:
        """Return the batch of each stage, `first` that of the flags.

        A step keeps the tokens that it has in the stage before, unless batch_size and accumulation_steps are given.

        Raises:
            InputError: no batch of a stage's length has as many tokens.
        """
        batches = [first]
        for number, stage in enumerate(self.later, start=1):
            if (batch := _batch_after(batches[-1], stage)) is None:
                key = next(key for key in ("max_length", "batch_size", "accumulation_steps") if getattr(stage, key))
                tokens = batches[-1].sequences * batches[-1].max_length
                raise InputError(
                    f"{self.place(number, key)}: {getattr(stage, key)} does not divide the {tokens:,} tokens of a "
                    "rank's step in the stage before into equal batches; give batch_size and accumulation_steps"
                )
            batches.append(batch)
        return batches

    def problems(self, schedule: Schedule, max_steps: int | None, num_epochs: int) -> list[str]:
        """Return a line for each contradiction between the file and the flags."""
        if not self.later:
            return []
        problems = []
        if num_epochs > 1:
            problems.append("--num_epochs: a run with --stages ends at --max_steps or end_token; leave the flag out")
        if max_steps is None and self.end_token is None:
            problems.append(f"--stages: {self.file} does not say where the run ends; give --max_steps, or {END} in it")
        if max_steps is not None and self.end_token is not None:
            problems.append(f"--stages: {self.file}, {END}: --max_steps gives the run's length too; leave one out")
        fallen = False
        for number, stage in enumerate(self.later, start=1):
            if stage.lr_schedule is None:
                continue
            if schedule.lr_schedule == WSD:
                problems.append(
                    f"{self.place(number, 'lr_schedule')}: contradicts --lr_schedule wsd, which itself falls at the "
                    "end of the run; give --lr_schedule constant, or leave the key out"
                )
            if fallen and stage.lr is None:
                problems.append(
                    f"{self.place(number, 'lr_schedule')}: the stages before end with a learning rate of 0; give lr too"
                )
            fallen = stage.min_lr_ratio == 0
        return problems


def _batch_after(before: Batch, stage: Stage) -> Batch | None:
    """Return the batch of a stage, with the largest micro-batches that have no more tokens than those before."""
    length, size, steps = stage.max_length or before.max_length, stage.batch_size, stage.accumulation_steps
    tokens = before.sequences * before.max_length
    if size is None:
        most = max(1, before.batch_size * before.max_length // length)
        sizes = [tokens // (length * steps)] if steps else range(most, 0, -1)
    else:
        sizes = [size]
    if size is None or steps is None:
        whole = (size for size in sizes if size and tokens % (length * size * (steps or 1)) == 0)
        size = next(whole, None)
        if size is None:
            return None
        steps = tokens // (length * size)
    return Batch(size, steps, length)


# ------------------------------------------------------------------------------------------------------------ the file


def read_stages(path: Path, dataset: str | dict[str, float]) -> Stages:
    """Return the stages that a file describes.

    Args:
        dataset: `--dataset`; its data sets may be named as in the logs.

    Raises:
        InputError: with a line for each mistake, which names the file, the stage and the key.
    """
    content = _read(path)
    stages, problems = Stages(path), []
    tables = content.pop("stage", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise InputError(f"--stages: {path}, stage: is not a list of tables; write [[stage]], in double brackets")
    if not tables:
        raise InputError(f"--stages: {path} has no [[stage]]; describe one, or leave the flag out")
    for key, value in content.items():
        try:
            if key != END:
                below = f"stands below [[stage]]; the keys above are {END}"
                raise ValueError(below if key in KEYS else _unknown(key, [END, "stage"], f"the keys here are {END}"))
            stages = replace(stages, end_token=_end(value))
        except ValueError as error:
            problems.append(f"--stages: {path}, {_quoted(key)}: {error}")
    later = []
    for number, table in enumerate(tables, start=1):
        values: dict[str, Any] = {}
        for key, value in table.items():
            try:
                if key not in KEYS:
                    raise ValueError(_unknown(key, KEYS, f"the keys are {', '.join(KEYS)}"))
                values[key] = KEYS[key](value)
            except ValueError as error:
                problems.append(f"{stages.place(number, _quoted(key))}: {error}")
        if "from_token" not in table:
            problems.append(f'{stages.place(number, "from_token")}: is missing; give tokens, such as "900B", or 0.9')
        problems += [f"{stages.place(number, key)}: {problem}" for key, problem in _without_effect(values)]
        later.append(Stage(**{"from_token": 0, **values}))
    stages = replace(stages, later=tuple(later))
    if problems := problems or [*_out_of_order(stages)]:
        raise InputError(*problems)
    return _with_full_names(stages, [dataset] if isinstance(dataset, str) else list(dataset))


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"--stages: {path} is not a file; give a TOML file")
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise InputError(f"--stages: {path} has more than {MAX_BYTES:,} bytes; give a TOML file of stages")
        return tomllib.loads(raw.decode("utf-8-sig"))
    except OSError as error:
        raise InputError(f"--stages: {path} cannot be read ({error.strerror}); give a TOML file") from error
    except UnicodeDecodeError as error:
        raise InputError(f"--stages: {path} is not UTF-8 text; give a TOML file") from error
    except (ValueError, RecursionError) as error:
        reason = str(error).replace("\n", " ")
        raise InputError(f"--stages: {path} is not TOML: {reason}; correct it") from error


def _quoted(key: str) -> str:
    return key if key.isprintable() else repr(key)


def _unknown(key: str, known: Any, otherwise: str) -> str:
    names = {"dataset": "data", "length": "max_length", "learning_rate": "lr", "tokens": "from_token"}
    close = difflib.get_close_matches(key, [*known, *names], 1, 0.75)
    remedy = f"did you mean {names.get(close[0], close[0])}?" if close else otherwise
    return f"is not a key that is known here; {remedy}"


def _without_effect(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield keys of a stage that change nothing, with the reason."""
    for key in ("lr", "min_lr_ratio"):
        if key in values and "lr_schedule" not in values:
            yield key, "takes effect only with lr_schedule; give that too, or leave it out"
    if "min_lr_ratio" in values and values.get("lr_schedule") == CONSTANT:
        yield "min_lr_ratio", "takes no effect with the lr_schedule constant; leave it out"


def _out_of_order(stages: Stages) -> Iterator[str]:
    """Yield a line for each stage that begins no later than one before it, as far as the file tells."""
    for kind in (int, float):
        latest: int | float = 0
        for number, stage in enumerate(stages.later, start=1):
            begins = stage.from_token
            if isinstance(begins, kind):
                if begins <= latest:
                    yield (
                        f"{stages.place(number, 'from_token')}: {tokens_text(begins)} is not above the "
                        f"{tokens_text(latest)} of a stage before it; put the stages in order"
                    )
                latest = max(latest, begins)
    for number, stage in enumerate(stages.later, start=1):
        if stages.end_token is not None and stages.end_token <= stage.from_token:
            yield (
                f"{stages.place(number, 'from_token')}: {tokens_text(stage.from_token)} is not before the run's end, "
                f"{END} {stages.end_token:,}; give an earlier one"
            )


def tokens_text(tokens: int | float) -> str:
    """Return tokens, or a fraction of the run, for people."""
    return f"{tokens:,}" if isinstance(tokens, int) else f"{tokens:g}"


def _with_full_names(stages: Stages, names: list[str]) -> Stages:
    """Return the stages with the path or hub name of each data set, which may be named as in the logs."""
    known, later = {short_name(name): name for name in names}, []
    for number, stage in enumerate(stages.later, start=1):
        data = {}
        for given, weight in (stage.data or {}).items():
            short = short_name(given)
            name = known.setdefault(short, given)
            if given != name and not _same_path(given, name) and (given != short or Path(given).exists()):
                place = stages.place(number, "data")
                raise InputError(f"{place}: two data sets are called {short}, {name} and {given}; rename one")
            data[name] = weight
        later.append(replace(stage, data=data or None))
    return replace(stages, later=tuple(later))


def _same_path(one: str, other: str) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


# -------------------------------------------------------------------------------------------- the values of its keys


def _tokens(value: Any) -> int | None:
    """Parse a number of tokens: 900000, 9e11 or "900B"; return None for anything else."""
    if isinstance(value, str) and (match := re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMBT]?)", value.strip(), re.IGNORECASE)):
        value = Fraction(match[1]) * UNITS[match[2].upper()]
    number = isinstance(value, int | float | Fraction) and not isinstance(value, bool)
    return int(value) if number and 1 <= value < math.inf and value == int(value) else None


def _end(value: Any) -> int:
    if tokens := _tokens(value):
        return tokens
    raise ValueError(f'must be tokens, such as "900B" or 2_000_000, not {value!r}; correct it')


def _start(value: Any) -> int | float:
    """Parse a number of tokens, or a fraction of the run."""
    if isinstance(value, float) and value <= 1:
        tokens: int | float | None = value if 0 < value < 1 else None
    else:
        tokens = _tokens(value)
    if tokens is None:
        text = 'tokens, such as "900B" or 2_000_000, or a fraction of the run, such as 0.9'
        raise ValueError(f"must be {text}, not {value!r}; correct it")
    return tokens


def _count(value: Any, least: int = 1) -> int:
    if type(value) is not int or value < least:
        raise ValueError(f"must be a whole number of at least {least}, not {value!r}; correct it")
    return value


def _number(value: Any, least: float, most: float, text: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise ValueError(f"must be {text}, not {value!r}; correct it")
    return float(value)


def _rate(value: Any) -> float:
    return _number(value, sys.float_info.min, sys.float_info.max, "a learning rate above 0")


def _ratio(value: Any) -> float:
    return _number(value, 0, 1, "a fraction of --lr, from 0 to 1")


def _schedule(value: Any) -> str:
    if value not in PARTS:
        raise ValueError(f"must be one of {', '.join(PARTS)}, not {value!r}; correct it")
    return str(value)


def _data(value: Any) -> dict[str, float]:
    """Parse the name of a data set, or weights by name."""
    if isinstance(value, str):
        value = {value: 1.0}
    if not isinstance(value, dict) or not value:
        raise ValueError(f"must be weights by data set, such as {{web = 0.7, math = 0.3}}, not {value!r}; correct it")
    weights = {}
    for name, weight in value.items():
        if not name.isprintable():
            raise ValueError(f"{name!r} is not a name of a data set; correct it")
        text = "a weight above 0"
        weights[expanded(name)] = _number(weight, sys.float_info.min, sys.float_info.max, f"{text} for {name}")
    if problem := weights_problem(weights):
        raise ValueError(problem)
    return weights


KEYS: dict[str, Callable[[Any], Any]] = {
    "from_token": _start,
    "data": _data,
    "max_length": partial(_count, least=2),
    "batch_size": _count,
    "accumulation_steps": _count,
    "lr_schedule": _schedule,
    "lr": _rate,
    "min_lr_ratio": _ratio,
}


def weights_problem(weights: dict[str, float]) -> str | None:
    """Return a reason why data sets cannot be mixed by these weights, which are above 0."""
    names = [short_name(name) for name in weights]
    if not math.isclose(total := sum(weights.values()), 1, abs_tol=1e-6):
        return f"the weights add up to {total:g}; they must add up to 1"
    if twice := next((name for name in names if names.count(name) > 1), None):
        return f"two data sets are called {twice}; rename one, or link to it"
    return None


def short_name(dataset: str) -> str:
    """Return the name of a data set in a mixture: the last part of its path or hub name, without suffixes."""
    return Path(dataset).name.partition(".")[0] or dataset
