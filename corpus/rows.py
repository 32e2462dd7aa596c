"""Reads one file of a data set, JSONL (also .gz, .zst), Parquet or Arrow: its rows, or the documents in them."""

import codecs
import collections
import contextlib
import io
import json
import re
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet

from runtime import hub
from runtime.console import InputError

FILE_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst", ".parquet", ".arrow")
MAX_LINE_BYTES = 2**28  # a document of 50 MB fits with each character escaped; a file that is not JSONL does not
READ_BYTES = 2**20
GZIP_BYTES = 2**16  # compressed, at a time; zlib copies the rest of them at the end of each member
MAGIC = {  # first bytes by suffix; a .zst file may begin with frames to be skipped (RFC 8878, 3.1.2)
    ".gz": re.compile(rb"\x1f\x8b"),
    ".zst": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
}
AFTER_GZIP = "Unknown bytes after the last member"
UNFINISHED = "the mark at its end is missing"
REMEDIES = {  # for errors that another copy of the file would not mend, by a part of their text
    "too much memory": "its window is above 128 MB, so unpack it: zstd -d --rm --long=31 FILE",
    UNFINISHED: "copy it again, or write it anew if its writer was stopped",
    "Unknown frame": "other bytes follow its end, so keep what is before them: zstd -dc FILE | zstd > NEW",
    AFTER_GZIP: "other bytes follow its end, so keep what is before them: gzip -dc FILE | gzip > NEW",
}
COLUMNAR_ROWS = 64  # read at a time
ARROW_MAGIC = b"ARROW1"  # of Arrow's file format; its stream format has none
STREAM_ENDS = (b"\xff\xff\xff\xff\0\0\0\0", b"\0\0\0\0")  # of Arrow's stream format; the second before Arrow 0.15
STATE = "state.json"  # in a folder that `datasets` saved
SLICE_COLUMN = "red_pajama_subset"
MEANINGS = {"text": "documents", "prompt": "prompts", "completion": "answers"}  # of columns


class Span(NamedTuple):
    """The rows that begin at the bytes [start, stop) of a plain JSONL file; None is the end of the file."""

    start: int = 0
    stop: int | None = None


WHOLE = Span()


class Row(NamedTuple):
    """A row by column, and the bytes of the (compressed) file that have been read at the end of its batch.

    The position does not depend on the row that reading starts at: a stream mixes its slices by it.
    """

    columns: dict
    position: int


class Document(NamedTuple):
    """A document, its slice, and the bytes of the file read by its end; `text` is any value that the row has there."""

    text: Any
    slice: str
    position: int


class Query(NamedTuple):
    """The part of a file to read: see `read_rows`."""

    required: Sequence[str]
    only: Sequence[str] | None
    span: Span
    start_row: int


def can_be_split(path: str | Path) -> bool:
    """Return True if a part of the file can be read without the bytes before it."""
    return str(path).lower().endswith((".jsonl", ".json"))


def read_documents(path: Path, slice: str, *, span: Span = WHOLE, start_row: int = 0) -> Iterator[Document]:
    """Read the rows of a file as documents, of `slice` unless they name another. Raises as `read_rows`."""
    only = ("text", SLICE_COLUMN, f"meta.{SLICE_COLUMN}")
    for columns, position in read_rows(path, only[:1], only=only, span=span, start_row=start_row):
        yield Document(columns.get("text"), _slice_of_row(columns) or slice, position)


def _slice_of_row(row: dict) -> str | None:
    """Return the slice that a row names, itself or in `meta`, which may be an object or the JSON of one."""
    name, meta = row.get(SLICE_COLUMN), row.get("meta")
    if not name and isinstance(meta, str) and SLICE_COLUMN in meta:
        with contextlib.suppress(ValueError, RecursionError):
            meta = json.loads(meta)
    if not name and isinstance(meta, dict):
        name = meta.get(SLICE_COLUMN)
    return name if name and isinstance(name, str) else None


def unusable(text: object, name: str = "text") -> str | None:
    """Return the reason that a row cannot be used for its value of the column `name`, or None."""
    if text is None:
        return f"{name} missing or null"
    if not isinstance(text, str):
        return f"{name} not a string"
    if not text:
        return f"{name} empty"
    return None if is_unicode(text) else f"{name} with unpaired surrogates"


