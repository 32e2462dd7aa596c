"""File names that stay inside their folder."""

import pytest

from runtime.files import is_plain_name


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "..model", "a..b", "with space", "ü.bin"])
def test_plain_names(name):
    assert is_plain_name(name)


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "/etc/passwd", "a/b", "a/", "..\\x", "C:\\x", "a\0b"])
def test_names_that_lead_elsewhere(name):
    assert not is_plain_name(name)
