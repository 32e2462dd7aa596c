"""The flags that pretraining, fine-tuning and the benchmark share, and the dataclasses made of them."""

import argparse
import difflib
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from transformers import LlamaConfig

from corpus.order import LLAMA_WEIGHTS
from corpus.tokenizer import LLAMA_TOKENIZER
from engine.job import AUTO, MICRO_BATCH, ROWWISE, STEP, TENSORWISE, Compute, Exchange, Job, Optimization, Placement
from engine.layout import PIPELINE_STYLES, PLUGINS, Batch, Parallelism
from runtime.console import InputError
from runtime.files import expanded
from training.stages import Stages, weights_problem

if TYPE_CHECKING:
    from checkpointing.adapters import Lora
    from training.run import Run

CLOSE = 0.75  # similarity of two spellings of a flag, from 0 to 1 (difflib)
NEGATIVE_NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|-inf(inity)?|-nan", re.IGNORECASE)
WITHOUT_FLAG = {  # fields of the dataclasses that some program has no flag for
    *("extra_dp", "memory_limit", *vars(Placement())),  # only benchmark.py has them
    *("exchange", "min_lr_ratio"),  # benchmark.py lacks them: its steps have one micro-batch and no schedule
    "warmup_steps",  # only pretrain.py has it
    *("warmup_given", "base_weights"),  # computed
}
Options = TypeVar("Options")


def parse_slice_weights(text: str) -> dict[str, float]:
    """Parse `llama` or `NAME=WEIGHT,...` into the weight of each slice. Raises ArgumentTypeError."""
    if text == "llama":
        return LLAMA_WEIGHTS
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, _, weight = part.rpartition("=")
        name = name.strip()
        if name in weights:
            raise argparse.ArgumentTypeError(f"{name} has two weights; give one")
        try:
            weights[name] = float(weight)
        except ValueError:
            weights[name] = math.nan
        if not name or not 0 < weights[name] < math.inf:
            raise argparse.ArgumentTypeError(f"{part!r} is neither 'llama' nor NAME=WEIGHT with a weight above 0")
    if sum(weights.values()) == math.inf:
        raise argparse.ArgumentTypeError(f"the sum of the weights in {text!r} is infinite; lower them")
    return weights


def add_flag(group: argparse._ActionsContainer, names: str, value: Any, text: str, **options: Any) -> None:
    """Add a flag.

    Args:
        names: separated by spaces, such as "-e --num_epochs".
        value: default, which also gives the type; False for a switch; a type for a flag without default.
        text: help. The default is added at its end, unless `text` says it in other words, as "(default: ...)".
        options: further arguments of `add_argument`.
    """
    if value is False:
        options = {"action": "store_true", **options}
    elif callable(value):
        options = {"type": value, **options}
    else:
        options = {"type": type(value), "default": value, **options}
        if "(default: " not in text:
            text = f"{text} (default: {value})"
    group.add_argument(*names.split(), help=text, **options)


def add_source_args(parser: argparse._ActionsContainer) -> None:
    """Add the flags for the revision and the slices of `--dataset`."""
    add_flag(parser, "--dataset_revision", str, "branch, tag or commit of a data set on the hub (default: main)")
    text = "read only these slices, such as arxiv or wikipedia: files, folders or configurations of the data set"
    add_flag(parser, "--dataset_slices", str, f"{text} (default: all)", nargs="+", default=(), metavar="NAME")


def add_tokenizer_arg(parser: argparse._ActionsContainer) -> None:
    """Add --tokenizer, for programs without a model that brings its own."""
    add_flag(parser, "--tokenizer", LLAMA_TOKENIZER, "hub name or folder")