def is_unicode(text: str) -> bool:
    """Return True if a text can be encoded: JSON may have half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_rows(
    path: Path, required: Sequence[str], *, only: Sequence[str] | None = None, span: Span = WHOLE, start_row: int = 0
) -> Iterator[Row]:
    """Read a file from its row of index `start_row` on, in constant memory.

    Args:
        required: columns that must be there; a JSONL file is judged by its first row.
        only: columns to read; columnar files leave the others unread, JSONL files do not. `column.field` is one field
            of a column of structs, or the whole column if it holds something else.

    Raises:
        InputError: the file is damaged or has no row, a line is no JSON object, or a required column is missing.
    """
    hub.refuse_pointers([path], "--dataset")
    read = READERS.get(path.suffix.lower(), _json_rows)
    number = start_row
    try:
        for row in read(path, Query(required, only, span, start_row)):
            yield row
            number += 1
    except (OSError, IndexError, pa.ArrowException, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        remedy = next((remedy for text, remedy in REMEDIES.items() if text in reason), "copy it again")
        raise InputError(f"--dataset: {path} cannot be read beyond row {number} ({reason}); {remedy}") from error
    if number == 0 and span == WHOLE:
        raise InputError(f"--dataset: {path} is empty: it has no row; copy it again or remove it")


def _json_rows(path: Path, query: Query) -> Iterator[Row]:
    span = query.span
    with open(path, "rb") as raw:
        lines = _open_lines(raw, path)
        if span.start:  # a line that begins before the span belongs to the span before
            raw.seek(span.start - 1)
            _read_line(lines, path)
        number, row, position = 0, 0, raw.tell()
        while (span.stop is None or position < span.stop) and (line := _read_line(lines, path)):
            number += 1
            position = raw.tell()
            if line.isspace():
                continue
            if row >= query.start_row:
                columns = _parse_line(line, path, span, number)
                if row == 0 and not span.start:
                    _require(columns, query.required, path)
                yield Row(columns, position)
            row += 1


def _open_lines(raw: io.BufferedReader, path: Path) -> BinaryIO:
    """Open the text of a JSONL file, decompressed if its suffix says so.

    Raises:
        InputError: the suffix names another compression than the file has.
        OSError: the file does not begin as its suffix says.
    """
    suffix, start = path.suffix.lower(), raw.peek(4)[:4]
    kind = next((kind for kind, magic in MAGIC.items() if magic.match(start)), None)
    if kind and kind != suffix:
        raise InputError(f"--dataset: {path} is a {kind} file; end its name in {kind}")
    if suffix not in MAGIC:
        return raw
    if start.lstrip()[:1] == b"{":
        raise InputError(f"--dataset: {path} is not compressed; take {suffix} off its name")
    if start and not kind:
        raise OSError(f"not a {suffix} file")
    return io.BufferedReader(_Gzip(raw) if suffix == ".gz" else pa.CompressedInputStream(raw, "zstd"), READ_BYTES)


class _Gzip(io.RawIOBase):
    """Decompresses the members of a .gz file and skips zeros after each of them, as gzip does.

    pyarrow's reader stops at such zeros; Python's reads another number of bytes at a time in each version, on which the
    rows' positions would depend.
    """

    def __init__(self, raw: BinaryIO):
        self.raw, self.compressed, self.members = raw, b"", 0
        self.member, self.within = zlib.decompressobj(zlib.MAX_WBITS | 16), False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            self.compressed = self.compressed or self.raw.read(GZIP_BYTES)
            if not self.compressed:
                if self.within:
                    raise OSError("Truncated compressed stream")
                return 0
            if self.members and not self.within:
                self.compressed = self.compressed.lstrip(b"\0")
            if self.compressed and (text := self._decompress(len(buffer))):
                buffer[: len(text)] = text
                return len(text)

    def _decompress(self, size: int) -> bytes:
        try:
            text = self.member.decompress(self.compressed, size)
        except zlib.error as error:
            raise OSError(AFTER_GZIP if self.members and not self.within else str(error)) from error
        self.within, self.compressed = True, self.member.unconsumed_tail
        if self.member.eof:
            self.within, self.compressed = False, self.member.unused_data
            self.member = zlib.decompressobj(zlib.MAX_WBITS | 16)
            self.members += 1
        return text


def _read_line(lines: BinaryIO, path: Path) -> bytes:
    line = lines.readline(MAX_LINE_BYTES)
    if len(line) == MAX_LINE_BYTES:
        kind, remedy = "line", "write one JSON object a line"
        if line.removeprefix(codecs.BOM_UTF8).startswith(b"{"):
            kind, remedy = "document", "split it"
        raise InputError(f"--dataset: {path} has one {kind} of more than {MAX_LINE_BYTES:,} bytes; {remedy}")
    return line


def _parse_line(line: bytes, path: Path, span: Span, number: int) -> dict:
    def refuse(problem: str) -> InputError:
        return InputError(f"--dataset: {path}, line {_line_of_file(path, span, number)}: {problem}")

    line = line.removeprefix(codecs.BOM_UTF8)
    if number == 1 and line.lstrip()[:1] == b"[":
        raise refuse("a JSON list; write one object a line: jq -c '.[]' FILE")
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise refuse(f"not UTF-8 ({error.reason} at byte {error.start}); convert the file to UTF-8") from error
    except (ValueError, RecursionError) as error:
        remedy = "correct or remove it" if line.endswith(b"\n") else "the file seems cut off: copy it again"
        if number == 1 and line.strip() == b"{":
            remedy = (
                "data have one JSON object a line: jq -c . FILE makes one of an object over several lines; "
                "if it is no data, leave the file out"
            )
        elif b"\r" in line.strip():
            remedy = "its lines end with CR alone: tr '\\r' '\\n' < FILE > NEW"
        raise refuse(f"not valid JSON ({getattr(error, 'msg', error)}); {remedy}") from error
    if not isinstance(row, dict):
        raise refuse(f"a JSON {type(row).__name__}; each line must be an object")
    return row


def _line_of_file(path: Path, span: Span, number: int) -> int:
    """Return the number in the file of a line that has `number` in the span."""
    if span.start:
        number += 1  # the line that ends the span before
        with open(path, "rb") as file:
            remaining = span.start - 1
            while remaining and (chunk := file.read(min(READ_BYTES, remaining))):
                number += chunk.count(b"\n")
                remaining -= len(chunk)
    return number


def _parquet_rows(path: Path, query: Query) -> Iterator[Row]:
    with pa.parquet.ParquetFile(path) as parquet:
        _require(parquet.schema_arrow.names, query.required, path)
        columns = _present(parquet.schema_arrow, query.only)
        size, total = path.stat().st_size, parquet.metadata.num_rows
        group, row = 0, 0  # skip the row groups that end before the first row
        while group < parquet.num_row_groups and row + parquet.metadata.row_group(group).num_rows <= query.start_row:
            row += parquet.metadata.row_group(group).num_rows
            group += 1
        groups = range(group, parquet.num_row_groups)
        for batch in parquet.iter_batches(COLUMNAR_ROWS, row_groups=groups, columns=columns):
            skip = min(max(0, query.start_row - row), batch.num_rows)
            row += skip
            for values in _rows_of(batch.slice(skip)):
                yield Row(values, size * _batch_end(row, total) // total)
                row += 1


def _arrow_rows(path: Path, query: Query) -> Iterator[Row]:
    with pa.memory_map(str(path)) as raw, _open_arrow(raw) as reader:
        if reader.schema.names == ["indices"]:
            yield from _selected_rows(path, query)
            return
        _require(reader.schema.names, query.required, path)
        columns = _present(reader.schema, query.only)
        first = 0
        for batch, position in _batches(reader, raw):
            for start in range(max(0, query.start_row - first), batch.num_rows, COLUMNAR_ROWS):
                part = _with_columns(batch.slice(start, COLUMNAR_ROWS), columns)
                yield from (Row(row, position) for row in _rows_of(part))
            first += batch.num_rows


def _open_arrow(raw: pa.NativeFile) -> pa.ipc.RecordBatchStreamReader | pa.ipc.RecordBatchFileReader:
    """Open Arrow's stream format, which `datasets` writes, or its file format."""
    is_file = raw.read(len(ARROW_MAGIC)) == ARROW_MAGIC
    raw.seek(0)
    return pa.ipc.open_file(raw) if is_file else pa.ipc.open_stream(raw)


