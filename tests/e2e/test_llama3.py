"""Llama 3: tokenizers that are a tokenizer.json, a vocabulary of 128,256 tokens, tied embeddings, and plans by name."""

import json
import re
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from corpora import documents_in
from corpus.encoder import TextEncoder
from corpus.prepare import prepare_dataset
from corpus.sources import resolve_source
from corpus.tokenizer import load_tokenizer
from data_utils import PackedDataset
from launching import ROOT, ForkedRun
from model_utils import MODEL_CONFIGS, load_config
from plain_loop import train_plainly
from runs import SEQUENCE_LENGTH, batch_at

BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"
# Meta's, models/llama3/tokenizer.py in github.com/meta-llama/llama-models.
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
WORDS += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
STEPS, GLOBAL_BATCH, LR = 4, 4, 1e-3


@pytest.fixture(scope="module")
def texts(sample) -> list[str]:
    return [document.text for document in documents_in(resolve_source(str(sample / "data")))]


@pytest.fixture(scope="module")
def tokenizer_folder(texts, tmp_path_factory) -> Path:
    """Return a folder like Llama 3's: byte-level pairs, words by its expression, 256 special tokens from id 128,000."""
    trained = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet))
    tables = json.loads(trained.to_str())
    special = [BEGIN, END, *(f"<|reserved_special_token_{number}|>" for number in range(254))]
    tables["model"]["vocab"] |= {token: 128000 + number for number, token in enumerate(special)}
    tables["model"]["ignore_merges"] = True
    tokenizer = Tokenizer.from_str(json.dumps(tables))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN}:1 $B:1", special_tokens=[(BEGIN, 128000)]
    )
    folder = tmp_path_factory.mktemp("llama3")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END).save_pretrained(folder)
    assert not (folder / "tokenizer.model").exists()
    return folder


def test_documents_have_the_tokenizers_own_ids(tokenizer_folder, texts):
    own, few = AutoTokenizer.from_pretrained(tokenizer_folder), texts[:20]
    encoded = TextEncoder(load_tokenizer(str(tokenizer_folder))).encode(few)
    for text, ids in zip(few, encoded, strict=True):
        assert ids.tolist() == [*own(text)["input_ids"], 128001]
        assert ids[0] == 128000
        assert own.decode(ids[1:-1]) == text


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    """Return a folder with a config.json like Llama 3.2's, but small."""
    config = load_config("llama3.2-1b")
    config.num_hidden_layers, config.hidden_size, config.intermediate_size = 2, 32, 64
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 4, 2, 8
    folder = tmp_path_factory.mktemp("small")
    config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (2, "-x fp32 -p zero2 -b 1 --accumulation_steps 2"),
        (2, "-x fp32 -p hybrid_parallel --tp 2 --pp 1 -b 4"),
        (2, "-x bf16 -p gemini -b 2"),
    ],
)
def test_pretraining_with_its_vocabulary(ranks, flags, tokenizer_folder, model_folder, sample, cache_dir, pretrain):
    """Observed: 2e-7 in fp32, 3e-5 in bf16."""
    folder = prepare_dataset(str(sample / "data"), load_tokenizer(str(tokenizer_folder)), cache_dir)
    assert json.loads((folder / "manifest.json").read_text())["dtype"] == "uint32"
    data, config = PackedDataset(folder, SEQUENCE_LENGTH), load_config(str(model_folder))
    batches = [batch_at(data, step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH) for step in range(STEPS)]
    dtype, tolerance = (torch.bfloat16, 4e-4) if "bf16" in flags else (torch.float32, 2e-6)
    expected, _ = train_plainly(config, dtype, batches, GLOBAL_BATCH, [LR] * STEPS, clipping=1.0)
    data_flags = ["-c", model_folder, "-d", folder, "--tokenizer", tokenizer_folder, "--lr_schedule", "constant"]
    run = pretrain(*data_flags, "-s", 0, "--max_steps", STEPS, "--lr", LR, *flags.split(), processes=ranks)
    assert run.column("loss") == pytest.approx(expected, rel=tolerance)
    assert AutoTokenizer.from_pretrained(run.save_dir / "final").eos_token_id == 128001


@pytest.mark.parametrize("name", [name for name in MODEL_CONFIGS if name.startswith("llama3")])
def test_dry_run_by_name(name, tmp_path):
    flags = f"-c {name} -p gemini -b 1 -g -a --dry_run --gpus 64"
    with ForkedRun([ROOT / "benchmark.py", *flags.split()], tmp_path) as run:
        assert run.wait() == 0, run.output()
    assert re.search(r"^fits: \d+\.\d GB at the peak, on H100 with 80 GB$", run.stdout, re.MULTILINE)
    assert re.search(r" the loss +\d", run.stdout)