def add_plugin_args(parser: argparse.ArgumentParser, all_plugins: bool = False) -> None:
    """Add the flags for the plugin, one that trains or any, and the sizes of its parallelism."""
    plugins = [name for name, traits in PLUGINS.items() if traits.trains or all_plugins]
    group = parser.add_argument_group("parallelism")
    add_flag(group, "-p --plugin", "gemini", "Booster plugin", choices=plugins)
    add_flag(group, "--tp", int, "hybrid_parallel: tensor-parallel size (default: 4, or a divisor)")
    add_flag(group, "--pp", int, "hybrid_parallel: pipeline stages (default: 2, or a divisor)")
    add_flag(group, "--sp", 1, "hybrid_parallel: sequence-parallel size")
    text = "hybrid_parallel: ZeRO stage (default: 1 with several data-parallel ranks, else 0)"
    add_flag(group, "--zero", int, text, choices=(0, 1, 2))
    add_flag(group, "--microbatch_size --mbs", 1, "hybrid_parallel: sequences in a pipeline microbatch")
    text = "hybrid_parallel: interleaved gives a stage several ranges of layers, so it idles less"
    add_flag(group, "--pp_style", "1f1b", text, choices=PIPELINE_STYLES)
    add_flag(group, "--model_chunks", int, "interleaved: ranges of layers per stage (default: 2)")


class ArgumentParser(argparse.ArgumentParser):
    """Parser that raises InputError for mistakes on the command line, so that only one rank prints them."""

    def __init__(self, common: Sequence[str] = (), **kwargs: Any):
        """
        Args:
            common: flags that --help lists first, in this order, and not in their groups again.
        """
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)
        self.set_defaults(given=frozenset())
        self.common = common

    def format_help(self) -> str:
        """Return the help; with `common` flags it opens with these instead of a usage of all flags."""
        if not self.common:
            return super().format_help()
        first = [self._option_string_actions[flag] for flag in self.common]
        formatter = self._get_formatter()
        formatter.add_usage("%(prog)s [FLAG ...]", [], [])
        formatter.add_text(self.description)
        groups = [(group.title, group._group_actions) for group in self._action_groups]
        for title, actions in [("flags that most runs need", first), *groups]:
            formatter.start_section(title)
            formatter.add_arguments(actions if actions is first else [flag for flag in actions if flag not in first])
            formatter.end_section()
        return formatter.format_help()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Take -1e-3 or -inf as the value of the flag before it; argparse does so only for numbers such as -1."""
        joined: list[str] = []
        for text in sys.argv[1:] if args is None else args:
            flag = joined[-1] if joined else ""
            if flag.startswith("-") and "=" not in flag and NEGATIVE_NUMBER.fullmatch(text):
                joined[-1] += f"={text}" if flag.startswith("--") else text
            else:
                joined.append(text)
        return super().parse_known_args(joined, namespace)

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: -"):
            given = message.split()[2].partition("=")[0]
            known = re.findall(r"--\w+", self.format_help())
            if close := difflib.get_close_matches(given, known, 1, CLOSE):
                raise InputError(f"{message}; did you mean {close[0]}? (see --help)")
        raise InputError(f"{message} (see --help)")


def user_name(text: str) -> str:
    """Return a path or a hub name from the command line, like `expanded`, but raise ArgumentTypeError."""
    try:
        return expanded(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def user_path(text: str) -> Path:
    """Return a path from the command line, like `user_name`; a URL raises ArgumentTypeError."""
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text} is a URL; give a path on this machine")
    return Path(user_name(text))


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the value of each flag; `gradient_checkpoint` is True if any layer is recomputed."""
    values = {name: value for name, value in vars(args).items() if name != "given"}
    if args.recompute is not None:
        values["gradient_checkpoint"] = args.recompute != 0
    return values


def take(kind: type[Options], args: argparse.Namespace) -> Options:
    """Return a dataclass filled from the flags of the same names; fields in WITHOUT_FLAG may keep their defaults.

    Raises:
        AttributeError: the program has no flag for another field.
    """
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    return kind(**{name: getattr(args, name) for name in names if name in args or name not in WITHOUT_FLAG})