def _batches(
    reader: pa.ipc.RecordBatchStreamReader | pa.ipc.RecordBatchFileReader, raw: pa.NativeFile
) -> Iterator[tuple[pa.RecordBatch, int]]:
    """Yield each batch with the bytes of the file up to its end.

    Raises:
        OSError: a stream has no mark at its end, which pyarrow would not miss: it was cut off, or never finished.
    """
    if isinstance(reader, pa.ipc.RecordBatchFileReader):
        count = reader.num_record_batches
        yield from ((reader.get_batch(number), raw.size() * (number + 1) // count) for number in range(count))
        return
    end = raw.tell()
    for batch in reader:
        end = raw.tell()
        yield batch, end
    raw.seek(end)
    if not raw.read(len(STREAM_ENDS[0])).startswith(STREAM_ENDS):
        raise OSError(UNFINISHED)


def _selected_rows(path: Path, query: Query) -> Iterator[Row]:
    """Yield the rows that `path` selects from the data files beside it, as `datasets` 1 saved a selection."""
    from datasets import Dataset, concatenate_datasets  # takes seconds to import

    names = [file["filename"] for file in json.loads((path.parent / STATE).read_bytes())["_data_files"]]
    for part in (path, *(path.parent / name for name in names)):
        with pa.memory_map(str(part)) as raw, _open_arrow(raw) as reader:
            collections.deque(_batches(reader, raw), maxlen=0)  # `datasets` would not miss the end of a file
    data = concatenate_datasets([Dataset.from_file(str(path.parent / name)) for name in names])
    _require(data.column_names, query.required, path)
    columns = _present(data.data.schema, query.only)
    indices, size = Dataset.from_file(str(path)).data.column("indices"), path.stat().st_size
    data = data.with_format("arrow")
    for start in range(query.start_row, len(indices), COLUMNAR_ROWS):
        chosen = indices.slice(start, COLUMNAR_ROWS).to_pylist()
        batch = _with_columns(data[chosen].combine_chunks().to_batches()[0], columns)
        for number, row in enumerate(_rows_of(batch), start):
            yield Row(row, size * _batch_end(number, len(indices)) // len(indices))


READERS: dict[str, Callable[[Path, Query], Iterator[Row]]] = {".parquet": _parquet_rows, ".arrow": _arrow_rows}


def _present(schema: pa.Schema, only: Sequence[str] | None) -> list[str] | None:
    """Return those of the columns and fields `only` that the schema has; None stands for all columns."""
    if only is None:
        return None
    present = []
    for column, _, field in (name.partition(".") for name in only):
        if column in schema.names:
            kind = schema.field(column).type
            if not field or not pa.types.is_struct(kind):
                present.append(column)
            elif kind.get_field_index(field) >= 0:
                present.append(f"{column}.{field}")
    return present


def _with_columns(batch: pa.RecordBatch, columns: list[str] | None) -> pa.RecordBatch:
    """Return a batch of these columns and fields alone, as Parquet's reader does."""
    if columns is None:
        return batch
    arrays = {}
    for column, _, field in (name.partition(".") for name in columns):
        values = batch.column(column)
        if field:
            values = pa.StructArray.from_arrays([pa.compute.struct_field(values, field)], [field])
        arrays[column] = values
    return pa.RecordBatch.from_arrays(list(arrays.values()), list(arrays))


def _rows_of(batch: pa.RecordBatch) -> Iterator[dict]:
    decoders = {field.name: decode for field in batch.schema if (decode := _decoder(field.type))}
    for row in batch.to_pylist():
        yield row | {name: decode(row[name]) for name, decode in decoders.items()}


def _batch_end(row: int, total: int) -> int:
    """Return the end of the row's batch; batches are counted from the file's first row wherever reading starts."""
    return min((row // COLUMNAR_ROWS + 1) * COLUMNAR_ROWS, total)


def _decoder(kind: pa.DataType) -> Callable[[Any], Any] | None:
    """Return a function that turns JSON and maps, also nested, into the values that a JSONL file would give.

    Returns None for types whose values need no decoding.
    """
    if isinstance(kind, pa.BaseExtensionType):
        return _unless_null(json.loads) if kind.extension_name == "arrow.json" else None
    if pa.types.is_map(kind):
        item = _decoder(kind.item_type) or (lambda value: value)
        return _unless_null(lambda pairs: {key: item(value) for key, value in pairs})
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        element = _decoder(kind.value_type)
        return _unless_null(lambda values: [element(value) for value in values]) if element else None
    if pa.types.is_struct(kind):
        decoders = {field.name: decode for field in kind if (decode := _decoder(field.type))}
        fields = _unless_null(lambda row: row | {name: decode(row[name]) for name, decode in decoders.items()})
        return fields if decoders else None
    return None


def _unless_null(decode: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else decode(value)


def _require(columns: Collection[str], required: Sequence[str], path: Path) -> None:
    if len(set(columns)) < len(columns):
        raise InputError(f"--dataset: {path} has two columns of one name ({', '.join(columns)}); rename or remove one")
    for name in required:
        if name not in columns:
            raise InputError(
                f"--dataset: {path} has no column '{name}', only: {', '.join(columns)}; "
                f"rename the column that holds the {MEANINGS.get(name, 'values')} to '{name}', "
                "or leave the file out if it is no data"
            )
