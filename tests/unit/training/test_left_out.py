"""The arithmetic of data that is left out, compared with lists of positions."""

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runs import problems_of
from runtime.console import InputError
from training.batches import ShardedSampler
from training.left_out import leave_out, merged, position_after, sequences_between

RANGES = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 10)).map(lambda pair: [pair[0], sum(pair)]), max_size=4)


@given(RANGES, st.integers(0, 40), st.integers(0, 30), st.sampled_from([1, 2, 3]))
def test_positions(ranges, start, count, replicas):
    gone = {position for first, stop in ranges for position in range(first, stop)}
    apart = merged(ranges)
    assert sorted(gone) == [position for first, stop in apart for position in range(first, stop)]
    if start in gone and start - 1 in gone:
        return  # no run stops inside a range
    kept = [position for position in range(start, 200) if position not in gone]
    after = position_after(start, count, apart)
    assert after == (kept[count - 1] + 1 if count else start)
    assert sequences_between(start, 200, apart) == len(kept)
    assert position_after(after, 5, apart) == position_after(start, count + 5, apart)
    shares = []
    for rank in range(replicas):
        sampler = ShardedSampler(
            range(1),
            replicas,
            rank,
            seed=0,
            start=start,
            stop=start + count,
            order=lambda _: range(200),
            left_out=apart,
        )
        shares.append(list(sampler))
        assert len(shares[-1]) == len(sampler)
    assert sorted(itertools.chain(*shares)) == kept[:count]
    assert all(share == kept[rank:count:replicas] for rank, share in enumerate(shares))


def test_steps_are_left_out_once():
    """Also if the run ends earlier without them, when it is started again."""
    left_out: dict[str, list[int]] = {}
    line = leave_out(left_out, (12, 14), 10, 80, 8, 1000, 105)
    assert left_out == {"12-14": [88, 112]}
    assert line.endswith(
        "the 24 sequences of steps 12-14 are left out; step 12 trains on those that step 15 would have had"
    )
    assert "are left out already" in leave_out(left_out, (12, 14), 13, 120, 8, 1000, 13)
    assert left_out == {"12-14": [88, 112]}
    leave_out(left_out, (11, 12), 10, 80, 8, 1000, 105)  # step 12 reads the data after the first range
    assert merged(left_out.values()) == [[80, 120]]


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((10, 12), "step 10 is behind the checkpoint, which is at step 10; resume from an earlier one"),
        ((104, 106), "the run ends after step 105; give earlier steps, or a larger --max_steps"),
        ((120, 126), "the data end before step 126; give earlier steps, or more --num_epochs"),
    ],
)
def test_steps_that_cannot_be_left_out(steps, message):
    with pytest.raises(InputError, match=re.escape(f"--skip_data: {message}")):
        leave_out({}, steps, 10, 80, 8, 1000, 105)


def test_only_a_resume_leaves_out_data():
    message = "--skip_data: takes effect only with --load; give that too, or leave it out"
    assert problems_of("--skip_data 3-4") == [message]
    for text in ("0-3", "4-3", "3", "a-b", "3-", "-3", "1-2-3"):
        with pytest.raises(InputError, match="--skip_data"):
            problems_of(f"-f latest --skip_data {text}")
