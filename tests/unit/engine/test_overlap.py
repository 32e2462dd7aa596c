"""Products computed beside an exchange, compared with products of whole matrices in float64."""

import pytest
import torch
import torch.distributed as dist

from engine import overlap
from engine.float8 import E4M3, E5M2, Factor, columns_contiguous, factor
from processes import run_ranks

TOKENS, INNER, OUTER = 96, 64, 48
KINDS = [None, False, True]  # working precision, one scale, a scale for each row


def matrix(rows: int, columns: int, seed: int) -> torch.Tensor:
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return values.to("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16)


def left_factor(tensor: torch.Tensor, kind: bool | None, dtype: torch.dtype) -> Factor:
    return Factor(tensor) if kind is None else factor(tensor, dtype, 1 if kind else None)


def right_factor(tensor: torch.Tensor, kind: bool | None) -> Factor:
    return Factor(tensor) if kind is None else columns_contiguous(factor(tensor, E4M3, 0 if kind else None))


def exact(used: Factor) -> torch.Tensor:
    return used.values.double() * (1 if used.scale is None else used.scale.double())


def scales(*factors: Factor) -> list[torch.Tensor]:
    return [used.scale for used in factors if used.scale is not None]


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


def exchanges(times: int) -> list[float]:
    """Return the errors of both operations, for every kind of factor, with new matrices each time."""
    group, errors = dist.group.WORLD, []
    overlap.connect(group)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for seed in range(0, 100 * times, 100):
        for kind in KINDS:
            whole = left_factor(matrix(TOKENS, INNER, seed), kind, E4M3)
            rights = [right_factor(matrix(INNER, OUTER, seed + number), kind) for number in (1, 2)]
            shard = whole.values.chunk(ranks)[rank].contiguous()
            gathered, *products = overlap.gather_and_multiply(
                shard,
                whole.scale,
                [right.values for right in rights],
                scales(*rights),
                group.group_name,
                torch.bfloat16,
                fast=False,
            )
            assert gathered.float().equal(whole.values.float())
            errors += [
                error(product, exact(whole) @ exact(right)) for product, right in zip(products, rights, strict=True)
            ]

            lefts = [  # each rank has other columns of the left matrices
                [left_factor(matrix(TOKENS, INNER, seed + 10 * other + number), kind, E5M2) for number in (3, 4)]
                for other in range(ranks)
            ]
            expected = sum(
                exact(left) @ exact(right) for every in lefts for left, right in zip(every, rights, strict=True)
            )
            own = lefts[rank]
            parts, again = overlap.multiply_and_exchange(
                [left.values for left in own],
                scales(*own),
                [right.values for right in rights],
                scales(*rights),
                group.group_name,
                torch.bfloat16,
                fast=False,
                shard=shard,
            )
            assert again.float().equal(whole.values.float())
            errors.append(error(parts.sum(0), expected.chunk(ranks)[rank]))
    return errors


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_products_are_those_of_the_whole_matrices(ranks):
    for errors in run_ranks(ranks, exchanges, 2):
        assert max(errors) < 0.006  # bfloat16 rounds by up to 0.4%


def exchanges_on_gpus() -> list[float]:
    errors = exchanges(20)
    assert isinstance(overlap._exchanges[dist.group.WORLD.group_name], overlap._Peers), (
        "these GPUs cannot read each other's memory"
    )
    return errors


@pytest.mark.gpu
def test_products_are_those_of_the_whole_matrices_on_gpus():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    for errors in run_ranks(2, exchanges_on_gpus):
        assert max(errors) < 0.006
