"""Streams of data sets that are not prepared: one order for any number of ranks, continued exactly."""

import functools
import gzip
import itertools
import json
import os
import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from random import Random

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import sentencepiece
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from corpora import documents_in, error_of
from corpus.encoder import TextEncoder
from corpus.order import Permutation, splitmix64
from corpus.rows import read_rows
from corpus.sources import Source, SourceFile, resolve_source
from data_utils import StreamedDataset
from model_utils import IGNORE_INDEX
from pretrain import parse_args
from runs import run_from
from runtime.console import InputError
from training.batches import ShardedSampler
from training.plan import make_plan
from training.run import TrainState

LENGTH = 16
SLICES = {"arxiv": (2, 30), "c4": (3, 60), "github": (1, 15)}  # files and documents of each


@pytest.fixture(scope="module")
def encoder(sample_tokenizer):
    return TextEncoder(sample_tokenizer)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Files of three slices; each document names its slice and file, some are long, some rows are unusable."""
    folder = tmp_path_factory.mktemp("stream")
    for name, (files, documents) in SLICES.items():
        (folder / name).mkdir()
        for file in range(files):
            rows = [
                {"text": f"{name} {file} {number} " * (1 + 40 * (number % 7 == 3))}
                for number in range(documents // files)
            ]
            rows[1:1] = [{"text": None}, {"text": ""}]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / name / f"{file}.jsonl").write_text(text, encoding="utf-8")
    return resolve_source(str(folder))


def stream_of(source, encoder, buffer=8, **options):
    return StreamedDataset(source, encoder, LENGTH, seed=1, buffer=buffer, **options)


@pytest.fixture(scope="module")
def whole(source, encoder):
    """The sequences of two epochs in the order in which one rank reads them."""
    dataset = stream_of(source, encoder)
    return [dataset[position]["input_ids"].tolist() for position in range(400)]


def test_every_document_comes_once_an_epoch(source, encoder):
    """A buffer of one sequence shuffles nothing, so the documents come in the order in which they are read."""
    dataset = stream_of(source, encoder, buffer=1)
    tokens = torch.cat([dataset[position]["input_ids"] for position in range(500)]).numpy()
    starts = np.flatnonzero(tokens == encoder.tokenizer.bos_token_id)
    documents = [tuple(document) for document in np.split(tokens, starts)[1:-1]]
    expected = Counter(
        tuple(encoder.encode([document.text])[0].tolist()) for document in documents_in(source) if document.text
    )
    first = documents[: sum(expected.values())]
    missing = expected - Counter(first)
    assert sum(missing.values()) <= len(SLICES)  # a slice may be a document ahead of the others
    slices = {encoder.tokenizer.decode(document[1:4]).split()[0] for document in first[:21]}
    assert slices == set(SLICES)  # they are mixed from the start


@pytest.mark.slow
@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 8)), min_size=1, max_size=4))
def test_any_schedule_of_ranks_and_batches_follows_one_order(source, encoder, whole, schedule):
    """Each run has new processes, which know only the position and the `stream` of the previous run's last item."""
    followed, state = [], None
    for ranks, batch, steps in schedule:
        start = len(followed)
        stop = start + ranks * batch * steps
        shares, states = [], []
        for rank in range(ranks):
            dataset = stream_of(source, encoder)
            dataset.resume(json.loads(json.dumps(state)))
            sampler = ShardedSampler(dataset, ranks, rank, seed=1, start=start, stop=stop, order=dataset.order)
            items = [dataset[position] for position in sampler]
            shares.append([item["input_ids"].tolist() for item in items])
            states.append(items[-1]["stream"])
        followed += itertools.chain(*zip(*shares, strict=True))
        state = states[0]
    assert followed == whole[: len(followed)]


def test_through_a_loader_process(source, encoder, whole):
    dataset = stream_of(source, encoder)
    sampler = ShardedSampler(dataset, 2, 1, seed=1, start=4, stop=84, order=dataset.order)
    batches = list(DataLoader(dataset, batch_size=4, sampler=sampler, num_workers=1, collate_fn=dataset.collate))
    assert torch.cat([batch["input_ids"] for batch in batches]).tolist() == whole[5:84:2]
    assert json.loads(batches[-1]["stream"])["buffer"] == 83 // 8


