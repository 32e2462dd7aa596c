"""Writers of rows in every file format that the programs read."""

import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from corpus.sources import Source, resolve_source
from hub_server import Branches, HubServer, connect

Rows = Sequence[dict]


def as_jsonl(rows: Rows, _schema: pa.Schema, folder: Path) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def as_gzip(rows: Rows, schema: pa.Schema, folder: Path) -> str:
    path = folder / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(Path(as_jsonl(rows, schema, folder)).read_bytes(), 1))
    return str(path)


def as_zstd(rows: Rows, schema: pa.Schema, folder: Path) -> str:
    path = folder / "rows.jsonl.zst"
    path.write_bytes(pa.compress(Path(as_jsonl(rows, schema, folder)).read_bytes(), "zstd", asbytes=True))
    return str(path)


def as_parquet(rows: Rows, schema: pa.Schema, folder: Path) -> str:
    path = folder / "rows.parquet"
    pa.parquet.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size=3)
    return str(path)


def as_arrow_stream(rows: Rows, schema: pa.Schema, folder: Path, opened: Callable = pa.ipc.new_stream) -> str:
    path = folder / "rows.arrow"
    with opened(str(path), schema) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema), max_chunksize=3)
    return str(path)


def as_arrow_file(rows: Rows, schema: pa.Schema, folder: Path) -> str:
    return as_arrow_stream(rows, schema, folder, pa.ipc.new_file)


def _dataset(rows: Rows, schema: pa.Schema) -> datasets.Dataset:
    return datasets.Dataset(pa.Table.from_pylist(rows, schema))


def as_saved_shards(rows: Rows, schema: pa.Schema, folder: Path) -> str:
    _dataset(rows, schema).save_to_disk(folder / "rows", num_shards=min(3, len(rows)))
    return str(folder / "rows")


def as_saved_splits(rows: Rows, schema: pa.Schema, folder: Path) -> str:
    splits = {"test": _dataset(rows[:1], schema), "train": _dataset(rows, schema)}
    datasets.DatasetDict(splits).save_to_disk(folder / "rows")
    return str(folder / "rows")


def _selection(rows: Rows, schema: pa.Schema) -> datasets.Dataset:
    """Return the rows as a filtered and reordered view of a larger data set."""
    twice = _dataset([*rows, *reversed(rows)], schema).add_column("kept", [False] * len(rows) + [True] * len(rows))
    kept = twice.filter(lambda kept: kept, input_columns="kept")
    return kept.select(range(len(rows) - 1, -1, -1)).remove_columns("kept")


def as_saved_selection(rows: Rows, schema: pa.Schema, folder: Path) -> str:
    _selection(rows, schema).save_to_disk(folder / "rows")
    return str(folder / "rows")


def as_old_saved_selection(rows: Rows, schema: pa.Schema, folder: Path) -> str:
    """Save a selection as `datasets` 1 did: all rows, and the indices of the selected ones."""
    saved = folder / "rows"
    _dataset([*rows, *reversed(rows)], schema).save_to_disk(saved, num_shards=2)
    indices = pa.table({"indices": pa.array(range(2 * len(rows) - 1, len(rows) - 1, -1), pa.uint64())})
    with pa.ipc.new_stream(str(saved / "indices.arrow"), indices.schema) as writer:
        writer.write_table(indices)
    state = json.loads((saved / "state.json").read_text())
    (saved / "state.json").write_text(json.dumps({**state, "_indices_data_files": [{"filename": "indices.arrow"}]}))
    return str(saved)


def as_saved_folder_within_a_folder(rows: Rows, schema: pa.Schema, folder: Path) -> str:
    as_old_saved_selection(rows, schema, folder)
    return str(folder)


LOCAL = (
    as_jsonl,
    as_gzip,
    as_zstd,
    as_parquet,
    as_arrow_stream,
    as_arrow_file,
    as_saved_shards,
    as_saved_splits,
    as_saved_selection,
    as_old_saved_selection,
    as_saved_folder_within_a_folder,
)


@contextmanager
def as_hub(rows: Rows, schema: pa.Schema, folder: Path) -> Iterator[str]:
    """Serve the rows as Parquet on a hub; yield the name of the data set."""
    content = Path(as_parquet(rows, schema, folder)).read_bytes()
    repositories = {"someone/rows": Branches({"main": {"rows.parquet": content}})}
    with HubServer(repositories) as server, pytest.MonkeyPatch.context() as patch:
        connect(patch, server, folder / "hf")
        yield "someone/rows"


@contextmanager
def opened(container: Callable, rows: Rows, schema: pa.Schema, folder: Path) -> Iterator[Source]:
    """Write rows in a format into `folder`; yield the source that `--dataset` finds there."""
    folder.mkdir(parents=True, exist_ok=True)
    found = container(rows, schema, folder)
    with nullcontext(found) if isinstance(found, str) else found as name:
        yield resolve_source(name)
