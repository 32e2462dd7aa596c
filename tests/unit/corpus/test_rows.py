"""Rows of one file: compressed in every way that gzip and zstd allow, cut, damaged, or named wrongly."""

import gzip
import io
import json

import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets.arrow_writer import ArrowWriter

from containers import as_old_saved_selection
from corpora import error_of
from corpus.rows import read_rows
from corpus.sources import resolve_source

LINES = b"".join(json.dumps({"text": f"{place}, {place**99}"}).encode() + b"\n" for place in range(9000))
HALVES = LINES[: len(LINES) // 2], LINES[len(LINES) // 2 :]
SKIPPABLE = b"\x50\x2a\x4d\x18\x05\0\0\0hello"  # a frame that carries no data (RFC 8878, 3.1.2)


def zstd(content: bytes) -> bytes:
    return pa.compress(content, "zstd", asbytes=True)


def zstd_of_window(exponent: int, content: bytes) -> bytes:
    """A frame of one uncompressed block that asks for a window of 2^exponent bytes (RFC 8878, 3.1.1)."""
    block = (len(content) << 3 | 1).to_bytes(3, "little")
    return b"\x28\xb5\x2f\xfd" + bytes([0, (exponent - 10) << 3]) + block + content


class TestCompressed:
    @pytest.mark.parametrize(
        ("suffix", "packed"),
        [
            ("gz", gzip.compress(LINES, mtime=0) + b"\0" * 512),
            ("gz", gzip.compress(LINES, mtime=0) + b"\0" * 2**17),
            ("gz", b"".join(gzip.compress(half, mtime=0) + b"\0" * 3 for half in HALVES)),
            ("gz", gzip.compress(b"") + gzip.compress(LINES, mtime=0) + gzip.compress(b"")),
            ("gz", b"".join(map(gzip.compress, LINES.splitlines(keepends=True)))),
            ("zst", SKIPPABLE + SKIPPABLE.join(map(zstd, HALVES)) + SKIPPABLE),
            ("zst", zstd_of_window(27, LINES[:50_000]) + zstd(LINES[50_000:])),
        ],
        ids=["padded", "padded far", "padded members", "empty members", "many members", "skippable", "window"],
    )
    def test_read_whole(self, tmp_path, suffix, packed):
        assert suffix == "zst" or gzip.decompress(packed) == LINES  # the library reads it so
        path = tmp_path / f"x.jsonl.{suffix}"
        path.write_bytes(packed)
        rows = [row.columns for row in read_rows(path, ["text"])]
        assert rows == [json.loads(line) for line in LINES.splitlines()]

    @pytest.mark.parametrize("suffix", ["gz", "zst"])
    def test_a_cut_file_is_read_almost_to_its_end(self, tmp_path, suffix):
        whole = gzip.compress(LINES, mtime=0) if suffix == "gz" else zstd(LINES)
        path = tmp_path / f"x.jsonl.{suffix}"
        path.write_bytes(whole[: len(whole) // 2])
        rows = []
        message = error_of(lambda: rows.extend(row.columns for row in read_rows(path, ["text"])))
        assert rows == [json.loads(line) for line in LINES.splitlines()[: len(rows)]]
        assert len(rows) > 3000
        assert message == (
            f"--dataset: {path} cannot be read beyond row {len(rows)} (Truncated compressed stream); copy it again"
        )

    def test_a_damaged_file(self, tmp_path):
        content = bytearray(gzip.compress(LINES, mtime=0))
        content[len(content) // 2] ^= 0xFF
        (tmp_path / "x.jsonl.gz").write_bytes(content)
        message = error_of(lambda: list(read_rows(tmp_path / "x.jsonl.gz", ["text"])))
        assert message.startswith(f"--dataset: {tmp_path}/x.jsonl.gz cannot be read beyond row ")
        assert message.endswith("; copy it again")

    @pytest.mark.parametrize(
        ("suffix", "packed", "expected"),
        [
            (
                "gz",
                gzip.compress(LINES, mtime=0) + b"more",
                "row 9000 (Unknown bytes after the last member); other bytes",
            ),
            ("zst", zstd(LINES) + b"more", "other bytes follow its end, so keep what is before them: zstd"),
            ("zst", zstd(LINES[:1000]) + b"more", "other bytes follow its end, so keep what is before them: zstd"),
            ("zst", zstd_of_window(28, b"{}"), "its window is above 128 MB, so unpack it: zstd -d --rm --long=31 FILE"),
            ("gz", zstd(LINES), "is a .zst file; end its name in .zst"),
            ("zst", gzip.compress(LINES, mtime=0), "is a .gz file; end its name in .gz"),
            ("gz", LINES, "is not compressed; take .gz off its name"),
            ("jsonl", gzip.compress(LINES, mtime=0), "is a .gz file; end its name in .gz"),
            ("json", zstd(LINES), "is a .zst file; end its name in .zst"),
        ],
        ids=[
            *("gz and more", "zst and more", "short zst and more", "window"),
            *("zst as gz", "gz as zst", "plain as gz", "gz as plain", "zst as plain"),
        ],
    )
    def test_what_another_copy_would_not_mend(self, tmp_path, suffix, packed, expected):
        path = tmp_path / f"x.jsonl.{suffix}"
        path.write_bytes(packed)
        message = error_of(lambda: list(read_rows(path, ["text"])))
        assert message.startswith(f"--dataset: {path} ")
        assert expected in message
        assert "copy it again" not in message


@pytest.mark.parametrize("required", [["text"], []])
def test_two_columns_of_one_name_are_refused(tmp_path, required):
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["text", "text"])
    pa.parquet.write_table(table, tmp_path / "x.parquet")
    with pa.ipc.new_stream(str(tmp_path / "x.arrow"), table.schema) as stream:
        stream.write_table(table)
    for path in sorted(tmp_path.iterdir()):
        message = error_of(lambda path=path: list(read_rows(path, required, only=required or None)))
        assert "has two columns of one name (text, text)" in message


class TestArrowStreams:
    """pyarrow takes the end of a file for the end of a stream."""

    TABLE = pa.table({"text": [f"row {number}" for number in range(95)]})

    def written(self, table=TABLE, **options):
        output = io.BytesIO()
        with pa.ipc.new_stream(output, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as stream:
            stream.write_table(table, 10)
        return output.getvalue()

    def texts(self, path, **options):
        return [row.columns["text"] for row in read_rows(path, ["text"], **options)]

    def test_one_that_its_writer_did_not_finish(self, tmp_path):
        path = tmp_path / "x.arrow"
        writer = ArrowWriter(path=str(path), writer_batch_size=10)
        for text in self.TABLE["text"].to_pylist():
            writer.write({"text": text})
        writer.stream.flush()
        assert error_of(self.texts, path) == (
            f"--dataset: {path} cannot be read beyond row 90 (the mark at its end is missing); copy it again, or write "
            "it anew if its writer was stopped"
        )

    @pytest.mark.parametrize("legacy", [False, True])
    @pytest.mark.parametrize("start_row", [0, 93])
    def test_one_that_is_cut_off(self, tmp_path, legacy, start_row):
        path, whole = tmp_path / "x.arrow", self.written(use_legacy_format=legacy)
        path.write_bytes(whole)
        assert self.texts(path, start_row=start_row) == self.TABLE["text"].to_pylist()[start_row:]
        for missing in range(1, 12):
            path.write_bytes(whole[:-missing])
            assert f"{path} cannot be read beyond row 9" in error_of(self.texts, path, start_row=start_row)

    @pytest.mark.parametrize("options", [{}, {"compression": "zstd"}, {"compression": "lz4"}])
    @pytest.mark.parametrize("after", [b"", bytes(64), b"more"])
    @pytest.mark.parametrize("encoded", [False, True])
    def test_one_that_is_whole(self, tmp_path, options, after, encoded):
        path = tmp_path / "x.arrow"
        table = pa.table({"text": self.TABLE["text"].dictionary_encode()}) if encoded else self.TABLE
        path.write_bytes(self.written(table, **options) + after)
        assert self.texts(path) == table["text"].to_pylist()

    def test_dictionaries_that_grow(self, tmp_path):
        path, parts = tmp_path / "x.arrow", [["a", "b"], ["a", "b", "c"]]
        batches = [
            pa.record_batch({"text": pa.DictionaryArray.from_arrays(list(range(len(part))), part)}) for part in parts
        ]
        options = pa.ipc.IpcWriteOptions(emit_dictionary_deltas=True)
        with pa.ipc.new_stream(str(path), batches[0].schema, options=options) as stream:
            for batch in batches:
                stream.write_batch(batch)
        assert self.texts(path) == ["a", "b", "a", "b", "c"]

    def test_one_without_rows_is_empty(self, tmp_path):
        path = tmp_path / "x.arrow"
        path.write_bytes(self.written(self.TABLE.slice(0, 0)))
        assert "is empty: it has no row" in error_of(self.texts, path)

    @pytest.mark.parametrize("name", ["indices.arrow", "data-00001-of-00002.arrow"])
    def test_a_selection_of_rows(self, tmp_path, name):
        schema = pa.schema({"text": pa.string()})
        saved = tmp_path / "rows"
        as_old_saved_selection(self.TABLE.to_pylist(), schema, tmp_path)
        (file,) = resolve_source(str(saved)).files
        assert self.texts(file.fetch()) == self.TABLE["text"].to_pylist()
        (saved / name).write_bytes((saved / name).read_bytes()[:-8])
        (file,) = resolve_source(str(saved)).files
        assert "the mark at its end is missing" in error_of(self.texts, file.fetch())
