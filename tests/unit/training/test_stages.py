"""The file of `--stages`: what it may say, and a line for each mistake in it."""

import os
import re

import pytest

from engine.layout import Batch
from launching import ROOT
from pretrain import parse_args
from runs import problems_of
from runtime.console import InputError
from training.stages import Stage, read_stages

FLAGS = "-p zero2 -x bf16 --max_steps 100 -s 4"


@pytest.fixture
def stages(tmp_path):
    """Return a function that reads stages from a text."""

    def stages(text: str, dataset="web"):
        path = tmp_path / "stages.toml"
        path.write_text(text, encoding="utf-8")
        return read_stages(path, dataset)

    return stages


def test_all_keys(stages):
    read = stages(
        """\ufeffend_token = "1T"  # the run's length
        [[stage]]\r
        from_token = "0.9T"
        data = {web = 0.25, "some/folder/math.jsonl.gz" = 0.75}
        max_length = 8192
        batch_size = 1
        accumulation_steps = 4
        lr_schedule = "linear"
        lr = 1e-4
        min_lr_ratio = 0
        [[stage]]
        from_token = 9_500_000e5
        data = "math"
        """
    )
    assert read.end_token == 10**12
    data = {"web": 0.25, "some/folder/math.jsonl.gz": 0.75}
    assert read.later == (
        Stage(9 * 10**11, data, 8192, 1, 4, "linear", 1e-4, 0.0),
        Stage(95 * 10**10, {"some/folder/math.jsonl.gz": 1.0}),  # by its name in the logs
    )