def test_weights(source, encoder):
    dataset = stream_of(source, encoder, slice_weights={"github": 3.0, "c4": 1.0})
    text = " ".join(encoder.tokenizer.decode(dataset[position]["input_ids"]) for position in range(400))
    shares = {name: text.count(name) for name in SLICES}
    assert shares["arxiv"] == 0
    assert shares["github"] / shares["c4"] == pytest.approx(3, rel=0.3)


def test_memory_is_two_buffers(source, encoder):
    dataset = stream_of(source, encoder)
    for position in range(0, 200, 3):
        dataset[position]
        assert sum(len(sequences) for _, sequences in dataset._buffers.values()) <= 2 * dataset.buffer
        assert len(dataset._buffers) <= 2


def test_documents_are_marked(source, encoder):
    ends = (encoder.tokenizer.bos_token_id, encoder.tokenizer.eos_token_id)
    item = stream_of(source, encoder, document_ends=ends)[0]
    assert ((item["labels"] == IGNORE_INDEX) == (item["position_ids"] == 0)).all()


def test_what_cannot_be_streamed(source, encoder, tmp_path):
    make = functools.partial(StreamedDataset, encoder=encoder, max_length=LENGTH, seed=1, buffer=8)
    with pytest.raises(InputError, match=r"no file of books; they have arxiv, c4, github"):
        make(source, slice_weights={"books": 1.0})
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n', encoding="utf-8")
    with pytest.raises(InputError, match="the slice empty has no usable document"):
        make(resolve_source(str(tmp_path)))[0]


# A slow, obvious reading of files of every kind, for reference.

KINDS = (".jsonl", ".gz", ".zst", ".parquet", ".arrow")


def write_file(path, texts, batch_rows):
    """Writes a row per text, in batches or row groups of `batch_rows`."""
    lines = "".join(json.dumps({"text": text}) + "\n" * (1 + number % 2) for number, text in enumerate(texts)).encode()
    table = pa.table({"text": pa.array(texts, pa.string())})
    match path.suffix:
        case ".jsonl":
            path.write_bytes(lines)
        case ".gz":
            path.write_bytes(gzip.compress(lines, mtime=0))
        case ".zst":
            path.write_bytes(pa.compress(lines, "zstd", asbytes=True))
        case ".parquet":
            pa.parquet.write_table(table, path, row_group_size=batch_rows)
        case ".arrow":
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
                stream.write_table(table, batch_rows)


