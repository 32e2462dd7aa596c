"""Evaluate a checkpoint on tasks of lm-evaluation-harness, as pretrain.py and finetune.py do with --eval_tasks.

    python scripts/evaluate_tasks.py --eval_tasks hellaswag,arc_easy --checkpoint checkpoint/epoch0-step1000 \\
        --tokenizer tokenizer/ --eval_tasks_device cuda:0 --output step1000.json

The output has the main scores, then all results of lm_eval. Files are exported beside the checkpoint as export_hf.py
does, and removed once the model is loaded.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from runtime import process, requirements

requirements.require()

import argparse
import json
import logging
import math
import tempfile
from typing import Any

from attn import avoid_cudnn
from checkpointing.folder import incomplete_files
from corpus.tokenizer import check_vocabulary, load_tokenizer
from model_utils import load_config
from runtime.console import InputError, RunError
from runtime.files import file_problems, write_json
from scripts.export_hf import exporter
from training.flags import ArgumentParser, add_flag, add_tokenizer_arg, task_names, user_path
from training.tasks import CPU, LOADED, device_name_problems, device_problems, inside, resolve

BATCH_SIZE = 8
WITHOUT_FILTER = "none"  # lm_eval's name


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(prog="evaluate_tasks.py", description=__doc__)
    text = "names, task files (.yaml) and folders of them, separated by commas"
    add_flag(parser, "--eval_tasks", task_names, text, required=True)
    add_flag(parser, "--checkpoint", user_path, "folder epochE-stepS", required=True)
    add_flag(parser, "--output", user_path, "JSON file", required=True)
    add_flag(parser, "--eval_tasks_device", CPU, "cpu or cuda:N")
    text = "folder for the exported model; gets a file `loaded` when that is removed (default: beside the checkpoint)"
    add_flag(parser, "--work_dir", user_path, text)
    add_tokenizer_arg(parser)
    return parser.parse_args()


def load_model(args: argparse.Namespace) -> Any:
    """Export the checkpoint, and load it as lm_eval does."""
    from lm_eval.models.huggingface import HFLM

    tokenizer, config = load_tokenizer(args.tokenizer), load_config(str(args.checkpoint / "model"), "--checkpoint")
    check_vocabulary(tokenizer, config)
    with tempfile.TemporaryDirectory(dir=args.work_dir or args.checkpoint.parent, prefix=".evaluated-") as folder:
        target = Path(folder, args.checkpoint.name)
        exporter(args.checkpoint, config, tokenizer)(target)
        dtype = "float32" if args.eval_tasks_device == CPU else "auto"  # as saved
        avoid_cudnn()
        model = HFLM(pretrained=str(target), device=args.eval_tasks_device, dtype=dtype, batch_size=BATCH_SIZE)
    if args.work_dir:
        Path(args.work_dir, LOADED).touch()
    return model


def main_scores(results: dict[str, Any], names: list[str]) -> dict[str, float | None]:
    """Return the scores by TASK/METRIC or TASK/METRIC/FILTER.

    Args:
        names: tasks and groups; of others, tasks of a group that has scores of its own are left out.
    """
    groups = results.get("groups", {})
    inner = {name for group in groups for name in results["group_subtasks"].get(group, ())} - set(names)
    scores = {}
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if task not in inner and kind and not metric.endswith("_stderr") and isinstance(value, int | float):
                name = "/".join([task, metric, *([kind] if kind != WITHOUT_FILTER else [])])
                scores[name] = float(value) if math.isfinite(value) else None
    return scores


def main() -> int:
    args = parse_args()
    device = args.eval_tasks_device
    problems = device_name_problems(device) or device_problems(device)  # lm_eval would take another device
    if problems := problems + file_problems("--output", args.output):
        raise InputError(*problems)
    if incomplete_files(args.checkpoint):
        raise InputError(f"--checkpoint: {args.checkpoint} is not a complete checkpoint; give a folder epochE-stepS")
    logging.basicConfig(level=logging.INFO)
    manager, names = resolve(args.eval_tasks)
    inner = inside(names, manager.task_index)  # lm_eval refuses to evaluate a task twice
    tasks = [name for name in names if name not in inner]
    from lm_eval import simple_evaluate
    from lm_eval.utils import make_table

    # Bootstrapped errors would take many processes.
    results = simple_evaluate(load_model(args), tasks=tasks, task_manager=manager, log_samples=False, bootstrap_iters=0)
    scores = main_scores(results, names)
    if not scores:
        raise RunError(f"{', '.join(names)}: no number among the results")
    print(make_table(results))
    plain = json.loads(json.dumps(results, default=str))
    write_json(args.output, {"scores": scores, **plain})
    return 0


if __name__ == "__main__":
    process.run(main, "evaluate_tasks.py")