@pytest.mark.parametrize(
    ("value", "tokens"),
    [("7", 7), ('"7"', 7), ('"1.5 k"', 1500), ('"2M"', 2 * 10**6), ("2e6", 2 * 10**6), ("0.9", 0.9), ("0.001", 0.001)],
)
def test_tokens(stages, value, tokens):
    (stage,) = stages(f"[[stage]]\nfrom_token = {value}").later
    assert stage.from_token == tokens
    assert isinstance(stage.from_token, type(tokens))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", " has no [[stage]]; describe one, or leave the flag out"),
        ('end_token = "1T"', " has no [[stage]]; describe one"),
        ("stage = []", " has no [[stage]]; describe one"),
        ("[stage]\nfrom_token = 1", ", stage: is not a list of tables; write [[stage]], in double brackets"),
        ("stage = [1]", ", stage: is not a list of tables"),
        ('{"stage": []}', " is not TOML: Invalid"),
        ("[[stage]]\nfrom_token = 1\nfrom_token = 2", " is not TOML: Cannot overwrite a value (at end of document)"),
        ("[[stage]]\nfrom_token = 1\ndata = {a = 1.0, a = 1.0}", " is not TOML: "),
        ("[[stage]]\nfrom_token = " + "1" * 5000, " is not TOML: "),
        ("a = " + "[" * 5000, " is not TOML: "),
        ("max_length = 8192\n[[stage]]\nfrom_token = 1", ", max_length: stands below [[stage]]"),
        ("stages = 3\n[[stage]]\nfrom_token = 1", ", stages: is not a key that is known here; did you mean stage?"),
        ("end_token = 0.9\n[[stage]]\nfrom_token = 1", ", end_token: must be tokens, such as"),
        (
            "end_token = 1\n[[stage]]\nfrom_token = 1",
            ", stage 1, from_token: 1 is not before the run's end, end_token 1",
        ),
        ('[[stage]]\ndata = "web"', ", stage 1, from_token: is missing; give tokens"),
        ("[[stage]]\nfrom_token = 0", ", stage 1, from_token: must be tokens, such as"),
        ("[[stage]]\nfrom_token = 1.0", ", stage 1, from_token: must be tokens, such as"),
        ("[[stage]]\nfrom_token = 1.5", ", stage 1, from_token: must be tokens, such as"),
        ("[[stage]]\nfrom_token = -0.5", ", stage 1, from_token: must be tokens, such as"),
        ("[[stage]]\nfrom_token = inf", ", stage 1, from_token: must be tokens, such as"),
        ("[[stage]]\nfrom_token = nan", ", stage 1, from_token: must be tokens, such as"),
        ("[[stage]]\nfrom_token = true", ", stage 1, from_token: must be tokens, such as"),
        ('[[stage]]\nfrom_token = "90%"', ", stage 1, from_token: must be tokens, such as"),
        ('[[stage]]\nfrom_token = "0.5"', ", stage 1, from_token: must be tokens, such as"),
        ("[[stage]]\nfrom_token = 1979-05-27", ", stage 1, from_token: must be tokens, such as"),
        (
            "[[stage]]\nfrom_token = 5\n[[stage]]\nfrom_token = 5",
            ", stage 2, from_token: 5 is not above the 5 of a stage",
        ),
        (
            "[[stage]]\nfrom_token = 0.5\n[[stage]]\nfrom_token = 9\n[[stage]]\nfrom_token = 0.25",
            ", stage 3, from_token: ",
        ),
        (
            '[[stage]]\nfrom_token = 1\n"dataset" = 1',
            ", stage 1, dataset: is not a key that is known here; did you mean data?",
        ),
        (
            '[[stage]]\nfrom_token = 1\n"a\\nb" = 1',
            r", stage 1, 'a\nb': is not a key that is known here; the keys are from_",
        ),
        ("[[stage]]\nfrom_token = 1\ndata = 7", ", stage 1, data: must be weights by data set, such as {web = 0.7"),
        ("[[stage]]\nfrom_token = 1\ndata = {}", ", stage 1, data: must be weights by data set"),
        ('[[stage]]\nfrom_token = 1\ndata = ["a"]', ", stage 1, data: must be weights by data set"),
        (
            "[[stage]]\nfrom_token = 1\ndata = {a = 70, b = 30}",
            ", stage 1, data: the weights add up to 100; they must add",
        ),
        (
            "[[stage]]\nfrom_token = 1\ndata = {a = 1.5, b = -0.5}",
            ", stage 1, data: must be a weight above 0 for b, not -0.5",
        ),
        ("[[stage]]\nfrom_token = 1\ndata = {a = 1, b = 0}", ", stage 1, data: must be a weight above 0 for b, not 0"),
        ('[[stage]]\nfrom_token = 1\ndata = {a = "1"}', ", stage 1, data: must be a weight above 0 for a, not '1'"),
        ("[[stage]]\nfrom_token = 1\ndata = {a = inf}", ", stage 1, data: must be a weight above 0 for a, not inf"),
        (
            "[[stage]]\nfrom_token = 1\ndata = {a.b = 1}",
            ", stage 1, data: must be a weight above 0 for a, not {'b': 1}",
        ),
        ('[[stage]]\nfrom_token = 1\ndata = {"" = 1}', ", stage 1, data: the value is empty"),
        ('[[stage]]\nfrom_token = 1\ndata = {"a\\u0000" = 1}', r", stage 1, data: 'a\x00' is not a name of a data set"),
        ('[[stage]]\nfrom_token = 1\ndata = {"%s" = 1}' % ("x" * 300), "File name too long; give another path"),
        (
            '[[stage]]\nfrom_token = 1\ndata = {"a/b" = 0.5, "c/b.jsonl" = 0.5}',
            ", stage 1, data: two data sets are called b",
        ),
        (
            '[[stage]]\nfrom_token = 1\ndata = "other/web"',
            ", stage 1, data: two data sets are called web, web and other/web",
        ),
        (
            "[[stage]]\nfrom_token = 1\nmax_length = 1",
            ", stage 1, max_length: must be a whole number of at least 2, not 1",
        ),
        (
            "[[stage]]\nfrom_token = 1\nbatch_size = 1.0",
            ", stage 1, batch_size: must be a whole number of at least 1, not 1.0",
        ),
        ("[[stage]]\nfrom_token = 1\nbatch_size = true", ", stage 1, batch_size: must be a whole number"),
        (
            '[[stage]]\nfrom_token = 1\nlr_schedule = "wsd"',
            ", stage 1, lr_schedule: must be one of cosine, linear, 1-sqrt",
        ),
        ("[[stage]]\nfrom_token = 1\nlr_schedule = []", ", stage 1, lr_schedule: must be one of cosine"),
        ("[[stage]]\nfrom_token = 1\nlr = 1e-4", ", stage 1, lr: takes effect only with lr_schedule"),
        ("[[stage]]\nfrom_token = 1\nmin_lr_ratio = 0", ", stage 1, min_lr_ratio: takes effect only with lr_schedule"),
        (
            '[[stage]]\nfrom_token = 1\nlr_schedule = "linear"\nlr = 0',
            ", stage 1, lr: must be a learning rate above 0, not 0",
        ),
        (
            '[[stage]]\nfrom_token = 1\nlr_schedule = "linear"\nmin_lr_ratio = 2',
            ", stage 1, min_lr_ratio: must be a fraction of --lr, from 0 to 1, not 2",
        ),
        (
            '[[stage]]\nfrom_token = 1\nlr_schedule = "constant"\nmin_lr_ratio = 0.1',
            ", stage 1, min_lr_ratio: takes no effect with the lr_schedule constant",
        ),
    ],
)
def test_each_mistake_is_one_line(stages, text, problem):
    with pytest.raises(InputError) as raised:
        stages(text)
    (line,) = raised.value.problems
    assert re.match(r"--stages: .*stages\.toml[, ]", line), line
    assert problem in line
    assert "\n" not in line
    assert ("; " in line) or ("?" in line) or "must add up" in line  # a remedy


