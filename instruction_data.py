"""What fine-tuning reads: prompts and completions, tokenized once into a folder, and batches of them.

A row holds `prompt` and `completion`, or `instruction`, `output` and perhaps `input`, or a chat's `messages`. It
becomes segments of text, of which the model is to learn some. Segments are joined so that a token never spans two: the
ids of a prompt in training are those of the same prompt alone, as the model will be asked. The folder holds

    tokens.bin      the examples' tokens, one after the other, little-endian uint16 (uint32 above 65536)
    labels.bin      one byte a token, 1 where it is to be learned
    ends.bin        the number of tokens up to the end of each example, int64
    packs.bin       the examples by pack, int64, and pack_ends.bin, the number of examples up to the end of each pack
    manifest.json

B is the batch size, S the length of its longest sequence, rounded up.
"""

import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
from bisect import bisect_left, insort
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jinja2 import TemplateError
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from console import InputError
from data_order import GlobalOrder, Order, Permutation, splitmix64
from data_utils import IGNORE_INDEX, MANIFEST_NAME, TextEncoder
from dataset_files import read_rows
from dataset_shards import follow_parent
from dataset_sources import Source
from files import checksum, exclusive_lock, sync, write_json

FORMAT_VERSION = 1
BATCH_ROWS = 256
PARALLEL_BYTES = 2**23  # of a source that several processes tokenize
SHAPES = (("prompt", "completion"), ("instruction", "output"), ("messages",))  # columns that a row may come in
PAD_MULTIPLE = 8  # lengths that tensor cores take well
WINDOW_GROUPS = 64
PACK_WINDOW = 2**14  # examples

Segment = tuple[str, bool]  # text, and whether it is to be learned


class Encoded(NamedTuple):
    """An example: ids and whether each is to be learned, [length]; whether tokens were cut off."""

    ids: np.ndarray
    labels: np.ndarray
    cut: bool


class Unusable(Exception):
    """Why a row cannot be used, in a few words."""


# ---------------------------------------------------------------------------------------------------------------- rows


def separator(prompt: str, completion: str) -> str:
    """What stands between them: nothing where either brings white space, else a space."""
    return "" if not prompt or prompt[-1].isspace() or completion[0].isspace() else " "


