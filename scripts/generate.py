"""Continues a text with a trained model.

python scripts/generate.py --model checkpoint/final --prompt "Return the"
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True, help="folder in Hugging Face layout, such as checkpoint/final")
    parser.add_argument("--prompt", default="", help="text to continue (default: an empty document)")
    parser.add_argument("--max_new_tokens", type=int, default=60, help="length in tokens (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 takes the likeliest token (default: 0.7)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: %(default)s)")
    args = parser.parse_args()

    logging.disable_progress_bar()
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, torch_dtype="auto").to(device)
    inputs = tokenizer(args.prompt, return_tensors="pt").to(device)
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature > 0 else {"do_sample": False}
    limits = {"max_new_tokens": args.max_new_tokens, "pad_token_id": tokenizer.eos_token_id}
    tokens = model.generate(**inputs, **limits, **sampling)
    print(tokenizer.decode(tokens[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
