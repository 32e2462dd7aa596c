"""Tokenizers from folders and the hub, and those that are refused."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaTokenizerFast, PreTrainedTokenizerFast

from corpora import error_of, run_python
from corpus.encoder import TextEncoder
from corpus.tokenizer import check_same_ids, load_tokenizer
from hub_server import Branches, HubServer


class TestTokenizer:
    @pytest.mark.slow
    def test_loads_a_folder_with_only_tokenizer_model_and_says_nothing(self, tokenizer_folder):
        assert [path.name for path in tokenizer_folder.iterdir()] == ["tokenizer.model"]
        code = "import sys; from corpus import tokenizer; print(len(tokenizer.load_tokenizer(sys.argv[1])))"
        assert run_python(code, tokenizer_folder).communicate(timeout=60) == ("600\n", "")

    def test_loads_a_saved_tokenizer(self, tokenizer, tmp_path):
        tokenizer.save_pretrained(tmp_path)
        assert TextEncoder(load_tokenizer(str(tmp_path))).fingerprint == TextEncoder(tokenizer).fingerprint

    @pytest.mark.slow
    def test_loads_what_transformers_5_saves(self, tokenizer, tmp_path):
        fast = LlamaTokenizerFast.from_pretrained(Path(tokenizer.vocab_file).parent)
        fast.save_pretrained(tmp_path)
        (tmp_path / "special_tokens_map.json").unlink()
        saved = {"tokenizer_class": "TokenizersBackend", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**saved, "extra_special_tokens": ["<unk>"]}))
        loaded = load_tokenizer(str(tmp_path))
        texts = ["def f(x):\n    return  it's", "  café </s> 日本"]
        assert TextEncoder(loaded).tokenize(texts) == TextEncoder(fast).tokenize(texts)
        assert loaded.additional_special_tokens == ["<unk>"]
        code = "from corpus import tokenizer; print(len(tokenizer.load_tokenizer('some/one')))"
        with HubServer() as hub:
            hub.repositories["some/one"] = Branches(
                {"main": {path.name: path.read_bytes() for path in tmp_path.glob("*.*")}}
            )
            places = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
            stdout, stderr = run_python(code, **places, HF_HUB_OFFLINE="0").communicate(timeout=240)
        assert stdout == f"{len(loaded)}\n", stderr

    @pytest.mark.slow
    @pytest.mark.parametrize(("hangs_up", "reason"), [(False, "refuses it (HTTP 401)"), (True, "cannot be reached")])
    def test_missing_hub_name_is_asked_for_once_and_refused_in_one_line(self, hangs_up, reason):
        code = "from corpus import tokenizer; tokenizer.load_tokenizer('nobody/nothing')"
        with HubServer(hangs_up=hangs_up) as hub:
            _, stderr = run_python(code, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0").communicate(timeout=240)
        assert [request[:2] for request in hub.requests] == [("GET", "/api/models/nobody/nothing")]
        last_line = stderr.splitlines()[-1]
        assert last_line.startswith("runtime.console.InputError: --tokenizer: nobody/nothing")
        assert reason in last_line
        assert "Retrying" not in stderr

    @pytest.mark.parametrize(
        ("bytewise", "alphabet", "unknown"),
        [(True, "", None), (True, "all", None), (True, "", "<unk>"), (False, "", None), (False, "", "<unk>")],
    )
    def test_characters_that_leave_no_trace(self, tmp_path, bytewise, alphabet, unknown):
        """The tokenizer itself tells which: without an unknown token it drops what it has no token for."""
        trained = Tokenizer(models.BPE(unk_token=unknown))
        trained.pre_tokenizer = (
            pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=False)])
            if bytewise
            else pre_tokenizers.Whitespace()
        )
        special = ["<s>", "</s>", *filter(None, [unknown])]
        letters = pre_tokenizers.ByteLevel.alphabet() if alphabet else []
        trainer = trainers.BpeTrainer(
            vocab_size=600, special_tokens=special, initial_alphabet=letters, show_progress=False
        )
        trained.train_from_iterator(["hello world this is plain ascii text"], trainer)
        PreTrainedTokenizerFast(tokenizer_object=trained, bos_token="<s>", eos_token="</s>").save_pretrained(tmp_path)
        dropped = any(not trained.encode(character).ids for character in "é日😀~Z")
        if dropped:
            assert " from texts, since its model has no unknown token; " in error_of(load_tokenizer, str(tmp_path))
        else:
            load_tokenizer(str(tmp_path))
        assert dropped == (not alphabet and not unknown)

    @pytest.mark.parametrize("missing", [[], ["<0xC3>"], ["<0xC0>", "<0xF5>"], ["<0x20>"]])
    def test_bytes_that_leave_no_trace(self, tmp_path, missing):
        """Two of them occur in no text, and a space has a token of its own."""
        tokens = ["<s>", "</s>", " ", *(f"<0x{byte:02X}>" for byte in range(256))]
        vocabulary = {token: number for number, token in enumerate(token for token in tokens if token not in missing)}
        model = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
        PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", eos_token="</s>").save_pretrained(tmp_path)
        if any(not model.encode(character).ids for character in "é日😀 "):
            assert "drops 1 of the 115 bytes" in error_of(load_tokenizer, str(tmp_path))
            assert missing == ["<0xC3>"]
        else:
            load_tokenizer(str(tmp_path))

    def test_the_tokens_of_a_model_folder(self, byte_level_tokenizer, tokenizer, tmp_path):
        check_same_ids(tokenizer, tmp_path, "--init_from")  # it has no tokenizer
        byte_level_tokenizer.save_pretrained(tmp_path)
        own = load_tokenizer(str(tmp_path))
        check_same_ids(own, tmp_path, "--init_from")
        problem = error_of(check_same_ids, tokenizer, tmp_path, "--init_from")
        first = min(i for i in range(3, 600) if own.convert_ids_to_tokens(i) != tokenizer.convert_ids_to_tokens(i))
        there, here = (model.convert_ids_to_tokens(first) for model in (own, tokenizer))
        line = f"--tokenizer: its token {first} is {here!r}, and that of --init_from {tmp_path} is {there!r}; give "
        assert problem.startswith(line)
        own.add_tokens(["<tool>"])
        check_same_ids(own, tmp_path, "--init_from")

    @pytest.mark.parametrize("name", ["/no/such/folder", "./missing", "a/b/c"])
    def test_missing_path(self, name):
        assert error_of(load_tokenizer, name).startswith("--tokenizer: ")

    def test_folder_without_or_with_damaged_files(self, tmp_path):
        assert "holds neither" in error_of(load_tokenizer, str(tmp_path))
        (tmp_path / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1\n")
        assert "is a Git LFS pointer" in error_of(load_tokenizer, str(tmp_path))
        (tmp_path / "tokenizer.model").write_text("damaged")
        assert f"--tokenizer: cannot load {tmp_path}" in error_of(load_tokenizer, str(tmp_path))
        assert "is a file" in error_of(load_tokenizer, str(tmp_path / "tokenizer.model"))
        (tmp_path / "tokenizer.json").write_text("{}")
        assert f"--tokenizer: cannot load {tmp_path}" in error_of(load_tokenizer, str(tmp_path))

    def test_the_class_is_not_told(self, tokenizer, tmp_path):
        LlamaTokenizerFast.from_pretrained(Path(tokenizer.vocab_file).parent).save_pretrained(tmp_path)
        (tmp_path / "tokenizer_config.json").write_text("{}")
        assert "tokenizer_config.json names no tokenizer_class; set it" in error_of(load_tokenizer, str(tmp_path))

    def test_without_bos_token(self, tokenizer, tmp_path):
        fast = LlamaTokenizerFast.from_pretrained(Path(tokenizer.vocab_file).parent)
        fast.save_pretrained(tmp_path)
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            settings_of_file = json.loads((tmp_path / name).read_text())
            settings_of_file["tokenizer_class"] = "PreTrainedTokenizerFast"
            settings_of_file.pop("bos_token")
            (tmp_path / name).write_text(json.dumps(settings_of_file))
        assert "has no bos_token" in error_of(load_tokenizer, str(tmp_path))