def row_segments(row: dict, shape: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
    """The text of a row of the columns `shape`. Raises Unusable."""
    if shape == ("messages",):
        return _chat_segments(row.get("messages"), tokenizer)
    prompt, completion = _text(row, shape[0], shape[0] == "prompt"), _text(row, shape[1])
    if shape[0] == "instruction":
        given = f"\nInput: {_text(row, 'input')}" if row.get("input") else ""
        prompt = f"Instruction: {prompt}{given}\nOutput:"
    return [(prompt, False), (separator(prompt, completion) + completion, True)]


def _text(row: dict, column: str, may_be_empty: bool = False) -> str:
    value = row.get(column)
    if value is None:
        raise Unusable(f"{column} missing or null")
    if not isinstance(value, str):
        raise Unusable(f"{column} not a string")
    if not value and not may_be_empty:
        raise Unusable(f"{column} empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Unusable(f"{column} with unpaired surrogates") from error
    return value


def _chat_segments(messages: object, tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
    """A chat as its template renders it, the answers of the role `assistant` to be learned."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise Unusable("messages not a list of objects")
    for message in messages:
        _text(message, "role")
        _text(message, "content", may_be_empty=True)
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise Unusable("messages without an answer of the role assistant")
    segments, rendered = [], ""
    for number in answers:
        try:
            before = tokenizer.apply_chat_template(messages[:number], tokenize=False, add_generation_prompt=True)
            after = tokenizer.apply_chat_template(messages[: number + 1], tokenize=False)
        except TemplateError as error:
            raise Unusable("messages that the chat template refuses") from error
        if not (before.startswith(rendered) and after.startswith(before)):
            raise Unusable("messages that the chat template renders otherwise once another follows")
        segments += [(before[len(rendered) :], False), (after[len(before) :], True)]
        rendered = after
    return segments


class ExampleEncoder:
    """Turns rows into ids and labels: BOS, the segments' tokens, EOS, at most `max_length` of them.

    Args:
        train_on_prompt: everything is to be learned, not the completion alone.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, shape: Sequence[str], max_length: int, train_on_prompt: bool
    ):
        self.tokenizer = tokenizer
        self.shape = tuple(shape)
        self.max_length = max_length
        self.train_on_prompt = train_on_prompt
        self.encoder = TextEncoder(tokenizer)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all that ids and labels depend on."""
        template = self.tokenizer.chat_template if self.shape == ("messages",) else None
        rules = [self.encoder.fingerprint, self.shape, template, self.max_length, self.train_on_prompt]
        return hashlib.sha256(json.dumps(rules).encode()).hexdigest()

    def encode(self, rows: Sequence[dict]) -> Iterator[Encoded | str]:
        """An example for each row, or the reason why there is none."""
        usable, reasons = [], {}
        for number, row in enumerate(rows):
            try:
                usable.append(row_segments(row, self.shape, self.tokenizer))
            except Unusable as reason:
                reasons[number] = str(reason)
        examples = iter(self._joined(usable))
        for number in range(len(rows)):
            yield reasons[number] if number in reasons else self._framed(*next(examples))

    def _framed(self, ids: list[int], labels: list[bool]) -> Encoded | str:
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if ids[:1] != [bos]:  # which a chat template may write itself
            ids, labels = [bos, *ids], [False, *labels]
        last_given = max((number for number, learned in enumerate(labels) if not learned), default=-1)
        if eos not in ids[last_given + 1 :]:
            ids, labels = [*ids, eos], [*labels, True]
        kept = np.array(labels[: self.max_length]) | self.train_on_prompt
        kept[0] = False  # nothing precedes it from which it could be predicted
        if not kept.any():
            return f"no token of the completion within --max_length {self.max_length}"
        return Encoded(np.array(ids[: self.max_length]), kept, len(ids) > self.max_length)

    def _joined(self, examples: list[list[Segment]]) -> list[tuple[list[int], list[bool]]]:
        """Ids of the segments in one, and whether each is to be learned."""
        texts, ids = [""] * len(examples), [[] for _ in examples]
        labels: list[list[bool]] = [[] for _ in examples]
        for depth in range(max(map(len, examples), default=0)):
            active = [number for number, segments in enumerate(examples) if len(segments) > depth]
            for number in active:
                texts[number] += examples[number][depth][0]
            joined = self._tokenize([texts[number] for number in active])
            for number, whole in zip(active, joined, strict=True):
                text, learned = examples[number][depth]
                done = len(ids[number])
                new = whole[done:] if whole[:done] == ids[number] else self._continuation(text)
                ids[number] += new
                labels[number] += [learned] * len(new)
        return list(zip(ids, labels, strict=True))

    def _continuation(self, text: str) -> list[int]:
        """Ids of a text that goes on from a token border: without the space that some tokenizers put before a text."""
        for anchor in ("\n", "0", "|"):
            before, both = self._tokenize([anchor, anchor + text])
            if both[: len(before)] == before:
                return both[len(before) :]
        return self._tokenize([text])[0]

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        """Special tokens spelled out are text, but in a chat, whose template writes them."""
        if self.shape == ("messages",):
            return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return self.encoder.tokenize(texts)


def find_shape(source: Source, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """In which columns the rows come, by the first of them.

    Raises:
        InputError: the first row has the columns of no shape, or is a chat and the tokenizer has no template for it.
    """
    file = source.files[0]
    columns = next((row.columns.keys() for row in read_rows(file.fetch(), ())), ())
    for shape in SHAPES:
        if set(shape) <= set(columns):
            if shape == ("messages",) and not tokenizer.chat_template:
                raise InputError(
                    "--tokenizer: it has no chat template, which rows of 'messages' need; give one that has"
                )
            return shape
    wanted = ", or ".join(" and ".join(f"'{column}'" for column in shape) for shape in SHAPES)
    raise InputError(
        f"--dataset: {file.path} has the columns {', '.join(columns) or '(none)'}, not {wanted}; rename them"
    )


# ------------------------------------------------------------------------------------------------------ prepared folder


def prepare_examples(source: Source, encoder: ExampleEncoder, cache_dir: Path) -> Path:
    """The folder with the examples of `source`, built in `cache_dir` unless it is there.

    One process a node builds, the others wait; a build that is killed leaves nothing that looks complete.

    Raises:
        InputError: no row can be used, or `cache_dir` cannot be written to.
    """
    key = json.dumps([FORMAT_VERSION, encoder.fingerprint, source.fingerprint])
    folder = Path(cache_dir) / f"examples-{hashlib.sha256(key.encode()).hexdigest()}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(folder.with_suffix(".lock"), "the data set is being tokenized; waiting for it"):
            if not (folder / MANIFEST_NAME).is_file():
                _build(folder, source, encoder)
    except OSError as error:
        raise InputError(
            f"--cache_dir: cannot write to {cache_dir} ({error.strerror}); give a folder with enough room"
        ) from error
    return folder


def _build(folder: Path, source: Source, encoder: ExampleEncoder) -> None:
    partial = folder.with_suffix(".partial")
    for stale in (partial, folder):
        shutil.rmtree(stale, ignore_errors=True)
    partial.mkdir()
    try:
        lengths, skipped, cut = _write_examples(partial, source, encoder)
        if not lengths:
            raise InputError(
                f"--dataset: {source.name} has no usable row (skipped: {_listing(skipped) or 'none'}); "
                "give more data, or raise --max_length if it is that"
            )
        np.cumsum(lengths, dtype="<i8").tofile(partial / "ends.bin")
        packs = pack(lengths, encoder.max_length)
        np.fromiter(itertools.chain.from_iterable(packs), "<i8").tofile(partial / "packs.bin")
        np.cumsum([len(members) for members in packs], dtype="<i8").tofile(partial / "pack_ends.bin")
        files = {path.name: checksum(path) for path in sorted(partial.iterdir())}
        manifest = {
            "format_version": FORMAT_VERSION,
            "dtype": encoder.encoder.dtype.name,
            "encoder_fingerprint": encoder.fingerprint,
            "source_fingerprint": source.fingerprint,
            "examples": len(lengths),
            "tokens": int(sum(lengths)),
            "longest": int(max(lengths)),
            "cut": cut,
            "skipped": skipped,
            "files": files,
        }
        for name in files:
            sync(partial / name)
        write_json(partial / MANIFEST_NAME, manifest)
        sync(partial)
        partial.rename(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_examples(folder: Path, source: Source, encoder: ExampleEncoder) -> tuple[list[int], Counter, int]:
    """Writes tokens.bin and labels.bin; returns the lengths, the skipped rows by reason, and how many were cut."""
    lengths, skipped, cut = [], Counter(), 0
    bar = tqdm(total=source.size, unit="B", unit_scale=True, desc="tokenizing", disable=None)
    with bar, open(folder / "tokens.bin", "wb") as tokens, open(folder / "labels.bin", "wb") as labels:
        for examples, read_bytes in _encoded_batches(source, encoder):
            for example in examples:
                if isinstance(example, str):
                    skipped[example] += 1
                    continue
                example.ids.astype(encoder.encoder.dtype).tofile(tokens)
                example.labels.tofile(labels)
                lengths.append(len(example.ids))
                cut += example.cut
            bar.update(read_bytes)
    return lengths, skipped, cut


def _encoded_batches(source: Source, encoder: ExampleEncoder) -> Iterator[tuple[list[Encoded | str], int]]:
    """Examples in the order of the rows, and how many more bytes of their file are read; on all cores if worth it."""
    workers = len(os.sched_getaffinity(0)) if source.size >= PARALLEL_BYTES else 1
    if workers == 1:
        yield from ((list(encoder.encode(rows)), read_bytes) for rows, read_bytes in _row_batches(source))
        return
    # Forked workers do not import the main program again; they use neither CUDA nor threads of their own.
    context = multiprocessing.get_context("fork")
    pending = deque()
    with ProcessPoolExecutor(workers, context, _start_worker, (encoder,)) as executor:
        for rows, read_bytes in _row_batches(source):
            pending.append((executor.submit(_encode_in_worker, rows), read_bytes))
            if len(pending) == 4 * workers:
                future, read_bytes = pending.popleft()
                yield future.result(), read_bytes
        for future, read_bytes in pending:
            yield future.result(), read_bytes


_worker_encoder: ExampleEncoder  # of a worker process


def _start_worker(encoder: ExampleEncoder) -> None:
    global _worker_encoder
    _worker_encoder = encoder
    follow_parent()


def _encode_in_worker(rows: list[dict]) -> list[Encoded | str]:
    return list(_worker_encoder.encode(rows))


def _row_batches(source: Source) -> Iterator[tuple[list[dict], int]]:
    """Rows, and how many more bytes of their file are read."""
    for file in source.files:
        rows, position, done = [], 0, 0
        for columns, position in read_rows(file.fetch(), ()):
            rows.append(columns)
            if len(rows) == BATCH_ROWS:
                yield rows, position - done
                rows, done = [], position
        yield rows, position - done


def _listing(skipped: dict[str, int]) -> str:
    return ", ".join(f"{count:,} with {reason}" for reason, count in sorted(skipped.items()))


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Groups examples so that the tokens of each group fit into `capacity`.

    Best fit, longest first, among PACK_WINDOW examples that a fixed permutation brings together.
    """
    packs, order = [], Permutation(len(lengths), seed=0, epoch=0)
    for start in range(0, len(lengths), PACK_WINDOW):
        window = [order[position] for position in range(start, min(start + PACK_WINDOW, len(lengths)))]
        open_packs: list[tuple[int, int]] = []  # room and number of each, by room
        for example in sorted(window, key=lambda example: (-lengths[example], example)):
            place = bisect_left(open_packs, (lengths[example], 0))
            if place < len(open_packs):
                room, number = open_packs.pop(place)
            else:
                room, number = capacity, len(packs)
                packs.append([])
            packs[number].append(example)
            insort(open_packs, (room - lengths[example], number))
    return packs


# ------------------------------------------------------------------------------------------------------------- data set


class InstructionDataset(Dataset):
    """The examples of a prepared folder, or packs of them.

    Items are {"input_ids": int64 [length], "labels": int64 [length]}; a pack has `position_ids` too, which restart at 0
    with each example.

    Args:
        packed: an item is a pack of examples.
        multiple: batches are padded to a multiple of it, and of PAD_MULTIPLE.

    Raises:
        InputError: a file of the folder is missing or of the wrong size.
    """

    def __init__(self, folder: Path, packed: bool = False, multiple: int = 1):
        self.folder, self.packed = Path(folder), packed
        self.multiple = int(np.lcm(PAD_MULTIPLE, multiple))
        self.group_size = 1
        self.manifest = json.loads((self.folder / MANIFEST_NAME).read_text(encoding="utf-8"))
        for name, file in self.manifest["files"].items():
            path = self.folder / name
            found = path.stat().st_size if path.is_file() else 0
            if found != file["bytes"]:
                raise InputError(
                    f"--dataset: {path} has {found} bytes instead of {file['bytes']}; "
                    "delete its folder to prepare it anew"
                )
        self._open()

    def _open(self) -> None:
        def mapped(name: str, dtype: npt.DTypeLike) -> np.memmap:
            return np.memmap(self.folder / name, dtype, mode="r")

        self._tokens = mapped("tokens.bin", np.dtype(self.manifest["dtype"]).newbyteorder("<"))
        self._labels = mapped("labels.bin", np.bool_)
        self._ends = mapped("ends.bin", "<i8")
        if self.packed:
            self._members, self._pack_ends = mapped("packs.bin", "<i8"), mapped("pack_ends.bin", "<i8")

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if not isinstance(value, np.memmap)}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return len(self._pack_ends if self.packed else self._ends)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        if not self.packed:
            return self._example(index)
        first = self._pack_ends[index - 1] if index else 0
        examples = [self._example(number) for number in self._members[first : self._pack_ends[index]]]
        item = {name: torch.cat([example[name] for example in examples]) for name in ("input_ids", "labels")}
        item["position_ids"] = torch.cat([torch.arange(len(example["labels"])) for example in examples])
        return item

    def _example(self, number: int) -> dict[str, torch.Tensor]:
        span = slice(self._ends[number - 1] if number else 0, self._ends[number])
        ids = torch.from_numpy(self._tokens[span].astype(np.int64))
        learned = torch.from_numpy(self._labels[span].copy())
        return {"input_ids": ids, "labels": ids.masked_fill(~learned, IGNORE_INDEX)}

    def length(self, index: int) -> int:
        """Tokens of an example."""
        return int(self._ends[index] - (self._ends[index - 1] if index else 0))

    def fix_order(self, saved: dict, global_batch: int) -> dict:
        """Sets the size of the groups of LengthGroupedOrder: the global batch, or that of the start of the run.

        Args:
            saved: the settings of the run that is resumed; empty for a new one.

        Returns:
            The setting to save.
        """
        self.group_size = saved.get("length_group", global_batch)
        return {"length_group": self.group_size}

    def order(self, seed: int) -> Order:
        if self.packed:
            return GlobalOrder(len(self), seed)
        return LengthGroupedOrder(self, seed, self.group_size)

    def collate(self, items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Pads on the right to the length of the longest, rounded up, where causal attention never looks.

        Returns:
            `input_ids`, `labels` and, of packs, `position_ids`, [B, S]; `token_count`, [1], without padding.
        """
        lengths = [len(item["input_ids"]) for item in items]
        longest = -(-max(lengths) // self.multiple) * self.multiple
        batch = {"token_count": torch.tensor([sum(lengths)])}
        for name, filler in (("input_ids", 0), ("labels", IGNORE_INDEX)):
            rows = [*(item[name] for item in items), torch.empty(longest, dtype=torch.int64)]
            batch[name] = pad_sequence(rows, batch_first=True, padding_value=filler)[:-1]
        if self.packed:  # padding is one more example
            rows = [torch.cat([item["position_ids"], torch.arange(longest - len(item["labels"]))]) for item in items]
            batch["position_ids"] = torch.stack(rows)
        return batch

    @property
    def mean_length(self) -> float:
        """Tokens in a sequence, without padding."""
        return self.manifest["tokens"] / len(self)

    @property
    def description(self) -> str:
        manifest = self.manifest
        packs = f" in {len(self):,} packs" if self.packed else ""
        return (
            f"{manifest['examples']:,} examples{packs} of {self.mean_length:.1f} tokens on average, the longest of "
            f"{manifest['longest']:,}; {manifest['cut']:,} cut off; "
            f"skipped rows: {_listing(manifest['skipped']) or 'none'}"
        )

    @cached_property
    def fingerprint(self) -> str:
        """Changes with tokens and labels, and with how they are put into sequences."""
        content = [self.manifest["dtype"], self.manifest["encoder_fingerprint"], self.manifest["files"], self.packed]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


class LengthGroupedOrder:
    """The endless order of a run's sequences, the same on every rank, in groups of similar length.

    Within an epoch each sequence comes exactly once. As in GlobalOrder, a permutation keyed by (seed, epoch) mixes all
    of them; each window of it is sorted by length and cut into groups, which another permutation puts in order. So a
    group is one optimizer step's worth of like lengths, while its members and its place change with the epoch.
    A function of position alone, in memory for one window.
    """

    def __init__(self, dataset: InstructionDataset, seed: int, group_size: int):
        self.dataset, self.seed, self.group_size = dataset, seed, group_size
        # At least four windows, else a small data set would have the same groups in every epoch.
        groups = min(WINDOW_GROUPS, max(1, len(dataset) // (4 * group_size)))
        self.window_size = groups * group_size
        self._cached: tuple[int, int] | None = None  # epoch and number of the window
        self._window: list[int] = []

    def __getitem__(self, position: int) -> int:
        epoch, index = divmod(position, len(self.dataset))
        window, place = divmod(index, self.window_size)
        if self._cached != (epoch, window):
            self._cached, self._window = (epoch, window), self._arranged(epoch, window)
        return self._window[place]

    def _arranged(self, epoch: int, window: int) -> list[int]:
        count = len(self.dataset)
        permutation = Permutation(count, self.seed, epoch)
        start = window * self.window_size
        members = [permutation[index] for index in range(start, min(start + self.window_size, count))]
        members.sort(key=self.dataset.length)
        whole = len(members) // self.group_size
        order = Permutation(whole, splitmix64(self.seed ^ window), epoch) if whole > 1 else range(whole)
        groups = [members[group * self.group_size :][: self.group_size] for group in order]
        return [*itertools.chain.from_iterable(groups), *members[whole * self.group_size :]]