def read_file(path):
    """Each text, with the number of bytes read up to it; these small compressed files are read at once."""
    size = path.stat().st_size
    match path.suffix:
        case ".jsonl":
            ends = itertools.accumulate(map(len, path.read_bytes().splitlines(keepends=True)))
            rows = zip(path.read_bytes().splitlines(), ends, strict=True)
            return [(json.loads(line)["text"], end) for line, end in rows if line]
        case ".gz":
            return [
                (json.loads(line)["text"], size) for line in gzip.decompress(path.read_bytes()).split(b"\n") if line
            ]
        case ".zst":
            content = pa.CompressedInputStream(str(path), "zstd").read()
            return [(json.loads(line)["text"], size) for line in content.split(b"\n") if line]
        case ".parquet":
            texts = pa.parquet.read_table(path)["text"].to_pylist()
            ends = [min(len(texts), number // 64 * 64 + 64) for number in range(len(texts))]
            return [(text, size * end // len(texts)) for text, end in zip(texts, ends, strict=True)]
        case ".arrow":
            with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
                return [(text, file.tell()) for batch in stream for text in batch["text"].to_pylist()]


def documents_of_slice(files, key):
    """The usable texts of a slice, endlessly, each with the number of epochs read up to it."""
    sizes = [path.stat().st_size for path in files]
    for epoch in itertools.count():
        before = 0
        for number in Permutation(len(files), key, epoch):
            for text, position in read_file(files[number]):
                if text:
                    yield text, epoch + (before + position) / sum(sizes)
            before += sizes[number]


def reference_order(slices, weights, tokenizer, length, seed, buffer, count):
    """The first sequences of the stream, computed from the files alone: the slice that is most behind comes next."""
    names = sorted(name for name in slices if not weights or name in weights)
    readers = {
        name: documents_of_slice(slices[name], splitmix64(splitmix64(seed) ^ number))
        for number, name in enumerate(names)
    }
    model = sentencepiece.SentencePieceProcessor(model_file=tokenizer.vocab_file)
    progress, tokens, stream = dict.fromkeys(names, 0), Counter(), []
    while len(stream) < (count + buffer) * length:
        name = min(names, key=progress.get)
        text, share = next(readers[name])
        document = [model.bos_id(), *model.encode(text), model.eos_id()]
        tokens[name] += len(document)
        progress[name] = tokens[name] / weights[name] if weights else share
        stream += document
    sequences = [stream[start : start + length] for start in range(0, len(stream), length)]
    return [
        sequences[number - number % buffer + Permutation(buffer, seed, number // buffer)[number % buffer]]
        for number in range(count)
    ]


def follow(make, state, start, stop, ranks, workers, batch):
    """The sequences of a run between two positions, and the state it saves: that of rank 0's last batch."""
    found = {}
    for rank in range(ranks):
        positions = ShardedSampler(range(1), ranks, rank, seed=0, start=start, stop=stop).positions
        batches = [positions[place : place + batch] for place in range(0, len(positions), batch)]
        datasets = [make() for _ in range(workers)]
        for dataset in datasets:
            dataset.resume(state)
        for number, batch_positions in enumerate(batches):
            dataset = datasets[number % workers]
            items = [dataset[position] for position in batch_positions]
            found.update(zip(batch_positions, (item["input_ids"].tolist() for item in items), strict=True))
            if rank == 0:
                saved = json.loads(dataset.collate(items)["stream"])
    return [found[position] for position in range(start, stop)], saved


class RememberingEncoder(TextEncoder):
    """Encodes each text once, since every rank and loader process of every run needs it."""

    def encode(self, documents, threads=1):
        return [self.encode_one(document) for document in documents]

    @functools.cache  # noqa: B019
    def encode_one(self, document):
        return super().encode([document])[0]


@pytest.fixture(scope="module")
def remembering(tokenizer):
    return RememberingEncoder(tokenizer)


def draw_files(random, folder):
    """At most nine files by slice, and the source that `resolve_source` would return for them."""
    slices, found = {}, []
    for name in "abc"[: random.choice((1, 2, 2, 3))]:
        for number in range(random.randint(1, 3)):
            path = Path(folder, f"{name}{number}{random.choice(KINDS)}")
            rows = random.choice((random.randint(1, 9), random.randint(65, 200), random.randint(65, 200)))
            texts = [(f"{name}{number} {row} " * (1 + row % 3), None, "")[row % 5 % 4 % 3] for row in range(rows)]
            write_file(path, texts, batch_rows=random.randint(1, 100))
            slices.setdefault(name, []).append(path)
            status = path.stat()
            found.append(SourceFile(path.name, name, status.st_size, str(status.st_mtime_ns), str(folder)))
    return slices, Source("x", found)


# Hypothesis draws the seeds alone: its own draws of files are alike, and too small for row groups to count.
@pytest.mark.slow
@settings(deadline=None, max_examples=100, phases=[Phase.generate])
@given(case=st.integers(0, 2**32))
def test_every_kind_of_file_goes_on_where_it_stopped(remembering, case):
    """Runs stop and resume on other ranks and loader processes; some sources are shorter than a buffer."""
    random = Random(case)
    with tempfile.TemporaryDirectory() as folder:
        slices, source = draw_files(random, folder)
        weights = random.choice((None, None, None, {name: random.uniform(0.1, 10) for name in slices}))
        length = random.choice((random.randint(3, 8), random.randint(30, 90), random.randint(30, 90)))
        buffer, seed = random.randint(1, 40), random.randrange(2**32)
        runs = [[random.randint(1, most) for most in (3, 2, 4, 9)] for _ in range(random.randint(2, 5))]
        make = functools.partial(StreamedDataset, source, remembering, length, seed, buffer, slice_weights=weights)
        count = sum(ranks * batch * steps for ranks, _, batch, steps in runs)
        expected = reference_order(slices, weights, remembering.tokenizer, length, seed, buffer, count)
        position, state = 0, None
        for ranks, workers, batch, steps in runs:
            stop = position + ranks * batch * steps
            sequences, state = follow(make, state, position, stop, ranks, workers, batch)
            assert sequences == expected[position:stop]
            position = stop


@pytest.mark.slow
@pytest.mark.parametrize("suffix", KINDS)
def test_bytes_read_do_not_depend_on_the_row_that_reading_starts_at(tmp_path, suffix):
    """A stream mixes slices by these bytes. Compressed files take many chunks; row groups are no multiple of 64."""
    path = tmp_path / f"x{suffix}"
    write_file(path, [f"{number} {number**400}" for number in range(3000)], 100)
    rows = list(read_rows(path, ["text"]))
    assert len({row.position for row in rows}) > 3
    for start in (1, 64, 100, 150, 228, 2999, 3000):
        assert list(read_rows(path, ["text"], start_row=start)) == rows[start:]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("--shuffle_buffer 4", "refused"),
        ("--shuffle_buffer 32", "refused"),
        ("-l 8", "from the beginning"),
        ("--seed 2", "from the beginning"),
        ("--slice_weights c4=1", "from the beginning"),
        ("--slice_weights c4=1 --shuffle_buffer 4", "from the beginning"),
        ("--document_mask", "goes on"),
        ("-b 1", "goes on"),
        ("--num_workers 3", "goes on"),
        ("--lr 1", "goes on"),
    ],
)
def test_settings_that_a_resume_may_change(source, encoder, change, expected):
    """A setting that would change the position is refused, even with --allow_changes."""

    def plan(state, flags):
        flags = ["-p", "zero2", "--gpus", "4", "-s", "0", "-b", "2", "--max_steps", "9", "--streaming", *flags.split()]
        args = parse_args(flags)
        document_ends = (1, 2) if args.document_mask else None
        order = {"document_ends": document_ends, "slice_weights": args.slice_weights}
        data = StreamedDataset(source, encoder, args.max_length, args.seed, args.shuffle_buffer, **order)
        make_plan(run_from(*flags), [data], state)
        return data

    first = "-l 16 --seed 1 --shuffle_buffer 8 "
    state = TrainState()
    items = [plan(state, first)[position] for position in range(20)]
    state.step, state.sequences, state.stream = 5, 20, items[-1]["stream"]
    saved = TrainState(**json.loads(json.dumps(asdict(state))))
    if expected == "refused":
        message = error_of(plan, saved, f"{first} {change} --allow_changes")
        assert message.startswith("--load: --shuffle_buffer was 8 in the checkpoint and is ")
        assert message.endswith("now; give 8, or the stream cannot continue exactly")
        return
    plan(saved, f"{first} {change} --allow_changes")
    assert (saved.sequences, saved.stream) == ((20, state.stream) if expected == "goes on" else (0, None))


def test_a_slice_without_documents_is_refused_at_the_start(tmp_path, encoder):
    for name, text in (("good", "x"), ("null", None)):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": text}) + "\n")
    make = functools.partial(StreamedDataset, resolve_source(str(tmp_path)), encoder, LENGTH, seed=1, buffer=8)
    assert error_of(make().check).startswith("--dataset: the slice null has no usable document")
    make(slice_weights={"good": 1.0}).check()


def test_a_file_that_changes_while_it_is_read(tmp_path, encoder):
    """All rows come from one version of the file, or one line says otherwise, even if the size is the same."""
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "one"}\n')
    dataset = StreamedDataset(resolve_source(str(path)), encoder, LENGTH, seed=1, buffer=1)
    path.write_text('{"text": "two"}\n')
    os.utime(path, ns=(0, 0))
    assert error_of(dataset.__getitem__, 0) == f"--dataset: {path} has changed since it was found; start again"
    path.unlink()
    assert error_of(dataset.__getitem__, 0).startswith(f"--dataset: {path} cannot be read (No such file")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_skipped_rows_are_reported(tmp_path, encoder, num_workers, capfd, monkeypatch):
    texts = [None, "a", "", None, *["b", None] * 8, "c"]
    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    dataset = StreamedDataset(
        resolve_source(str(tmp_path)), encoder, LENGTH, seed=1, buffer=1, slice_weights={"one": 1.0}
    )
    dataset.check()
    assert not capfd.readouterr().out
    list(DataLoader(dataset, None, sampler=range(3), num_workers=num_workers))
    assert capfd.readouterr().out.splitlines()[:3] == [
        "slice one: skipped rows so far: 1 with text missing or null; the last is row 1 of one.jsonl",
        "slice one: skipped rows so far: 1 with text empty, 1 with text missing or null; "
        "the last is row 3 of one.jsonl",
        "slice one: skipped rows so far: 1 with text empty, 9 with text missing or null; "
        "the last is row 18 of one.jsonl",
    ]
