"""Reads the rows of one file of a data set: JSONL (also .gz, .zst), Parquet, or Arrow."""

import codecs
import io
import json
import os
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet

from runtime.console import InputError

FILE_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst", ".parquet", ".arrow")
MAX_LINE_BYTES = 2**28  # a document of 50 MB, each character escaped, fits; a file that is not JSONL does not
READ_BYTES = 2**20
GZIP_BYTES = 2**16  # compressed; the rest of them is copied as a member ends, of which there may be many
BYTES_AFTER = "other bytes follow its end; keep what is before them"
MAGIC = {".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd"}  # a .zst file may also begin with a skippable frame
COLUMNAR_ROWS = 64
ARROW_MAGIC = b"ARROW1"  # of its format of files
STATE = "state.json"  # of a folder that `datasets` has saved
MEANINGS = {"text": "documents", "prompt": "prompts", "completion": "answers"}  # of columns


class Span(NamedTuple):
    """The rows that begin at the bytes [start, stop) of a plain JSONL file; to its end where `stop` is None."""

    start: int = 0
    stop: int | None = None


WHOLE = Span()
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


class Row(NamedTuple):
    """A row by column, and how many bytes of the (compressed) file, up to its row or its batch of rows, are read.

    The bytes of a row are the same wherever reading starts, since a stream mixes its slices by them.
    """

    columns: dict
    position: int


def can_be_split(path: str | Path) -> bool:
    """Return True if a part of the file can be read without what precedes it."""
    return str(path).lower().endswith((".jsonl", ".json"))


def refuse_pointer(path: Path) -> None:
    """Raise InputError for a file that Git LFS left in place of the data; OSError if it cannot be opened."""
    with open(path, "rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise InputError(
                f"--dataset: {path} is a pointer of Git LFS, not the data; run `git lfs pull` in its repository"
            )


