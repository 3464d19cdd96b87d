"""The seeds of the fuzzer, inputs that once failed among them, and some random bytes: tests/fuzz.py."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuzz import SEEDS, TARGETS


@pytest.mark.parametrize(("name", "data"), [(name, data) for name, seeds in SEEDS.items() for data in seeds])
def test_a_reader_refuses_in_its_own_words_or_reads(name, data):
    TARGETS[name](data)


@pytest.mark.parametrize("name", TARGETS)
@given(data=st.data())
def test_a_reader_refuses_whatever_bytes_in_its_own_words(name, data):
    """A seed with some of its bytes replaced, or any bytes."""
    seed = data.draw(st.sampled_from([b"", *SEEDS[name]]))
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, len(seed))] * 2)))
    TARGETS[name](seed[:start] + data.draw(st.binary(max_size=60)) + seed[stop:])
