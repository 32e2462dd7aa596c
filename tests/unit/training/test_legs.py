"""The legs of runs with stages: drawn stages, stopped and resumed anywhere, compared with uninterrupted runs."""

import itertools
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_utils import MixtureDataset, PackedDataset, TrainingData, epochs_of
from engine.layout import Batch
from runs import run_from
from runtime.console import InputError
from training.announcements import stage_lines
from training.batches import ShardedSampler
from training.legs import largest_job
from training.plan import Plan, make_plan
from training.run import Run, TrainState
from training.stages import Stage, Stages

TOKENS = {"web": 9000, "code": 2100, "math": 1300}  # in each data set
LENGTHS = (8, 16, 24)


class Numbered(PackedDataset):
    """A data set of so many tokens, each sequence of which is its place in them."""

    slice_weights = document_ends = None
    fingerprint = tail_tokens = None

    def __init__(self, name: str, max_length: int):
        self.fingerprint, self.name, self.max_length = name, name, max_length

    def __len__(self) -> int:
        return TOKENS[self.name] // self.max_length

    def __getitem__(self, index: int) -> tuple[str, int, int]:
        return self.name, index * self.max_length, self.max_length


def run_of(stages: Stages, ranks: int = 1, *flags: str) -> Run:
    text = f"-c test -p zero2 -x fp32 -s 0 --lr_schedule constant --gpus {ranks} -l 8"
    return replace(run_from(*text.split(), *flags), stages=stages)


def datasets_of(run: Run, first: dict[str, float]) -> list[TrainingData]:
    """Return the data of each stage, as pretrain.py opens them."""
    alone = next(iter(first)) if len(first) == 1 else None
    weights, datasets = first, []
    for stage, batch in zip([None, *run.stages.later], run.stages.batches(run.job.batch), strict=True):
        weights = (stage and stage.data) or weights
        parts = {name: Numbered(name, batch.max_length) for name in weights}
        datasets.append(parts[alone] if alone and stage is None else MixtureDataset(parts, weights, alone))
    return datasets


def train(run: Run, first: dict[str, float], state: TrainState, stop: int | None = None) -> tuple[list[list], Plan]:
    """Train up to step `stop` or the end; return the sequences of each step, as the ranks read them, and the plan."""
    datasets = datasets_of(run, first)
    plan, steps = make_plan(run, datasets, state), []
    while state.step < (plan.total_steps if stop is None else min(stop, plan.total_steps)):
        leg = plan.leg_at(state.step)
        parts = []
        for rank in range(plan.layout.dp):
            options = {"seed": run.job.seed, "order": leg.dataset.order, "left_out": plan.left_out}
            end = leg.position + leg.steps * leg.global_batch
            sampler = ShardedSampler(leg.dataset, plan.layout.dp, rank, start=leg.position, stop=end, **options)
            share, first_step = leg.global_batch // plan.layout.dp, state.step - leg.first_step
            parts.append([*itertools.islice(sampler, first_step * share, (first_step + 1) * share)])
        rows = [leg.dataset[index] for together in zip(*parts, strict=True) for index in together]
        plan.advance(state, sum(length for *_, length in rows), None, skipped=False)
        steps.append(rows)
    return steps, plan


def saved(state: TrainState) -> TrainState:
    """Return a state as a checkpoint restores it."""
    values = json.loads(json.dumps(state.saved()))
    del values["adam_steps"]
    return TrainState(**values)


@st.composite
def mixtures(draw) -> dict[str, float]:
    names = draw(st.lists(st.sampled_from(sorted(TOKENS)), min_size=1, max_size=3, unique=True))
    shares = draw(st.lists(st.integers(1, 8), min_size=len(names), max_size=len(names)))
    return {name: share / sum(shares) for name, share in zip(names, shares, strict=True)}


@st.composite
def runs_with_stages(draw) -> tuple[Stages, dict[str, float], list[str]]:
    """Return stages, the data of the flags, and the flags of their length."""
    later, token = [], 0
    for _ in range(draw(st.integers(1, 3))):
        token += draw(st.integers(700, 4000))
        batch = draw(st.sampled_from([{}, {"batch_size": 2, "accumulation_steps": 3}]))
        length = draw(st.sampled_from([None, *LENGTHS]))
        data = draw(st.none() | mixtures())
        later.append(Stage(token, data, length, **(batch or {"batch_size": 4, "accumulation_steps": 2})))
    end = token + draw(st.integers(600, 6000))
    return Stages(Path("stages.toml"), tuple(later), end), draw(mixtures()), ["-b", "4", "--accumulation_steps", "2"]


