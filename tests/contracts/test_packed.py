"""`cu_seqlens` gives the bits that every sequence gives alone; sequences may be empty."""

import pytest

from tests.contracts.support import case_of, everywhere, hold
from trwkv.testing import CONTRACTS, IMPLEMENTATIONS, Implementation, wkv_case


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


def test_the_initial_states_gradient_depends_on_no_other_sequence() -> None:
    """Found by fuzzing: PyTorch's exp2 in float64, on a CPU, has another last bit for other places in memory."""
    case = wkv_case(
        B=1, T=16, cu_seqlens=(0, 7, 10, 10, 10, 16), reverse=True, P=2, C=19, shared=False, weights="PC",
        state="random", layout="sliced", k_range=300.0, u_range=0.0, log_decays=(-13.8, 4.4), growing=0.5, seed=66,
    )  # fmt: skip
    CONTRACTS["packed is separate"](IMPLEMENTATIONS["wkv/triton-recurrent"], case)
