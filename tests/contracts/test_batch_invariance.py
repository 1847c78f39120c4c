"""Neighbours change nothing, to the bit: rows, packed sequences and channels, even where they are NaN."""

import pytest

from tests.contracts.support import CHUNKED, case_of, everywhere, hold
from trwkv.testing import CONTRACTS, IMPLEMENTATIONS, Implementation


@everywhere("neighbours")
def test_neighbours(implementation: Implementation) -> None:
    hold("neighbours", implementation)


@everywhere("lanes")
def test_lanes(implementation: Implementation) -> None:
    hold("lanes", implementation)


@pytest.mark.parametrize("name", CHUNKED)
def test_many_packed_sequences(name: str) -> None:
    """Empty ones first, last and between, ones of a single token, and one that crosses tiles."""
    implementation = IMPLEMENTATIONS[name]
    case = case_of(implementation, B=1, T=9, P=1, C=19, cu_seqlens=(0, 0, 1, 2, 2, 8, 9, 9), k_range=40.0)
    CONTRACTS["neighbours"](implementation, case, at=4)


@pytest.mark.parametrize(
    "name, T",
    [("wkv/triton-chunk", 18), ("wkv/triton-chunk", 75), ("wkv_states/triton", 18), ("wkv/torch-chunk", 18)],
)
def test_lanes_on_either_path(name: str, T: int) -> None:
    """NaN in one lane sends its neighbours to the exact path as well: it rounds as the fast one does. In one chunk, and
    in two, where what the second sends back is summed first.
    """
    implementation = IMPLEMENTATIONS[name]
    CONTRACTS["lanes"](implementation, case_of(implementation, B=1, T=T, P=1, C=8, k_range=12.0))
