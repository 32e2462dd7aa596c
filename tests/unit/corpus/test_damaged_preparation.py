"""A preparation that is killed, damaged, shared or out of disk space ends with the same files."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from transformers import LlamaTokenizerFast

from corpora import (
    PREPARE,
    error_of,
    files_of,
    is_running,
    run_python,
    run_to_the_end,
    wait_until,
)
from corpus.encoder import TextEncoder
from corpus.prepare import prepare_dataset, prepare_folder, verify
from corpus.sources import resolve_source
from launching import ROOT, free_port


class TestDamage:
    def test_damaged_shard_is_named_and_made_again(self, prepared, tokenizer, tmp_path):
        folder, prepare = prepared
        whole, shard = files_of(folder), folder / "tokens-00002.bin"
        shard.write_bytes(whole[shard.name][:-1] + b"x")
        message = error_of(prepare_dataset, str(folder), tokenizer, tmp_path)
        assert message.startswith(f"--dataset: {shard} is damaged or missing; delete it and prepare")
        assert message == error_of(verify, folder, 2)
        shard.unlink()
        untouched = (folder / "tokens-00001.bin").stat()
        assert prepare()
        assert files_of(folder) == whole
        assert (folder / "tokens-00001.bin").stat() == untouched

    def test_damaged_plan_or_record(self, prepared):
        folder, prepare = prepared
        whole = files_of(folder)
        for content in ("[]", "null", '{"shards": [1]}'):
            (folder / ".preparation" / "unit-00002.json").write_text(content)
            (folder / "manifest.json").unlink()
            assert prepare()
            assert files_of(folder) == whole
        plan = folder / ".preparation" / "plan.json"
        source = json.loads(plan.read_text())["source"]
        for content in ("", "[]", json.dumps({"source": source})):
            plan.write_text(content)
            assert error_of(prepare).startswith(f"--output: {plan} is damaged; delete {folder}")

    def test_other_data_tokenizer_or_fraction(self, prepared, tokenizer_folder, tmp_path):
        folder, prepare = prepared
        assert "another data set, revision, slices or --eval_fraction" in error_of(prepare, eval_fraction=0.1)
        other = TextEncoder(LlamaTokenizerFast.from_pretrained(tokenizer_folder, bos_token="</s>"))
        source = resolve_source(str(tmp_path / "x.jsonl"))
        assert "another tokenizer" in error_of(prepare_folder, source, other, folder, 1)
        os.utime(tmp_path / "x.jsonl", ns=(0, 0))
        assert "have changed since" in error_of(prepare)

    @pytest.mark.slow
    def test_a_second_preparer_of_the_same_part_is_refused(self, prepared):
        folder, prepare = prepared
        holder = run_python(
            """
            import sys, time
            from runtime import files
            with files.exclusive_lock(files.Path(sys.argv[1])):
                print("held", flush=True)
                time.sleep(60)
            """,
            folder / ".preparation" / "part-1-of-1.lock",
        )
        assert holder.stdout.readline() == "held\n"
        message = error_of(prepare)
        assert message.startswith(f"--output: process {holder.pid} on ")
        assert "is preparing part 1 of 1" in message
        holder.kill()
        holder.communicate()
        assert prepare()

    def test_file_system_without_locks(self, prepared, monkeypatch, capsys):
        def unsupported(*arguments):
            raise OSError(errno.ENOSYS, "Function not implemented")

        monkeypatch.setattr(fcntl, "lockf", unsupported)
        assert prepared[1]()
        assert "has no locks" in capsys.readouterr().out

    @pytest.mark.slow
    def test_full_disk_keeps_what_is_finished(self, tokenizer_folder, slow_source, tmp_path):
        """A limit on the size of files stands for the full disk: only small shards can be written."""
        limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (700_000,) * 2)"
        code = PREPARE.replace('print("ready", flush=True)', limit)
        assert limit in code
        process = run_python(code, slow_source, tokenizer_folder, tmp_path / "cache", 2)
        _, errors = process.communicate(timeout=120)
        assert "InputError: --cache_dir: cannot write to" in errors.splitlines()[-1]
        assert "File too large" in errors.splitlines()[-1]
        folder = run_to_the_end(PREPARE, slow_source, tokenizer_folder, tmp_path / "cache", 2)
        assert files_of(folder) == files_of(run_to_the_end(PREPARE, slow_source, tokenizer_folder, tmp_path / "b", 2))

    def test_disk_without_room(self, tokenizer_folder, slow_source, tmp_path):
        """A file system in memory is too small for the shards, and is enlarged for the second call."""
        namespace = ["unshare", "--map-root-user", "--mount"]
        disk = tmp_path / "disk"
        disk.mkdir()
        mount = f"mount -t tmpfs -o size=3m none {disk}"
        if subprocess.run([*namespace, "sh", "-c", mount], capture_output=True).returncode:
            pytest.skip("this user may mount no file system")
        (tmp_path / "prepare.py").write_text(textwrap.dedent(PREPARE))
        prepare = f"{sys.executable} {tmp_path / 'prepare.py'} {slow_source} {tokenizer_folder} {disk} 2"
        finished = f"sha256sum {disk}/*/.preparation/unit-*.json {disk}/*/tokens-00000.bin"
        again = f"{finished} > {tmp_path}/before; mount -o remount,size=99m {disk}; {prepare}; {finished}"
        script = f"{mount}; {prepare}; df {disk}; {again}; cp -r $(dirname {disk}/*/manifest.json) {tmp_path}/copy"
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.run([*namespace, "sh", "-c", script], env=environment, text=True, capture_output=True)
        error = process.stderr.splitlines()[-1]
        assert f"--cache_dir: cannot write to {disk}" in error
        assert "No space left on device" in error
        assert "make room and run the same command again; finished shards are kept" in error
        kept = (tmp_path / "before").read_text().splitlines()
        assert set(kept) < set(process.stdout.splitlines()), process.stdout + process.stderr
        assert f"going on: {len(kept) - 1} of" in process.stdout
        whole = run_to_the_end(PREPARE, slow_source, tokenizer_folder, tmp_path / "b", 2)
        assert files_of(tmp_path / "copy") == files_of(whole)


class TestKilled:
    @pytest.mark.slow
    def test_a_killed_builder_is_continued(self, tokenizer, tokenizer_folder, slow_source, tmp_path):
        """Killed at several moments, in one and in two processes; finished shards stay as they are."""
        cache, kept = tmp_path / "cache", {}
        for num_workers, finished in ((1, 1), (2, 3), (2, 6)):
            builder = run_python(PREPARE, slow_source, tokenizer_folder, cache, num_workers)
            wait_until(lambda count=finished: len(list(cache.glob("*/.preparation/unit-*.json"))) >= count)
            children = Path(f"/proc/{builder.pid}/task/{builder.pid}/children").read_text().split()
            builder.send_signal(signal.SIGKILL)
            builder.communicate(timeout=30)
            wait_until(lambda ended=children: not any(map(is_running, ended)))
            assert not list(cache.glob("*/manifest.json"))
            records = sorted(cache.glob("*/.preparation/unit-*.json"))
            found = {record: record.stat().st_mtime_ns for record in records}
            assert found.items() >= kept.items()
            kept = found
        folder = run_to_the_end(PREPARE, slow_source, tokenizer_folder, cache, 2)
        assert {record: record.stat().st_mtime_ns for record in kept} == kept
        assert not [path for path in (folder / ".preparation").iterdir() if path.name.startswith("tokens")]
        assert files_of(folder) == files_of(run_to_the_end(PREPARE, slow_source, tokenizer_folder, tmp_path / "two", 1))

    @pytest.mark.slow
    def test_two_jobs_and_other_ranks_build_once(self, tokenizer_folder, slow_source, tmp_path):
        cache = tmp_path / "cache"
        arguments = (slow_source, tokenizer_folder, cache, 1)
        place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        first = run_python(PREPARE, *arguments)
        wait_until(lambda: list(cache.glob("*/.preparation/unit-*.json")))
        first.send_signal(signal.SIGSTOP)  # until the second job has seen it at work
        second = [run_python(PREPARE, *arguments, **place, RANK=rank, LOCAL_RANK=rank) for rank in "01"]
        assert any("another job is preparing" in line for line in second[0].stdout)
        first.send_signal(signal.SIGCONT)
        outputs = [process.communicate(timeout=120)[0] for process in (first, *second)]
        assert "".join(outputs).count("tokenized 160 documents") == 1
        assert "another job is preparing" not in "".join(outputs)
        assert len({output.splitlines()[-1] for output in outputs}) == 1
        assert (Path(outputs[0].splitlines()[-1]) / "manifest.json").is_file()
