"""The seeds of the fuzzer, and what was wrong once: tests/fuzz.py."""

from __future__ import annotations

import pytest

from fuzz import SEEDS, TARGETS


@pytest.mark.parametrize(("name", "data"), [(name, data) for name, seeds in SEEDS.items() for data in seeds])
def test_a_reader_refuses_in_its_own_words_or_reads(name, data):
    TARGETS[name](data)