def job_of(args: argparse.Namespace, config: LlamaConfig) -> Job:
    """Return the job that the flags describe.

    Raises:
        InputError: -g and --recompute 0 contradict each other.
    """
    if args.gradient_checkpoint and args.recompute == 0:
        raise InputError("--recompute: 0 recomputes nothing and -g all layers; leave one out")
    if args.recompute == AUTO:
        recompute = None
    else:
        recompute = float(args.gradient_checkpoint) if args.recompute is None else args.recompute
    return Job(
        config,
        take(Parallelism, args),
        take(Batch, args),
        replace(take(Compute, args), recompute=recompute),
        take(Optimization, args),
        take(Exchange, args),
        take(Placement, args),
        args.seed,
    )


def run_of(
    args: argparse.Namespace, job: Job, model: str, lora: "Lora | None" = None, stages: Stages | None = None
) -> "Run":
    """Return the run that the flags of pretrain.py or finetune.py describe."""
    from checkpointing.writer import Retention  # here, since benchmark.py imports no checkpointing
    from training.inspection import Inspection
    from training.run import Length, Outputs, Run
    from training.schedule import CONSTANT, Schedule
    from training.spikes import SpikeRule
    from training.tasks import Tasks

    if args.lr_schedule == CONSTANT and "min_lr_ratio" in args.given:
        raise InputError("--min_lr_ratio: takes no effect with --lr_schedule constant; leave one out")
    outputs = take(Outputs, args)
    if args.run_name:
        outputs = replace(outputs, tensorboard_dir=outputs.tensorboard_dir / args.run_name)
    length = replace(take(Length, args), warmup_given="warmup_steps" in args.given)
    return Run(
        model,
        job,
        length,
        outputs,
        take(Retention, args),
        take(Schedule, args),
        take(SpikeRule, args),
        take(Inspection, args),
        take(Tasks, args),
        lora,
        args.num_workers,
        settings(args),
        stages or Stages(),
    )


def task_names(text: str) -> tuple[str, ...]:
    """Return the names and paths of tasks, which commas separate. Raises ArgumentTypeError if there is none."""
    names = dict.fromkeys(user_name(name.strip()) for name in text.split(",") if name.strip())
    if not names:
        raise argparse.ArgumentTypeError("the value is empty; name a task, or leave the flag out")
    return tuple(names)


def _steps(text: str) -> tuple[int, int]:
    first, _, last = text.partition("-")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise argparse.ArgumentTypeError(f"{text!r} is not FROM-TO, two steps counted from 1, such as 1200-1250")
    return int(first), int(last)


def _gigabits(text: str) -> float:
    try:
        return float(re.sub(r"(?i)gb(it)?(/?s|ps)?$", "", text.strip()))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of Gbit/s, such as 400 or 400Gb") from error


def _fraction(text: str) -> float | str:
    try:
        return text if text == AUTO else float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither {AUTO} nor a number from 0 to 1") from error


class DataSets(argparse.Action):
    """Store one data set's name or path as it is, or several with NAME=WEIGHT as a dict of weights by name or path."""

    def __call__(self, parser: object, namespace: Any, values: Any, option_string: object = None) -> None:
        if len(values) == 1:
            namespace.dataset = values[0]
            return
        weights: dict[str, float] = {}
        for text in values:
            name, _, weight = text.rpartition("=")
            try:
                share = float(weight)
            except ValueError:
                share = math.nan
            if not name or not 0 < share < math.inf:
                raise argparse.ArgumentError(self, f"{text!r} is not NAME=WEIGHT with a weight above 0, as web=0.7")
            if name in weights:
                raise argparse.ArgumentError(self, f"{name} is named twice; give it one weight")
            weights[name] = share
        if problem := weights_problem(weights):
            raise argparse.ArgumentError(self, problem)
        namespace.dataset = weights