@settings(max_examples=25, deadline=None)
@given(runs_with_stages(), st.data())
def test_a_run_that_is_stopped_and_resumed_reads_what_an_uninterrupted_one_reads(drawn, data):
    """On any number of ranks; with other batches each data set still goes on, and none of its sequences comes twice."""
    stages, first, flags = drawn
    run, state = run_of(stages, 1, *flags), TrainState()
    whole, plan = train(run, first, state)
    assert stages.end_token <= state.tokens < stages.end_token + plan.legs[-1].tokens_per_step
    check_stages(whole, plan, run, first)
    check_epochs(whole, state)

    resumed, steps, again = TrainState(), [], run
    for stop in [*sorted(data.draw(st.lists(st.integers(1, len(whole)), max_size=3))), None]:
        ranks = data.draw(st.sampled_from([1, 2]))
        again = run_of(stages, ranks, *(flags if ranks == 1 else ["-b", "2", "--accumulation_steps", "2"]))
        if ranks == 2:
            again = replace(again, stages=halved(stages))
        steps += train(again, first, resumed, stop)[0]
        resumed = saved(resumed)
    assert [sorted(step) for step in steps] == [sorted(step) for step in whole]
    assert {**resumed.saved(), "settings": 0} == {**saved(state).saved(), "settings": 0}

    other, steps = TrainState(), []  # with other global batches
    for stop in (len(whole) // 3, None):
        again = run_of(stages, data.draw(st.sampled_from([1, 2, 3])), *flags)
        steps += train(again, first, other, stop)[0]
        other = saved(other)
    check_epochs(steps, other)


def halved(stages: Stages) -> Stages:
    """Return the stages for twice as many ranks."""
    later = [
        replace(stage, batch_size=(stage.batch_size + 1) // 2, accumulation_steps=stage.accumulation_steps)
        for stage in stages.later
    ]
    return replace(stages, later=tuple(later))


def check_stages(whole: list[list], plan: Plan, run: Run, first: dict[str, float]) -> None:
    """Each stage begins with the first step at or after its token, and has its proportions at every place."""
    trained = list(itertools.accumulate((sum(row[2] for row in step) for step in whole), initial=0))
    assert [leg.number for leg in plan.legs] == list(range(len(run.stages.later) + 1))
    weights = first
    for leg, stage in zip(plan.legs, [None, *run.stages.later], strict=True):
        if stage is not None:
            weights = stage.data or weights
            assert trained[leg.first_step - 1] < stage.from_token <= trained[leg.first_step]
        rows = [row for step in whole[leg.first_step : leg.stop] for row in step]
        assert {row[2] for row in rows} == {leg.batch.max_length}
        count = Counter()
        for number, row in enumerate(rows, start=1):
            count[row[0]] += 1
            assert all(abs(count[name] - weight * number) < 2 for name, weight in weights.items()), (number, count)


def check_epochs(whole: list[list], state: TrainState) -> None:
    """No sequence of a data set comes twice before its epoch ends; the epochs counted are those that were read."""
    rows = [row for step in whole for row in step]
    for name in {row[0] for row in rows}:
        read = 0.0
        for length, group in itertools.groupby((row for row in rows if row[0] == name), key=lambda row: row[2]):
            places, size = [row[1] for row in group], TOKENS[name] // length
            read += len(places) / size
            for start in range(0, len(places), size):
                epoch = places[start : start + size]
                assert len(set(epoch)) == len(epoch)
        if state.mixture:
            assert epochs_of(state.mixture, state.sequences)[name] == pytest.approx(read)


@settings(max_examples=20, deadline=None)
@given(runs_with_stages(), st.integers(1, 60), st.integers(1, 3))
def test_up_to_the_first_boundary_it_is_the_run_without_stages(drawn, steps, ranks):
    stages, first, flags = drawn
    flags = [*flags, "--max_steps", str(1000)]
    run = run_of(replace(stages, end_token=None), ranks, *flags)
    plan = make_plan(run, datasets_of(run, first), TrainState())
    steps = min(steps, plan.legs[0].stop)
    expected = TrainState()
    without, _ = train(run_of(Stages(), ranks, *flags, "-e", "200"), first, expected, steps)
    state = TrainState()
    assert train(run, first, state, steps)[0] == without
    kept = {name: value for name, value in state.saved().items() if name not in ("settings", "mixture")}
    assert kept == {name: value for name, value in expected.saved().items() if name in kept}
    assert {name: value for name, value in state.settings.items() if name != "stages"} == expected.settings
    if len(first) > 1:
        assert state.mixture == expected.mixture


def test_a_longer_sequence_begins_an_epoch():
    stages = Stages(Path("s"), (Stage(800, {"web": 0.5, "math": 0.5}, 16), Stage(1600, {"web": 1.0})), 4000)
    run, state = run_of(stages, 1, "-b", "4"), TrainState()
    whole, plan = train(run, {"web": 1.0}, state)
    assert stage_lines(plan, 1e-3) == [
        "stage 0: steps 1 to 25, 800 tokens; learning rate 1.00e-03 to 1.00e-03; a step: 4 x 1 accumulated x 1 "
        "data-parallel = 4 sequences x 8 tokens",
        "  epochs 0.00 to 0.09 of 1,125 sequences",
        "stage 1: steps 26 to 50, 800 tokens; learning rate 1.00e-03 to 1.00e-03; a step: 2 x 1 accumulated x 1 "
        "data-parallel = 2 sequences x 16 tokens",
        "  math: 50.00%, epochs 0.00 to 0.31 of 81 sequences",
        "  web: 50.00%, epochs 0.09 to 0.13 of 562 sequences; an epoch begins, since its sequences have another length",
        "stage 2: steps 51 to 125, 2,400 tokens; learning rate 1.00e-03 to 1.00e-03; a step: 2 x 1 accumulated x 1 "
        "data-parallel = 2 sequences x 16 tokens",
        "  web: 100.00%, epochs 0.13 to 0.40 of 562 sequences",
    ]
    assert state.epoch == 0
    web = [row[1] for step in whole[25:] for row in step if row[0] == "web"]
    assert len(web) == len(set(web)) == 25 + 150


def test_a_stage_begins_at_the_checkpoint_also_with_smaller_steps():
    """Its token lies inside the last step, which was larger."""
    stages = Stages(Path("s"), (Stage(1712, {"math": 1.0}),), 4000)
    state = TrainState()
    train(run_of(stages, 2, "-b", "8"), {"web": 1.0}, state, 14)
    assert state.tokens == 1792
    for flags in (["-b", "8"], ["-b", "1"], ["-b", "32"]):
        run = run_of(stages, 1, *flags)
        plan = make_plan(run, datasets_of(run, {"web": 1.0}), saved(state))
        assert [(leg.number, leg.first_step) for leg in plan.legs] == [(0, 14), (1, 14)]
        assert 4000 <= plan.total_tokens < 4000 + plan.legs[1].tokens_per_step


def resumed_at(step: int, stages: Stages, *flags: str, first=None, **changes) -> TrainState:
    """Return the state of a run of 100 steps at a step."""
    state = TrainState()
    train(run_of(stages, 1, "-b", "4", "--max_steps", "100", *flags), first or {"web": 1.0}, state, step)
    return saved(state)


TWO = Stages(Path("s.toml"), (Stage(0.5, {"web": 0.5, "math": 0.5}), Stage(0.8, {"math": 1.0})))


class TestChangesOnAResume:
    """Ahead: one line and --allow_changes. Behind: refused."""

    def plan(self, state, stages, *flags, first=None):
        run = run_of(stages, 1, "-b", "4", "--max_steps", "100", "-f", "latest", *flags)
        return make_plan(run, datasets_of(run, first or {"web": 1.0}), state)

    @pytest.mark.parametrize("step", [10, 50])
    @pytest.mark.parametrize(
        ("before", "now"),
        [
            (TWO, replace(TWO, later=(Stage(0.7, {"web": 0.5, "math": 0.5}), TWO.later[1]))),
            (TWO, replace(TWO, later=(Stage(0.5, {"web": 0.4, "math": 0.6}), TWO.later[1]))),
            (TWO, replace(TWO, later=(TWO.later[0],))),
            (TWO, replace(TWO, later=(*TWO.later, Stage(0.9, max_length=16)))),
            (TWO, replace(TWO, later=(TWO.later[0], replace(TWO.later[1], lr_schedule="linear")))),
            (TWO, Stages()),
            (Stages(), TWO),
        ],
    )
    def test_ahead(self, capsys, step, before, now):
        state = resumed_at(step, before)
        with pytest.raises(InputError) as raised:
            self.plan(replace(state), now)
        (line,) = raised.value.problems
        assert line.startswith("--stages: those ahead were, in the checkpoint, ")
        assert line.endswith("; --allow_changes resumes anyway")
        capsys.readouterr()
        self.plan(state, now, "--allow_changes")
        (said,) = capsys.readouterr().out.splitlines()
        assert said == line.replace("; --allow_changes resumes anyway", ", as --allow_changes allows")
        self.plan(saved(state), now)  # it is the checkpoint's now
        assert not [text for text in capsys.readouterr().out.splitlines() if "--stages" in text]

    def test_a_batch_ahead_is_no_change(self, capsys):
        later = (replace(TWO.later[0], batch_size=2, accumulation_steps=1), TWO.later[1])
        self.plan(resumed_at(10, TWO), replace(TWO, later=later))
        assert capsys.readouterr().out == ""

    def test_the_mixture_of_the_stage_itself(self, capsys):
        """It changes from here on, and each data set goes on."""
        now = replace(TWO, later=(replace(TWO.later[0], data={"math": 0.25, "code": 0.75}), TWO.later[1]))
        state = resumed_at(60, TWO)
        with pytest.raises(InputError) as raised:
            self.plan(replace(state), now)
        assert [re.match(r"--stages: s.toml, stage 1, data: ", line) is not None for line in raised.value.problems]
        before = epochs_of(state.mixture, state.sequences)
        plan = self.plan(state, now, "--allow_changes")
        assert plan.legs[0].mixture["start"] == state.sequences
        after = epochs_of(plan.legs[0].mixture, state.sequences)
        assert after == {**before, "code": 0}

    @pytest.mark.parametrize(
        ("now", "flags", "problem"),
        [
            (
                Stages(),
                (),
                "the checkpoint is in stage 2, and the flag is left out; give the stages of the run",
            ),
            (
                replace(TWO, later=TWO.later[:1]),
                (),
                "the checkpoint is in stage 2, and s.toml has only 1; give",
            ),
            (
                replace(TWO, later=(Stage(0.6, {"web": 0.5, "math": 0.5}), TWO.later[1])),
                (),
                "--stages: s.toml, stage 1, from_token: was 0.5 in the checkpoint and is 0.6 now, but lies behind",
            ),
            (
                replace(TWO, later=(Stage(0.5, {"web": 0.4, "math": 0.6}), TWO.later[1])),
                (),
                "stage 1, data: was {'web': 0.5, 'math': 0.5} in the checkpoint and is {'web': 0.4, 'math'",
            ),
            (
                replace(TWO, later=(replace(TWO.later[0], max_length=16), replace(TWO.later[1], max_length=8))),
                (),
                "stage 1, max_length: was 8 in the checkpoint and is 16 now, but lies behind",
            ),
            (
                replace(TWO, later=(TWO.later[0], replace(TWO.later[1], from_token=0.81))),
                (),
                "stage 2, from_token: was 0.8 in the checkpoint and is 0.81 now, but lies behind",
            ),
            (
                TWO,
                ("--seed", "3"),
                "--load: --seed was 42 in the checkpoint and is 3 now; this lies behind, since the check",
            ),
            (TWO, ("-l", "16"), "--load: --max_length was 8 in the checkpoint and is 16 now; this lies behind"),
        ],
    )
    @pytest.mark.parametrize("allowed", [(), ("--allow_changes",)])
    def test_behind(self, now, flags, problem, allowed):
        with pytest.raises(InputError) as raised:
            self.plan(resumed_at(90, TWO), now, *flags, *allowed)
        (line,) = raised.value.problems
        assert problem in line

    def test_other_data_behind(self):
        with pytest.raises(InputError, match="--load: the data was web in the checkpoint and is code now"):
            self.plan(resumed_at(60, TWO), TWO, "--allow_changes", first={"code": 1.0})

    def test_a_stage_in_the_past(self):
        now = replace(TWO, later=(Stage(0.3, {"math": 1.0}), *TWO.later))
        with pytest.raises(InputError) as raised:
            self.plan(resumed_at(40, TWO), now, "--allow_changes")
        assert raised.value.problems == (
            "--stages: s.toml, stage 1, from_token: 0.3 lies behind the checkpoint, which has 40 steps and 1,280 "
            "tokens; begin later, or resume from an earlier checkpoint",
        )

    def test_a_run_with_a_stable_learning_rate_is_made_longer_before_its_stages(self, capsys):
        """Then a fraction of the run is another step; a token is not. Neither needs --allow_changes."""
        stages = Stages(Path("s.toml"), (Stage(0.8, {"math": 1.0}, lr_schedule="linear", min_lr_ratio=0.0),))
        state = resumed_at(30, stages)
        plan = self.plan(replace(state), stages, "--max_steps", "200")
        assert [leg.first_step for leg in plan.legs] == [30, 160]
        assert "the learning rate so far is the same" in capsys.readouterr().out
        with pytest.raises(InputError, match="the length of the run and its learning-rate schedule"):
            self.plan(resumed_at(90, stages), stages, "--max_steps", "200")


@pytest.mark.parametrize(
    ("later", "problem"),
    [
        ((Stage(3200, {"math": 1.0}),), "stage 1, from_token: it would begin after step 100, where the run has ended"),
        ((Stage(10**12), Stage(2 * 10**12)), "stage 1, from_token: it would begin after step 31,250,000,000, where"),
        ((Stage(0.5), Stage(1599)), "stage 1, from_token: it would begin after step 50, and so would the next stage"),
        ((Stage(0.5), Stage(40)), "stage 1, from_token: it would begin after step 50, and so would the next stage"),
        ((Stage(1), Stage(2)), "stage 1, from_token: it would begin after step 1, and so would the next stage"),
        (
            (Stage(64, lr_schedule="linear"),),
            "stage 1, lr_schedule: it would begin after step 2, within the 5 steps of wa",
        ),
        (
            (Stage(0.2, lr_schedule="linear", min_lr_ratio=0.05), Stage(0.8, lr_schedule="cosine")),
            "stage 2, min_lr_ratio: 0.1 of --lr is above the 0.05 where it begins; give a lower one, or lr",
        ),
    ],
)
def test_stages_that_do_not_fit_into_the_run(later, problem):
    run = run_of(Stages(Path("s"), later), 1, "-b", "4", "--max_steps", "100", "-s", "5")
    with pytest.raises(InputError) as raised:
        make_plan(run, datasets_of(run, {"web": 1.0}), TrainState())
    (line,) = raised.value.problems
    assert line.startswith(f"--stages: s, {problem}")


class TestDataLeftOut:
    """--skip_data leaves out steps of the stage that the run resumes in."""

    def plan(self, steps, at):
        flags = ["-b", "4", "--max_steps", "100", "-f", "latest", "--skip_data", steps]
        run, state = run_of(TWO, 1, *flags), resumed_at(at, TWO)
        return train(run, {"web": 1.0}, state), state

    def test_the_stage_itself_reads_on(self):
        whole, _ = train(run_of(TWO, 1, "-b", "4", "--max_steps", "120"), {"web": 1.0}, TrainState(), 60)
        (steps, plan), state = self.plan("20-24", 10)
        assert steps[:9] == whole[10:19]
        assert steps[9:35] == whole[24:50]
        assert [leg.position for leg in plan.legs] == [40, 220, 340]
        assert state.left_out == {"20-24": [76, 96]}
        assert len(steps) == 90

    def test_in_a_later_stage(self):
        (steps, plan), _ = self.plan("60-64", 50)
        assert [leg.position for leg in plan.legs] == [200, 200, 340]
        read = [row for step in steps[:30] for row in step]
        assert Counter(row[0] for row in read) == {"web": 60, "math": 60}

    def test_steps_of_several_stages_are_refused(self):
        with pytest.raises(InputError, match="--skip_data: stage 0 ends after step 50; give steps of one stage"):
            self.plan("48-52", 10)

    def test_steps_after_the_end_are_refused(self):
        with pytest.raises(InputError, match="--skip_data: the run ends after step 100; give earlier steps"):
            self.plan("98-101", 90)

    def test_a_new_run_is_refused(self):
        with pytest.raises(InputError, match="--skip_data: there is no checkpoint to resume from; give -f"):
            self.plan("20-24", 0)

    def test_a_stage_does_not_begin_inside_what_is_left_out(self):
        state = resumed_at(10, TWO)
        state.left_out = {"40-44": [156, 176]}
        now = replace(TWO, later=(replace(TWO.later[0], from_token=0.3), TWO.later[1]))
        run = run_of(now, 1, "-b", "4", "--max_steps", "100", "-f", "latest", "--allow_changes")
        with pytest.raises(
            InputError, match="it would begin after step 30, before the data that --skip_data leaves out"
        ):
            make_plan(run, datasets_of(run, {"web": 1.0}), state)


def test_the_memory_is_that_of_the_largest_stage():
    stages = Stages(Path("s"), (Stage(1, max_length=128, batch_size=8, accumulation_steps=1), Stage(2, max_length=16)))
    job = largest_job(run_of(stages, 1, "-b", "4", "--accumulation_steps", "4"))
    assert job.batch == Batch(8, 2, 128)  # two, since the engine accumulates
    single = run_of(Stages(), 1, "-b", "4").job
    assert largest_job(run_of(Stages(), 1, "-b", "4")).batch == single.batch
