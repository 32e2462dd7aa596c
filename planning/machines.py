"""The machines that a dry run plans for: GPUs, hosts, and the network between them."""

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from planning.cards import CARDS, Card, find_card
from planning.facts import Facts, facts_of, read_facts
from runtime.console import below

GPUS_PER_HOST, NOMINAL_GBITS = 8, 400  # of a host, and of each GPU's network between hosts, unless told
NETWORK_FRACTION = 0.85  # of a network's nominal speed that collective operations reach; not measured


@dataclass(frozen=True)
class DryRun:
    """The GPUs that a dry run plans for."""

    dry_run: bool = False
    gpu: str | None = None  # model; None: this machine's, else H100
    gpu_memory: float | None = None  # GB; None: the model's
    memory_limit: int | None = None  # MB that a process may use
    gpus_per_node: int | None = None  # None: 8
    network: float | None = None  # Gbit/s of each GPU between hosts; None: as in `facts`, else 400
    facts: Path | None = None  # file of measured facts; None: the built-in ones
    mfu: float | None = None  # fraction of the peak that training reaches; None: it is estimated

    def facts_problems(self, fp8: bool) -> list[str]:
        """Return a line if `facts` are of another GPU, or lack float8.

        Raises:
            InputError: they cannot be read.
        """
        assert self.facts
        facts, card = read_facts(self.facts), find_card(self.gpu or "")
        if card and find_card(facts.card) != card:
            return [f"--gpu: {self.facts} has the speeds of {facts.card}, not of {card.name}; leave one of them out"]
        if fp8 and not (facts.float8_products and facts.rowwise_products):
            return [f"--fp8: {self.facts} has no speeds for float8; measure them on a GPU that has it"]
        return []


def planned_card(plan: DryRun) -> Card:
    """Return the planned GPU; its memory is `gpu_memory` if given, and at most `memory_limit`."""
    here = torch.cuda.get_device_name() if torch.cuda.is_available() else "H100"
    name = plan.gpu or (read_facts(plan.facts).card if plan.facts else here)
    card = find_card(name) or Card(name, math.nan, plan.gpu_memory or math.nan)
    memory = plan.gpu_memory or card.memory_gb
    if plan.memory_limit:
        memory = min(plan.memory_limit * 2**20 / 1e9, memory)
    return replace(card, memory_gb=memory)


@dataclass(frozen=True)
class Machines:
    """The GPUs of a job.

    Attributes:
        per_host: GPUs of a host.
        network: GB/s that each GPU sends in collective operations between hosts.
    """

    facts: Facts
    per_host: int
    network: float


def planned_machines(plan: DryRun) -> Machines | None:
    """Return the GPUs that a dry run plans for; None if their speed is unknown. Raises InputError for `plan.facts`."""
    facts = facts_of(planned_card(plan), plan.facts)
    if facts is None:
        return None
    nominal = NOMINAL_GBITS if plan.network is None else plan.network
    measured = facts.network if plan.network is None else 0
    return Machines(facts, plan.gpus_per_node or GPUS_PER_HOST, measured or nominal / 8 * NETWORK_FRACTION)


def card_problems(plan: DryRun, fp8: bool) -> list[str]:
    """Return a line for each flag whose value describes no GPU, and for --fp8 if the GPU has no float8."""
    problems = below(1, gpus_per_node=plan.gpus_per_node)
    card, size = find_card(plan.gpu or ""), re.search(r"(\d+) ?GB", plan.gpu or "", re.IGNORECASE)
    if plan.gpu and not card:
        problems.append(f"--gpu: {plan.gpu!r} is not one of {', '.join(card.name for card in CARDS)}")
    elif card and size and plan.gpu_memory is None and abs(int(size[1]) - card.memory_gb) > 0.1 * card.memory_gb:
        others = [other.name for other in CARDS if card.name in other.name and other.memory_gb == int(size[1])]
        problems.append(
            f"--gpu: {plan.gpu!r} would be taken for {card.name} with {card.memory_gb:g} GB; give "
            + " or ".join([*others, f"--gpu_memory {size[1]}"])
        )
    if plan.gpu_memory is not None and not 0 < plan.gpu_memory < math.inf:
        problems.append(f"--gpu_memory: must be a positive number of GB, not {plan.gpu_memory}")
    planned = find_card(planned_card(plan).name)
    if fp8 and planned and not planned.peak_float8_tflops:
        problems.append(f"--fp8: {planned.name} has no float8; leave --fp8 out, or plan for another --gpu")
    if plan.facts:
        problems += plan.facts_problems(fp8)
    if plan.mfu is not None and not 0 < plan.mfu <= 1:
        problems.append(f"--mfu: must be above 0 and at most 1, not {plan.mfu}")
    if plan.network is not None and not 0 < plan.network < math.inf:
        problems.append(f"--network: must be a positive number of Gbit/s, not {plan.network}")
    return problems