def test_all_mistakes_at_once(stages):
    with pytest.raises(InputError) as raised:
        stages("extra = 1\n[[stage]]\nmax_length = -1\n[[stage]]\nfrom_token = 1\nlr = 2")
    assert [re.search(r"stages.toml, (stage \d, )?(\w+)", line)[2] for line in raised.value.problems] == [
        *("extra", "max_length", "from_token", "lr"),
    ]


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda path: None, " cannot be read (No such file or directory); give a TOML file"),
        (lambda path: path.mkdir(), " is not a file; give a TOML file"),
        (lambda path: os.mkfifo(path), " is not a file; give a TOML file"),
        (lambda path: path.symlink_to("/dev/zero"), " is not a file; give a TOML file"),
        (lambda path: path.write_bytes(b"\xff\xfe[\x00"), " is not UTF-8 text; give a TOML file"),
        (lambda path: path.write_bytes(b"#" * (2**20 + 1)), " has more than 1,048,576 bytes; give a TOML file"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, make, problem):
    path = tmp_path / "stages.toml"
    make(path)
    with pytest.raises(InputError) as raised:
        read_stages(path, "web")
    assert raised.value.problems == (f"--stages: {path}{problem}" + (" of stages" if "bytes" in problem else ""),)


def test_data_sets_may_be_named_as_in_the_logs(stages, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sets" / "web").mkdir(parents=True)
    (tmp_path / "link").symlink_to("sets")
    text = '[[stage]]\nfrom_token = 1\ndata = {"link/web" = 0.5, code = 0.5}\n[[stage]]\nfrom_token = 2\ndata = "web"'
    first, second = stages(text, {"sets/web": 0.5, "x/code.jsonl": 0.5}).later
    assert first.data == {"sets/web": 0.5, "x/code.jsonl": 0.5}
    assert second.data == {"sets/web": 1.0}
    (tmp_path / "web").mkdir()  # now the name is ambiguous
    with pytest.raises(InputError, match="stage 2, data: two data sets are called web, sets/web and web; rename one"):
        stages(text, {"sets/web": 0.5, "x/code.jsonl": 0.5})


class TestBatches:
    """A step keeps its tokens, in the largest micro-batches that have no more tokens than those before."""

    FIRST = Batch(4, 6, 1000)

    @pytest.mark.parametrize(
        ("keys", "expected"),
        [
            ("", (4, 6, 1000)),
            ("max_length = 2000", (2, 6, 2000)),
            ("max_length = 4000", (1, 6, 4000)),
            ("max_length = 8000", (1, 3, 8000)),
            ("max_length = 24000", (1, 1, 24000)),
            ("max_length = 500", (8, 6, 500)),
            ("max_length = 1500", (2, 8, 1500)),
            ("batch_size = 3", (3, 8, 1000)),
            ("accumulation_steps = 3", (8, 3, 1000)),
            ("batch_size = 3\nmax_length = 4000", (3, 2, 4000)),
            ("batch_size = 4\naccumulation_steps = 12", (4, 12, 1000)),  # both: as they are
            ("batch_size = 4\naccumulation_steps = 1\nmax_length = 7", (4, 1, 7)),
            ("max_length = 7000", "7000 does not divide the 24,000 tokens of a rank's step in the stage before"),
            ("max_length = 48000", "give batch_size and accumulation_steps"),
            ("batch_size = 5", "stage 1, batch_size: 5 does not divide the 24,000 tokens"),
            ("accumulation_steps = 7", "stage 1, accumulation_steps: 7 does not divide"),
            ("batch_size = 24\naccumulation_steps = 24", (24, 24, 1000)),
        ],
    )
    def test_of_one_stage(self, stages, keys, expected):
        read = stages(f"[[stage]]\nfrom_token = 5\n{keys}")
        if isinstance(expected, str):
            with pytest.raises(InputError, match=re.escape(expected)):
                read.batches(self.FIRST)
        else:
            assert read.batches(self.FIRST) == [self.FIRST, Batch(*expected)]

    def test_go_on_from_the_stage_before(self, stages):
        text = "[[stage]]\nfrom_token = 5\nmax_length = 2000\n[[stage]]\nfrom_token = 6\n[[stage]]\nfrom_token = 7\n"
        batches = stages(f"{text}max_length = 4000").batches(self.FIRST)
        assert batches == [self.FIRST, Batch(2, 6, 2000), Batch(2, 6, 2000), Batch(1, 6, 4000)]


def test_the_examples_in_the_documentation(stages):
    texts = [(ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "docs/data.md")]
    anneal, at_the_end, longer = (
        stages(block) for text in texts for block in re.findall(r"^```toml\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    )
    assert anneal.later[0].data == {"pages.jsonl": 0.7, "quickstart/data": 0.3}
    assert at_the_end.end_token == 10**12
    assert longer.batches(Batch(4, 8, 4096)) == [Batch(4, 8, 4096), Batch(1, 8, 16384), Batch(1, 4, 32768)]


class TestWithFlags:
    """Contradictions between the file and the flags, found before data are opened."""

    @pytest.mark.parametrize(
        ("flags", "keys", "problem"),
        [
            ("--num_epochs 2", "", "--num_epochs: a run with --stages ends at --max_steps or end_token"),
            ("--streaming", "", "--streaming: takes one --dataset, not --stages; leave it out"),
            ("--slice_weights llama", "", "--slice_weights: takes one --dataset, not --stages; leave it out"),
            ("--dataset_slices arxiv", "", "--dataset_slices: takes one --dataset, not --stages"),
            (
                "--lr_schedule wsd",
                'lr_schedule = "linear"',
                "lr_schedule: contradicts --lr_schedule wsd, which itself falls",
            ),
            (
                "",
                "max_length = 256",
                "stage 1, max_length: 256 is above the model's context of 128 tokens; give at most",
            ),
            ("", "max_length = 96", "stage 1, max_length: 96 does not divide the 256 tokens"),
            (
                "",
                "batch_size = 1",
                "stage 1, accumulation_steps: 2 need sums of gradients from the start; give the run",
            ),
            (
                "-p gemini_auto -x bf16",
                "max_length = 64",
                "stage 1, max_length: gemini_auto plans its memory in the first",
            ),
            (
                "-p hybrid_parallel --gpus 2 --dry_run --sp 2",
                "max_length = 85\nbatch_size = 1\naccumulation_steps = 1",
                "stage 1, sp: 2 does not divide",
            ),
            (
                "-p hybrid_parallel --gpus 2 --dry_run --pp 2 --tp 1 --microbatch_size 2 -b 4",
                "batch_size = 2\naccumulation_steps = 1",
                "stage 1, pp: 2 stages need at least 2 microbatches",
            ),
        ],
    )
    def test_one_line(self, tmp_path, flags, keys, problem):
        path = tmp_path / "stages.toml"
        path.write_text(f"[[stage]]\nfrom_token = 5_000\n{keys}")
        (line,) = problems_of(f"{FLAGS} {flags} --stages {path}")
        assert problem in line

    @pytest.mark.parametrize(
        ("flags", "text", "problem"),
        [
            ("", "", " does not say where the run ends; give --max_steps, or end_token in it"),
            ("--max_steps 9", "end_token = 9", ", end_token: --max_steps gives the run's length too; leave one out"),
        ],
    )
    def test_length(self, tmp_path, flags, text, problem):
        path = tmp_path / "stages.toml"
        path.write_text(f"{text}\n[[stage]]\nfrom_token = 5")
        assert problems_of(f"-p zero2 -x bf16 {flags} --stages {path}") == [f"--stages: {path}{problem}"]

    def test_a_learning_rate_of_0_is_not_gone_on_with(self, tmp_path):
        path = tmp_path / "stages.toml"
        ends = '[[stage]]\nfrom_token = 5\nlr_schedule = "linear"\nmin_lr_ratio = 0\n[[stage]]\nfrom_token = 6\n'
        path.write_text(f'{ends}lr_schedule = "constant"')
        (line,) = problems_of(f"{FLAGS} --stages {path}")
        assert "stage 2, lr_schedule: the stages before end with a learning rate of 0; give lr too" in line
        path.write_text(f'{ends}lr_schedule = "constant"\nlr = 1e-5')
        assert problems_of(f"{FLAGS} --stages {path}") == []

    def test_outputs_among_the_data_of_a_stage(self, tmp_path):
        path, data = tmp_path / "stages.toml", tmp_path / "data"
        data.mkdir()
        path.write_text(f"[[stage]]\nfrom_token = 5\ndata = '{data}'")
        problems = problems_of(f"{FLAGS} --stages {path} -o {data}/checkpoint")
        assert problems == [
            f"--save_dir: {data}/checkpoint lies in --dataset {data}, so its files would be read as data; "
            "give a folder outside"
        ]

    def test_in_the_help(self, capsys):
        with pytest.raises(SystemExit):
            parse_args(["--help"])
        assert "--stages FILE" in capsys.readouterr().out