class Given(argparse.Action):
    """Store the value, True for a flag without one, and add the flag to `given`: it is on the command line."""

    def __call__(self, parser: object, namespace: Any, values: Any, option_string: object = None) -> None:
        setattr(namespace, self.dest, True if self.nargs == 0 else values)
        namespace.given |= {self.dest}


def add_training_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags of batch, optimization, output and plan that pretrain.py and finetune.py share."""
    from training.schedule import COSINE, SCHEDULES, SHAPES  # here, since benchmark.py has no schedule

    batch = parser.add_argument_group("batch and duration")
    add_flag(batch, "-e --num_epochs", 1, "passes over the data")
    add_flag(batch, "-b --batch_size", 2, "sequences per data-parallel rank and micro-batch")
    add_flag(batch, "--accumulation_steps", 1, "micro-batches per optimizer step")
    text = "exchange gradients between ranks with each micro-batch, or their sum once a step, which takes 4 bytes per "
    text += "parameter; auto: once a step if the GPU's memory allows it"
    add_flag(batch, "--exchange", AUTO, text, choices=(AUTO, MICRO_BATCH, STEP))
    add_flag(batch, "-l --max_length", 4096, "sequence length in tokens")
    add_flag(batch, "--max_steps", int, "stop after this many optimizer steps (default: end of the data)")

    optimization = parser.add_argument_group("optimization")
    add_flag(optimization, "--lr", 3e-4, "peak learning rate (default: 3e-4)")
    add_flag(optimization, "-w --weight_decay", 0.1, "decoupled")
    text = "of AdamW; LLaMA's (default: 0.9 0.95)"
    add_flag(optimization, "--adam_betas", float, text, nargs=2, default=(0.9, 0.95), metavar="BETA")
    add_flag(optimization, "--adam_eps", 1e-8, "of AdamW; LLaMA-2 used 1e-5 (default: 1e-8)")
    text = "learning rate after the warm-up; wsd: constant, falling in the last --decay_steps"
    add_flag(optimization, "--lr_schedule", COSINE, text, choices=SCHEDULES)
    add_flag(optimization, "--min_lr_ratio", 0.1, "fraction of --lr at which it ends", action=Given)
    add_flag(optimization, "--decay_steps", int, "wsd: optimizer steps at the end (default: a tenth of the run)")
    text = "wsd: fall linearly, or fast at first (default: linear)"
    add_flag(optimization, "--decay_shape", str, text, choices=SHAPES)
    add_flag(optimization, "--gradient_clipping", 1.0, "maximum gradient norm; 0: no clipping")
    text = "skip steps whose loss or gradient norm is this many standard deviations above the mean of the last 128; "
    add_flag(optimization, "--skip_spikes", float, f"{text}OLMo uses 6 (default: off)", metavar="SIGMAS")
    add_flag(optimization, "--seed", 42, "seed of weights and data order")

    add_compute_args(parser, precision_short="-x")

    output = parser.add_argument_group("checkpoints and logs")
    add_flag(output, "-i --save_interval", 1000, "optimizer steps between checkpoints; 0: save at the end alone")
    add_flag(output, "-o --save_dir", "checkpoint", "folder", type=user_path)
    text = "checkpoint folder to resume from, or latest: the newest, if any (default: none)"
    add_flag(output, "-f --load", user_name, text, metavar="PATH|latest")
    text = "resume although data, seed, recipe or length changed; prints each change (default: off)"
    add_flag(output, "--allow_changes", False, text)
    text = "on a resume, leave out the sequences of these optimizer steps, such as those before a spike (default: none)"
    add_flag(output, "--skip_data", _steps, text, metavar="FROM-TO")
    text = "newest checkpoints to keep; the disk needs room for one more (default: all)"
    add_flag(output, "--keep_checkpoints", int, text)
    add_flag(output, "--keep_every", int, "also keep those at multiples of this step (default: none)")
    text = "folder of TensorBoard logs and metrics.jsonl"
    add_flag(output, "-t --tensorboard_dir", "tb_logs", text, type=user_path)
    text = (
        "name in TensorBoard and W&B: the logs are in a folder of this name in --tensorboard_dir, which several runs "
    )
    add_flag(output, "--run_name", str, f"{text}may then share (default: none)", metavar="NAME")
    text = "also log to this project of Weights & Biases; needs the package wandb (default: none)"
    add_flag(output, "--wandb", str, text, metavar="PROJECT")
    text = "trace these optimizer steps with torch's profiler, into the folder of logs (default: none)"
    add_flag(output, "--profile_steps", _steps, text, metavar="FROM-TO")
    add_flag(output, "--profile_ranks", int, "ranks to trace (default: 0)", nargs="+", metavar="RANK")
    text = "write a snapshot of the GPU's memory in this optimizer step, and when memory runs out (default: none)"
    add_flag(output, "--memory_snapshot", int, text, metavar="STEP")
    add_flag(output, "--log_interval", 10, "optimizer steps between terminal lines")
    text = "seconds without progress after which the run ends and names the ranks that hang; 0: never "
    add_flag(output, "--hang_timeout", int, f"{text}(default: 300, or 3 times the longest phase of a step)")
    add_dry_run_args(parser)

    unlisted: dict[str, Any] = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
    parser.add_argument("--weigth_decay", dest="weight_decay", type=float, **unlisted)
    parser.add_argument("--grad_clip", dest="gradient_clipping", type=float, **unlisted)
    parser.add_argument("--grad_checkpoint", dest="gradient_checkpoint", action="store_true", **unlisted)


def add_loading_args(parser: argparse._ActionsContainer) -> None:
    """Add the flags for the cache of tokenized data and the loader processes."""
    add_flag(parser, "--cache_dir", "~/.cache/llama-training", "folder for tokenized data sets", type=user_path)
    add_flag(parser, "--num_workers", 1, "loader processes per rank")


def add_compute_args(parser: argparse.ArgumentParser, precision: str = "fp16", precision_short: str = "") -> None:
    """Add the flags of precision, recomputation and kernels; benchmark.py uses -x for another flag."""
    compute = parser.add_argument_group("precision and memory")
    names, text = f"{precision_short} --mixed_precision", "working precision; master weights are always float32"
    add_flag(compute, names, precision, text, choices=("fp16", "bf16", "fp32"))
    text = "multiply in float8 in the decoder's linear layers, on GPUs from compute capability 8.9 (default: off)"
    add_flag(compute, "--fp8", False, text)
    text = "scale whole tensors for float8, or each row: slower and finer (default: tensorwise)"
    add_flag(compute, "--fp8_recipe", str, text, choices=(TENSORWISE, ROWWISE))
    text = "precision in which ranks add up their gradients: fp32, or the working precision"
    add_flag(compute, "--reduce_dtype", "fp32", text, choices=("fp16", "bf16", "fp32"))
    text = "recompute activations in the backward pass (default: off)"
    add_flag(compute, "-g --gradient_checkpoint", False, text)
    text = "recompute in this fraction of the layers, 0 to 1; auto: in as few as the GPU's memory allows"
    add_flag(compute, "--recompute", _fraction, f"{text} (default: 1 with -g, else 0)", metavar="FRACTION")
    text = "keep attention's output instead of recomputing it: a little faster, for 2 more bytes (in fp32 4) per "
    add_flag(compute, "--keep_attention", False, f"{text}hidden unit, token and layer (default: off)")
    add_flag(compute, "-a --flash_attention", False, "fused attention kernel (default: off)")
    text = "compute the same bits as any equal run on such GPUs, so that a resume changes none (default: off)"
    add_flag(compute, "--deterministic", False, text)
    text = "torch.compile the model's element-wise work and, where the plugin allows, its layers (default: on a GPU)"
    compute.add_argument("--compile", action=argparse.BooleanOptionalAction, help=text)


def add_evaluation_args(parser: argparse.ArgumentParser, by_fraction: bool = True) -> None:
    """Add the flags of the evaluation on held-out data: a fraction of the documents, or a split of the data set."""
    held_out = parser.add_argument_group("evaluation")
    if by_fraction:
        text = "fraction of the documents held out of training, chosen by a hash of their text"
        add_flag(held_out, "--eval_fraction", float, f"{text} (default: none, or that of a prepared data set)")
    text = "optimizer steps between evaluations on held-out data; also at the end"
    add_flag(held_out, "--eval_interval", 1000, text, action=Given)
    text = "evaluate before the first step too"
    add_flag(held_out, "--eval_first", False, text, action=Given, nargs=0, default=False)
    text = "tasks of lm-evaluation-harness on which checkpoints are evaluated beside the training: names, task files "
    text += "(.yaml) and folders of them, separated by commas (default: none)"
    add_flag(held_out, "--eval_tasks", task_names, text, default=(), metavar="TASK,...")
    text = "optimizer steps between these evaluations, a multiple of --save_interval; also at the end"
    add_flag(held_out, "--eval_tasks_interval", int, f"{text} (default: --save_interval)")
    text = "their device, cpu or cuda:N: a GPU of rank 0's machine on which no rank trains (default: cpu)"
    add_flag(held_out, "--eval_tasks_device", str, text, metavar="DEVICE")


def refuse_evaluation(given: frozenset[str], remedy: str) -> None:
    """Raise InputError if a flag of evaluations is `given` on the command line; call it if no data are held out."""
    for name in ("eval_interval", "eval_first"):
        if name in given:
            raise InputError(f"--{name}: no data are held out of training; {remedy}, or leave the flag out")


def add_dry_run_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags of dry runs, which plan for GPUs that need not be there."""
    plan = parser.add_argument_group("plan")
    add_flag(plan, "--dry_run", False, "check everything, print the memory and time that the run needs, and end")
    add_flag(plan, "--gpus", int, "dry run: plan for this many GPUs (default: the ranks launched)")
    add_machine_args(plan, "dry run: ")
    text = "dry run: fraction of their bf16 peak that training reaches (default: estimated)"
    add_flag(plan, "--mfu", float, text)


