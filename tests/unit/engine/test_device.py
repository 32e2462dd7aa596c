"""Copies to host memory beside other work."""

import weakref

import pytest
import torch

from engine import device
from engine.device import HostCopies

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("where", DEVICES)
@pytest.mark.parametrize("reserve", [0.05, 1.0])
def test_temporary_sources_are_copied_whole(monkeypatch, where, reserve):
    monkeypatch.setattr(device, "RESERVE", reserve)  # 1: no room, so one at a time
    copies, found = HostCopies(), []
    for number in range(20):
        source = torch.full((2**22,), float(number), device=where)
        for _ in range(20):
            source = source + 1  # still being computed when its copy begins
        target = torch.empty(2**22, pin_memory=source.is_cuda)
        found.append(copies.copy(target, source, temporary=True))
        del source
        torch.full((2**22,), -1.0, device=where)  # takes the memory if it is free
    copies.wait()
    assert all(bool((copy == number + 20).all()) for number, copy in enumerate(found))


@pytest.mark.parametrize("where", DEVICES)
def test_a_source_may_change_after_it_is_protected(where):
    copies, source = HostCopies(), torch.zeros(2**26, device=where)
    targets = [torch.empty(2**26, pin_memory=source.is_cuda) for _ in range(3)]
    for number, target in enumerate(targets):
        copies.copy(target, source, temporary=False)
        copies.protect()
        source += number + 1
    copies.wait()
    assert [target.unique().tolist() for target in targets] == [[0.0], [1.0], [3.0]]


class Copied:
    """A CUDA event that is never over by itself."""

    def __init__(self, waited):
        self.synchronize = lambda: waited.append(self)


@pytest.mark.parametrize(("free", "kept"), [(0, 1), (39, 1), (45, 2), (95, 4)])
def test_as_many_sources_are_kept_as_there_is_room_for(monkeypatch, free, kept):
    """In each save; torch keeps the memory of the first one's sources, and its peak has them."""
    copies, reserved = HostCopies(), 0
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free - reserved, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 200 + reserved)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 200 + reserved)
    for _ in range(2):
        waited, references = [], []
        for _ in range(6):
            copies._make_room(20)
            source = torch.empty(5)  # 20 bytes
            references.append(weakref.ref(source))
            copies._temporary.append((Copied(waited), source))
            del source
        assert [reference() is not None for reference in references] == [False] * (6 - kept) + [True] * kept
        assert len(waited) == 6 - kept
        copies.wait()
        reserved = min(free, 20 * kept)
