"""Generate text with a trained model: print the prompt, then each word as soon as it is generated.

    python scripts/generate.py --model checkpoint/final --prompt "Return the"
    python scripts/generate.py --model checkpoint/epoch0-step1000 --tokenizer tokenizer/ --temperature 0 --prompt "A"
    echo "What is a list?" | python scripts/generate.py --model finetuned/final --prompt - --top_p 0.9

--model takes a folder `final`, a checkpoint, any other LLaMA in Hugging Face format (folder or hub name), or adapters:
a checkpoint of fine-tuning with --lora_rank, or a folder saved by peft.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from runtime import process, requirements

requirements.require()

import argparse
import codecs
import json
import os
from collections.abc import Sequence

import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from attn import avoid_cudnn
from checkpointing.folder import ADAPTER_FILE, RUNNING_STATES, is_complete
from checkpointing.pretrained import GENERATION_CONFIG, check_pretrained, find_model, generation_config
from corpus.chat_template import prompt_ids
from corpus.tokenizer import check_vocabulary, load_tokenizer
from engine.shards import is_finite
from model_utils import load_config
from runtime.console import InputError, below, first_line
from training.flags import ArgumentParser, add_flag, user_name

TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(prog="generate.py", description=__doc__)
    text = "folder of a model, a checkpoint or adapters, or a hub name"
    add_flag(parser, "--model", user_name, text, required=True)
    text = "model under the adapters (default: the one they were trained on)"
    add_flag(parser, "--base_model", user_name, text)
    text = "hub name or folder (default: the model's own, or that of `final` next to it)"
    add_flag(parser, "--tokenizer", user_name, text)
    add_flag(parser, "--prompt", "", "text to continue; - reads standard input (default: empty)")
    add_flag(parser, "--chat", False, "send the prompt as a user's message, through the chat template")
    add_flag(parser, "--max_new_tokens", 60, "tokens to generate at most")
    add_flag(parser, "--temperature", 0.7, "0 always takes the most probable token")
    add_flag(parser, "--top_p", 1.0, "sample from the most probable tokens that make up this probability")
    add_flag(parser, "--seed", 0, "of the sampling")
    return parser.parse_args(arguments)


def check_args(args: argparse.Namespace) -> None:
    """Raise InputError with a line for every unusable flag."""
    problems = below(1, max_new_tokens=args.max_new_tokens)
    if not 0 <= args.temperature < float("inf"):
        problems.append(f"--temperature: must be 0 or a positive number, not {args.temperature}")
    if not 0 < args.top_p <= 1:
        problems.append(f"--top_p: must be above 0 and at most 1, not {args.top_p}")
    elif args.top_p < 1 and args.temperature == 0:
        problems.append("--top_p: has an effect only with --temperature above 0; raise that, or leave --top_p out")
    if not 0 <= args.seed < 2**63:
        problems.append(f"--seed: must be at least 0 and below 2^63, not {args.seed}")
    if problems:
        raise InputError(*problems)


def find_parts(args: argparse.Namespace) -> tuple[Path, Path | None, list[Path]]:
    """Return the model's folder, the adapters' folder or None, and the folders that may hold the tokenizer."""
    folder = find_model(args.model, "--model")
    tokenizers = [folder]
    if (folder / "model").is_dir() and (folder / RUNNING_STATES).is_file():
        if not is_complete(folder):
            raise InputError(f"--model: {folder} is an incomplete checkpoint; choose another")
        tokenizers = [folder.parent / "final"]
        folder = folder / "model"
    if not (folder / ADAPTER_FILE).is_file():
        if args.base_model:
            raise InputError(f"--base_model: {folder} has no adapters, which this flag is for; leave it out")
        if not (folder / "config.json").is_file():
            raise InputError(f"--model: {folder} holds no model; give `final` or a checkpoint epochE-stepS")
        return folder, None, tokenizers
    try:
        trained_on = json.loads((folder / "adapter_config.json").read_bytes())["base_model_name_or_path"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"--model: {folder}/adapter_config.json cannot be read; give peft's own folder") from error
    base = find_model(str(args.base_model or trained_on), "--base_model")
    return base, folder, [*tokenizers, base]


def open_tokenizer(args: argparse.Namespace, folders: list[Path]) -> PreTrainedTokenizerBase:
    if args.tokenizer:
        return load_tokenizer(args.tokenizer)
    for folder in folders:
        if any((folder / name).is_file() for name in TOKENIZER_FILES):
            return load_tokenizer(str(folder))
    raise InputError(f"--tokenizer: not found in {' or '.join(map(str, folders))}; give its folder or hub name")


def read_text(prompt: str) -> str:
    """Return the text of --prompt, or of standard input, decoded by the locale, or as UTF-8 if that is ASCII."""
    standard_input = prompt == "-"
    encoding = sys.stdin.encoding if standard_input else sys.getfilesystemencoding()
    if codecs.lookup(encoding).name == "ascii":
        encoding = "utf-8"
    try:
        if standard_input:
            return sys.stdin.buffer.read().decode(encoding).removesuffix("\n")
        return os.fsencode(prompt).decode(encoding)
    except UnicodeError as error:
        text = "standard input" if standard_input else "text"
        raise InputError(f"--prompt: {text} is not {encoding}; convert it, or set the locale to match") from error


def read_prompt(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, context: int) -> tuple[torch.Tensor, str]:
    """Return the ids of the prompt, [1, S], and its text; raise InputError if the new tokens exceed the context."""
    text = read_text(args.prompt)
    ids = torch.tensor([prompt_ids(tokenizer, text, args.chat)])
    if args.chat:
        text = decode(tokenizer, ids[0])
    if ids.shape[1] + args.max_new_tokens > context:
        raise InputError(
            f"--max_new_tokens: {ids.shape[1]} tokens of the prompt and {args.max_new_tokens} new ones exceed the "
            f"model's context of {context}; lower it, or shorten --prompt"
        )
    return ids, text


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int] | torch.Tensor) -> str:
    """Return the text of token ids without special tokens and with all its spaces."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class Printer(BaseStreamer):
    """Prints `prompt` unchanged, and then each new token as soon as its characters are complete."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: str):
        self.tokenizer, self.prompt = tokenizer, prompt
        self.ids: list[int] = []
        self.shown = ""  # the text of the ids that have been printed

    def put(self, value: torch.Tensor) -> None:
        is_prompt = not self.ids
        self.ids += value.flatten().tolist()
        text = decode(self.tokenizer, self.ids)
        if is_prompt:
            print(self.prompt, end="", flush=True)
        elif text.endswith("\ufffd"):  # the first bytes of a character
            return
        else:
            print(text[len(self.shown) :], end="", flush=True)
        self.shown = text

    def end(self) -> None:
        print(decode(self.tokenizer, self.ids)[len(self.shown) :], flush=True)


def open_model(folder: Path, config: LlamaConfig, adapter: Path | None) -> LlamaForCausalLM:
    """Load the model with its adapters merged, in the precision they were trained in, on the GPU if there is one.

    Its generation_config holds only defaults: the folder's would add to the arguments of `generate`, such as a penalty.
    """
    dtype = load_config(str(adapter)).torch_dtype if adapter and (adapter / "config.json").is_file() else None
    config.use_cache = True  # otherwise each token costs as much as the whole text
    options = {"config": config, "torch_dtype": dtype or "auto", "trust_remote_code": False}
    avoid_cudnn()
    model = AutoModelForCausalLM.from_pretrained(folder, generation_config=GenerationConfig(), **options)
    if adapter:
        try:
            model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
        except (ValueError, RuntimeError, KeyError) as error:
            raise InputError(
                f"--base_model: the adapters in {adapter} do not fit {folder}: {first_line(error)}"
            ) from error
    if broken := next((name for name, weight in model.named_parameters() if not is_finite(weight.detach())), None):
        raise InputError(
            f"--model: {broken} in {adapter or folder} contains NaN or infinity; give a model with finite weights"
        )
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def stop_tokens(folder: Path, tokenizer: PreTrainedTokenizerBase) -> int | list[int]:
    """Return the ids that end the text: the tokenizer's EOS, and those of the folder's generation_config.json."""
    content = generation_config(folder, tokenizer, "--model").get(GENERATION_CONFIG, {})
    return content.get("eos_token_id", [tokenizer.eos_token_id])


def main() -> int:
    args = parse_args()
    check_args(args)
    folder, adapter, tokenizers = find_parts(args)
    config = load_config(str(folder), "--model")
    check_pretrained(folder, config, "--model")
    tokenizer = open_tokenizer(args, tokenizers)
    check_vocabulary(tokenizer, config)
    ends = stop_tokens(folder, tokenizer)
    ids, prompt = read_prompt(args, tokenizer, config.max_position_embeddings)

    logging.disable_progress_bar()
    torch.manual_seed(args.seed)
    model = open_model(folder, config, adapter)
    sampling = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p, "top_k": 0}
    ids = ids.to(model.device)
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=args.max_new_tokens,
        eos_token_id=ends,
        pad_token_id=tokenizer.eos_token_id,
        streamer=Printer(tokenizer, prompt),
        **(sampling if args.temperature > 0 else {"do_sample": False}),
    )
    return 0


if __name__ == "__main__":
    process.run(main, "generate.py")