def add_machine_args(parser: argparse._ActionsContainer, prefix: str = "") -> None:
    """Add the flags of the GPUs to plan for, and their links."""
    add_flag(parser, "--gpu", str, f"{prefix}model of GPU, such as A100 (default: this machine's, else H100)")
    add_flag(parser, "--gpu_memory", float, f"{prefix}memory of each in GB (default: that of the model)")
    add_flag(parser, "--gpus_per_node", int, f"{prefix}GPUs of a host (default: 8)")
    text = f"{prefix}nominal Gbit/s of each GPU between hosts (default: 400, or what --facts says)"
    add_flag(parser, "--network", _gigabits, text, metavar="400Gb")
    text = f"{prefix}measured speeds, written by scripts/doctor.py --measure (default: built in)"
    add_flag(parser, "--facts", user_path, text, metavar="FILE")


def add_warmup_arg(parser: argparse.ArgumentParser) -> None:
    """Add --warmup_steps, which only pretraining has."""
    group = parser.add_argument_group("warm-up")
    add_flag(group, "-s --warmup_steps", 2000, "optimizer steps of linear warm-up", action=Given)


def add_lora_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags of LoRA adapters; without --lora_rank all weights are trained."""
    from checkpointing.adapters import MODULES

    group = parser.add_argument_group("LoRA")
    add_flag(group, "--lora_rank", int, "train adapters of this rank on frozen weights (default: none)")
    add_flag(group, "--lora_alpha", float, "adapters are scaled by alpha / rank (default: 2 x rank)")
    text = "linear modules that get an adapter, separated by commas (default: all seven of a layer)"
    add_flag(group, "--lora_modules", ",".join(MODULES), text)