def read_rows(
    path: Path, required: Sequence[str], *, only: Sequence[str] | None = None, span: Span = WHOLE, start_row: int = 0
) -> Iterator[Row]:
    """Reads a file from its row of index `start_row` on, in constant memory.

    Args:
        required: columns that must be there; in a JSONL file its first row is what counts.
        only: columns to read where the others can be left unread, which is in columnar files; `column.field` is one
            field of a column of structs, and the whole column where it holds something else.

    Raises:
        InputError: the file is damaged or has no row, a line of it is no JSON object, or a required column is missing.
    """
    suffix = path.suffix.lower()
    number = start_row
    try:
        refuse_pointer(path)
        if suffix == ".parquet":
            rows = _parquet_rows(path, required, only, start_row)
        elif suffix == ".arrow":
            rows = _arrow_rows(path, required, only, start_row)
        else:
            rows = _json_rows(path, required, span, start_row)
        for row in rows:
            yield row
            number += 1
        if number == 0 and span == WHOLE:
            raise InputError(f"--dataset: {path} is empty: it has no row; copy it again or remove it")
    except (OSError, IndexError, pa.ArrowException, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        if isinstance(error, _Undecodable):
            raise InputError(f"--dataset: {path} cannot be read beyond row {number}: {reason}") from error
        raise InputError(f"--dataset: {path} cannot be read beyond row {number} ({reason}); copy it again") from error


def _json_rows(path: Path, required: Sequence[str], span: Span, start_row: int) -> Iterator[Row]:
    suffix = path.suffix.lower()
    with open(path, "rb") as raw:
        lines: BinaryIO = raw
        if suffix not in MAGIC:
            _check_kind(raw, suffix)
        else:
            lines = io.BufferedReader(_Decompressed(raw, suffix), READ_BYTES)
        if span.start:  # a line that begins before the span belongs to the span before
            raw.seek(span.start - 1)
            _read_line(lines, path)
        number, skipped, position = 0, 0, raw.tell()
        while (span.stop is None or position < span.stop) and (line := _read_line(lines, path)):
            number += 1
            position = raw.tell()
            if line.isspace():
                continue
            skipped += 1
            if skipped <= start_row:
                continue
            columns = _parse_line(line, path, span, number)
            if skipped == 1 and not span.start:
                _require(columns, required, path)
            yield Row(columns, position)


class _Undecodable(OSError):
    """A compressed file that another copy of it would not mend; the message holds the remedy."""


class _Gzip(io.RawIOBase):
    """The members of a .gz file, zeros after them left out, as gzip reads them. Raises OSError as pyarrow's do."""

    def __init__(self, raw: BinaryIO):
        self.raw, self.compressed, self.members = raw, b"", 0
        self.member = zlib.decompressobj(zlib.MAX_WBITS | 16)
        self.begun = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            self.compressed = self.compressed or self.raw.read(GZIP_BYTES)
            if not self.compressed:
                if self.begun:
                    raise OSError("Truncated compressed stream")
                return 0
            if self.members and not self.begun:
                self.compressed = self.compressed.lstrip(b"\0")
                if not self.compressed:
                    continue
            text = self._decompress(len(buffer))
            buffer[: len(text)] = text
            if text:
                return len(text)

    def _decompress(self, size: int) -> bytes:
        try:
            text = self.member.decompress(self.compressed, size)
        except zlib.error as error:
            if self.members and not self.begun:
                raise _Undecodable(f"{BYTES_AFTER}: gzip -dc FILE | gzip > NEW") from error
            raise OSError(str(error)) from error
        self.begun, self.compressed = True, self.member.unconsumed_tail
        if self.member.eof:
            self.compressed, self.begun = self.member.unused_data, False
            self.member = zlib.decompressobj(zlib.MAX_WBITS | 16)
            self.members += 1
        return text


def _open_compressed(raw: BinaryIO, suffix: str) -> Any:
    """Open a compressed file from its start. Raises OSError where it is of another kind than its name says."""
    _check_kind(raw, suffix)
    return _Gzip(raw) if suffix == ".gz" else pa.CompressedInputStream(raw, "zstd")


def _check_kind(raw: BinaryIO, suffix: str) -> None:
    raw.seek(0)
    start = raw.read(4)
    raw.seek(0)
    kind = next((kind for kind, magic in MAGIC.items() if start.startswith(magic)), None)
    if kind and kind != suffix:
        raise _Undecodable(f"it is a {kind} file; end its name so")
    if suffix in MAGIC and start.lstrip()[:1] == b"{":
        raise _Undecodable(f"it is not compressed; take {suffix} off its name")


class _Decompressed(io.RawIOBase):
    """Reader of a compressed file's content; of a cut or damaged file, everything before that place."""

    def __init__(self, raw: BinaryIO, suffix: str):
        self.raw, self.suffix = raw, suffix
        self.streams = [_open_compressed(raw, suffix)]
        self.count = 0  # bytes handed out

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        second = len(self.streams) == 2
        try:
            count = self.streams[-1].readinto(memoryview(buffer)[:1] if second else buffer)
        except OSError as error:
            if isinstance(error, _Undecodable):
                raise
            if second and "too much memory" in str(error):
                raise _Undecodable("its window is above 128 MB; unpack it: zstd -d --rm --long=31 FILE") from error
            if second and "Unknown frame" in str(error) and self.count:
                raise _Undecodable(f"{BYTES_AFTER}: zstd -dc FILE | zstd > NEW") from error
            if second:
                size = os.fstat(self.raw.fileno()).st_size
                raise OSError(f"{error}, at byte {self.raw.tell():,} of {size:,}") from error
            self._read_again()
            return self.readinto(buffer)
        self.count += count
        return count

    def _read_again(self) -> None:
        """Up to where a read failed, which loses what it had got; from there on byte by byte."""
        self.streams.append(_open_compressed(self.raw, self.suffix))  # the first would close the file
        remaining = self.count
        while remaining:
            remaining -= len(self.streams[-1].read(min(remaining, READ_BYTES)))


def _read_line(lines: BinaryIO, path: Path) -> bytes:
    line = lines.readline(MAX_LINE_BYTES)
    if len(line) == MAX_LINE_BYTES:
        kind, remedy = "line", "write one JSON object a line"
        if line.removeprefix(codecs.BOM_UTF8).startswith(b"{"):
            kind, remedy = "document", "split it"
        raise InputError(f"--dataset: {path} has one {kind} of more than {MAX_LINE_BYTES:,} bytes; {remedy}")
    return line


def _parse_line(line: bytes, path: Path, span: Span, number: int) -> dict:
    if number == 1 and line.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[":
        raise InputError(f"{_place(path, span, number)}: a JSON list; write one object a line: jq -c '.[]' FILE")
    try:
        row = json.loads(line.removeprefix(codecs.BOM_UTF8).decode())
    except UnicodeDecodeError as error:
        raise InputError(
            f"{_place(path, span, number)}: not UTF-8 ({error.reason} at byte {error.start}); convert the file to UTF-8"
        ) from error
    except (ValueError, RecursionError) as error:
        remedy = "correct or remove it" if line.endswith(b"\n") else "the file seems cut off: copy it again"
        if number == 1 and line.strip() == b"{":
            remedy = (
                "data have one JSON object a line: jq -c . FILE makes one of an object over several lines; "
                "if it is no data, leave the file out"
            )
        raise InputError(
            f"{_place(path, span, number)}: not valid JSON ({getattr(error, 'msg', error)}); {remedy}"
        ) from error
    if not isinstance(row, dict):
        raise InputError(f"{_place(path, span, number)}: a JSON {type(row).__name__}; each line must be an object")
    return row


def _place(path: Path, span: Span, number: int) -> str:
    """Names a line by its number in the file, given its number in the span."""
    with open(path, "rb") as file:
        remaining = span.start
        while remaining and (chunk := file.read(min(READ_BYTES, remaining))):
            number += chunk.count(b"\n")
            remaining -= len(chunk)
        file.seek(max(0, span.start - 1))
        if span.start and file.read(1) != b"\n":  # the span's first line begins within it, behind this one
            number += 1
    return f"--dataset: {path}, line {number}"


def _parquet_rows(path: Path, required: Sequence[str], only: Sequence[str] | None, start_row: int) -> Iterator[Row]:
    with pa.parquet.ParquetFile(path) as parquet:
        names = parquet.schema_arrow.names
        _require(names, required, path)
        columns = _chosen(parquet.schema_arrow, only)
        size, total = path.stat().st_size, parquet.metadata.num_rows
        group, row = 0, 0  # row groups that lie wholly before the start are not read
        while group < parquet.num_row_groups and row + parquet.metadata.row_group(group).num_rows <= start_row:
            row += parquet.metadata.row_group(group).num_rows
            group += 1
        groups = range(group, parquet.num_row_groups)
        for table in parquet.iter_batches(COLUMNAR_ROWS, row_groups=groups, columns=columns):
            skip = max(0, start_row - row)
            row += min(skip, table.num_rows)
            for values in _table_rows(table.slice(skip)):
                yield Row(values, size * _batch_end(row, total) // total)
                row += 1


def _arrow_rows(path: Path, required: Sequence[str], only: Sequence[str] | None, start_row: int) -> Iterator[Row]:
    with pa.memory_map(str(path)) as raw, _open_arrow(raw) as stream:
        if stream.schema.names == ["indices"]:
            yield from _selected_rows(path, required, only, start_row)
            return
        _require(stream.schema.names, required, path)
        first = 0
        for batch, position in _batches(stream, raw):
            for start in range(max(0, start_row - first), batch.num_rows, COLUMNAR_ROWS):
                table = _selected(batch.slice(start, COLUMNAR_ROWS), _chosen(stream.schema, only))
                yield from (Row(columns, position) for columns in _table_rows(table))
            first += batch.num_rows


def _open_arrow(raw: pa.NativeFile) -> pa.ipc.RecordBatchStreamReader | pa.ipc.RecordBatchFileReader:
    """Open Arrow's format of streams, which `datasets` writes, or that of files."""
    is_file = raw.read(len(ARROW_MAGIC)) == ARROW_MAGIC
    raw.seek(0)
    return pa.ipc.open_file(raw) if is_file else pa.ipc.open_stream(raw)


def _batches(
    reader: pa.ipc.RecordBatchStreamReader | pa.ipc.RecordBatchFileReader, raw: pa.NativeFile
) -> Iterator[tuple[pa.RecordBatch, int]]:
    """Yield the batches, and how many bytes of the file they and those before them take."""
    if isinstance(reader, pa.ipc.RecordBatchFileReader):
        count = reader.num_record_batches
        yield from ((reader.get_batch(number), raw.size() * (number + 1) // count) for number in range(count))
    else:
        yield from ((batch, raw.tell()) for batch in reader)


def _selected_rows(path: Path, required: Sequence[str], only: Sequence[str] | None, start_row: int) -> Iterator[Row]:
    """The rows that `path` lists, of the data files beside it: a selection as `datasets` saved it before version 2."""
    from datasets import Dataset, concatenate_datasets  # an import of seconds, for such folders alone

    names = [file["filename"] for file in json.loads((path.parent / STATE).read_bytes())["_data_files"]]
    data = concatenate_datasets([Dataset.from_file(str(path.parent / name)) for name in names])
    _require(data.column_names, required, path)
    selection = Dataset.from_file(str(path)).data.column("indices")
    columns, size = _chosen(data.data.schema, only), path.stat().st_size
    rows = data.with_format("arrow")
    for start in range(start_row, len(selection), COLUMNAR_ROWS):
        chosen = selection.slice(start, COLUMNAR_ROWS)
        table = _selected(rows[chosen.to_pylist()].combine_chunks().to_batches()[0], columns)
        for row, values in enumerate(_table_rows(table), start):
            yield Row(values, size * _batch_end(row, len(selection)) // len(selection))


def _chosen(schema: pa.Schema, only: Sequence[str] | None) -> list[str] | None:
    """Those of the columns and fields `only` that there are; None is all."""
    if only is None:
        return None
    chosen = []
    for column, _, field in (name.partition(".") for name in only):
        if column in schema.names:
            kind = schema.field(column).type
            if not field or not pa.types.is_struct(kind):
                chosen.append(column)
            elif kind.get_field_index(field) >= 0:
                chosen.append(f"{column}.{field}")
    return chosen


def _selected(batch: pa.RecordBatch, chosen: list[str] | None) -> pa.RecordBatch:
    """A batch of these columns and fields alone."""
    if chosen is None:
        return batch
    arrays = {}
    for column, _, field in (name.partition(".") for name in chosen):
        values = batch.column(column)
        if field:
            values = pa.StructArray.from_arrays([pa.compute.struct_field(values, field)], [field])
        arrays[column] = values
    return pa.RecordBatch.from_arrays(list(arrays.values()), list(arrays))


def _table_rows(table: pa.RecordBatch) -> Iterator[dict]:
    decoders = {field.name: decode for field in table.schema if (decode := _decoder(field.type))}
    for columns in table.to_pylist():
        for name, decode in decoders.items():
            columns[name] = decode(columns[name])
        yield columns


def _batch_end(row: int, total: int) -> int:
    """Return the end of the row's batch, counted from the file's first row wherever reading has started."""
    return min((row // COLUMNAR_ROWS + 1) * COLUMNAR_ROWS, total)


def _decoder(kind: pa.DataType) -> Callable[[Any], Any] | None:
    """Return what makes Python's values of those that Arrow gives for JSON and maps, also within others, if needed."""
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
