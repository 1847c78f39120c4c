"""`cu_seqlens` gives the bits that every sequence gives alone; sequences may be empty."""

import pytest

from tests.contracts.support import case_of, everywhere, hold
from trwkv.testing import CONTRACTS, Implementation


@everywhere("packed is separate")
def test_packed_is_separate(implementation: Implementation) -> None:
    hold("packed is separate", implementation)


@everywhere("packed is separate", is_token_loop=False)
@pytest.mark.parametrize("cu_seqlens", [(0, 5), (0, 0, 5), (0, 5, 5), (0, 0), (0, 0, 0)], ids=str)
def test_edges(implementation: Implementation, cu_seqlens: tuple[int, ...]) -> None:
    """One sequence, an empty one before or after it, and nothing but empty ones."""
    case = case_of(implementation, B=1, T=cu_seqlens[-1], cu_seqlens=cu_seqlens)
    CONTRACTS["packed is separate"](implementation, case)
    CONTRACTS["agreement"](implementation, case)
