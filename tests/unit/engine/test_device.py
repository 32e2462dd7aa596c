"""Copies to host memory beside other work."""

import weakref

import pytest
import torch

from engine.device import HostCopies


def copied(device, tensors=20, elements=2**22):
    """Copy tensors whose memory is reused at once, and return the copies and what they should be."""
    copies, found, expected = HostCopies(), [], []
    for number in range(tensors):
        source = torch.full((elements,), float(number), device=device)
        for _ in range(20):
            source = source + 1  # still being computed when its copy begins
        target = torch.empty(elements, pin_memory=source.is_cuda)
        found.append(copies.copy(target, source))
        expected.append(number + 20.0)
        del source
        torch.full((elements,), -1.0, device=device)
    copies.wait()
    return found, expected


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_copies_are_whole(device):
    for copy, value in zip(*copied(device), strict=True):
        assert bool((copy == value).all())


def test_a_source_is_kept_until_its_copy_is_complete():
    source, kept = torch.ones(1), []
    reference = weakref.ref(source)

    class Stream:
        def synchronize(self):
            kept.append(reference() is not None)

    copies = HostCopies()
    copies._stream, copies._source = Stream(), source
    del source
    copies.wait()
    assert (kept, reference()) == ([True], None)
