"""The loss on held-out data, which does not depend on the plugin or the number of ranks."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.utils.data import ConcatDataset, DataLoader
from tqdm import tqdm

from engine.boost import Engine
from engine.device import current_device
from engine.layout import Batch
from engine.step import forward_loss
from model_utils import IGNORE_INDEX
from runtime import watchdog
from runtime.console import rank, say
from training.batches import ShardedSampler


class MapDataset(Protocol):
    """A data set of known length."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]: ...


def padded(dataset: MapDataset, multiple: int) -> ConcatDataset[Any]:
    """Return the data set, padded to a multiple with items whose labels do not count: all ranks get as many batches."""
    item = dataset[0]
    padding = {**item, "labels": torch.full_like(item["labels"], IGNORE_INDEX)}
    return ConcatDataset([dataset, [padding] * (-len(dataset) % multiple)])  # type: ignore[list-item]


def evaluation_loader(engine: Engine, dataset: MapDataset, batch: Batch) -> DataLoader[Any]:
    """Return this rank's part of the held-out data in order: micro-batches, or whole steps with pipeline stages."""
    batch_size = batch.sequences if engine.layout.pp > 1 else batch.batch_size
    items = padded(dataset, batch_size * engine.layout.dp)
    return engine.plugin.prepare_dataloader(
        items,
        batch_size=batch_size,
        shuffle=False,
        pin_memory=torch.cuda.is_available(),
        distributed_sampler_cls=partial(ShardedSampler, seed=0, stop=len(items)),
        collate_fn=getattr(dataset, "collate", None),
    )


def evaluate(
    engine: Engine, loaders: Mapping[str, DataLoader[Any]], stop: Callable[[], bool] = lambda: False
) -> dict[str, float] | None:
    """Return `eval_loss`, the mean cross-entropy in nats over the labels that count, and `eval_perplexity`, its exp.

    Of several data sets they are over all, and each has an `eval_loss/NAME` too. Collective. Returns None if `stop`,
    called before each batch, is true on any rank; an empty dict if no label counts.
    """
    totals = torch.zeros(len(loaders), 2, dtype=torch.float64, device=current_device())
    engine.model.eval()
    complete = all(
        _add_loss(engine, loader, sums, name, stop)
        for (name, loader), sums in zip(loaders.items(), totals, strict=True)
    )
    engine.model.train()
    if not complete:
        return None
    dist.all_reduce(totals)
    if not totals[:, 1].sum():
        say("evaluation: no label counts in the held-out data, so there is no loss")
        return {}
    loss, count = totals.sum(0).tolist()
    losses = {"eval_loss": loss / count, "eval_perplexity": math.exp(min(loss / count, 700))}
    each = {f"eval_loss/{name}": sums for name, sums in zip(loaders, totals.tolist(), strict=True)}
    return losses | {name: loss / count for name, (loss, count) in each.items() if count and len(loaders) > 1}


def _add_loss(engine: Engine, loader: DataLoader[Any], sums: torch.Tensor, name: str, stop: Callable[[], bool]) -> bool:
    """Add this rank's loss and number of labels to `sums`; return False if `stop` is true on any rank. Collective."""
    layout, title = engine.layout, f"evaluating {name}".strip()
    for batch in tqdm(loader, desc=title, unit="batch", leave=False, disable=None if rank() == 0 else True):
        watchdog.mark(watchdog.EVALUATE)
        stopping = torch.tensor(float(stop()), device=sums.device)
        dist.all_reduce(stopping)
        if stopping:
            return False
        sums[0] += forward_loss(engine, batch) / layout.tp
        sums[1] += (batch["labels"][:, 1:] != IGNORE_INDEX).sum() / (layout.tp * layout.pp * layout.sp)
    return True
