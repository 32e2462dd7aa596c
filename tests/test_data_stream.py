"""The stream of a data set that is not prepared: one order for any number of ranks, gone on with exactly."""

import functools
import itertools
import json
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from console import InputError
from data_order import ShardedSampler
from data_stream import StreamedDataset
from data_utils import IGNORE_INDEX
from dataset_sources import resolve_source
from tokenization import TextEncoder

LENGTH = 16
SLICES = {"arxiv": (2, 30), "c4": (3, 60), "github": (1, 15)}  # files and documents of each


@pytest.fixture(scope="module")
def encoder(sample_tokenizer):
    return TextEncoder(sample_tokenizer)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Files of three slices; every document says where it is from, some are long, some rows are not usable."""
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
    """The sequences of two epochs, in their order, as one rank reads them."""
    dataset = stream_of(source, encoder)
    return [dataset[position]["input_ids"].tolist() for position in range(400)]


def test_every_document_comes_once_an_epoch(source, encoder):
    """A buffer of one sequence shuffles nothing, so that the documents stand in the stream as they were read."""
    dataset = stream_of(source, encoder, buffer=1)
    tokens = torch.cat([dataset[position]["input_ids"] for position in range(500)]).numpy()
    starts = np.flatnonzero(tokens == encoder.tokenizer.bos_token_id)
    documents = [tuple(document) for document in np.split(tokens, starts)[1:-1]]
    expected = Counter(
        tuple(encoder.encode([document.text])[0].tolist())
        for file in source.files
        for document in file.documents()
        if document.text
    )
    first = documents[: sum(expected.values())]
    missing = expected - Counter(first)
    assert sum(missing.values()) <= len(SLICES)  # a slice may be a document ahead of the others
    slices = {encoder.tokenizer.decode(document[1:4]).split()[0] for document in first[:21]}
    assert slices == set(SLICES)  # they are mixed from the start


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 8)), min_size=1, max_size=4))
def test_any_schedule_of_ranks_and_batches_follows_one_order(source, encoder, whole, schedule):
    """Each run is other processes, which know nothing but the position and what an item of the run before had."""
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
        assert len(dataset._sequences) <= 2 * dataset.buffer
        assert len(dataset._states) <= 2


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
