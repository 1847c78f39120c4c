"""The same bits from run to run, from process to process, with cold caches, and after other block sizes."""

import pytest

from tests.contracts.support import CHUNKED, case_of, everywhere, hold
from trwkv.testing import CONTRACTS, IMPLEMENTATIONS, Implementation


@everywhere("repetition")
def test_repetition(implementation: Implementation) -> None:
    hold("repetition", implementation)


@everywhere("repetition")
def test_sums_of_many_programs(implementation: Implementation) -> None:
    """Gradients that five rows share: two numbers could be added in any order, five cannot."""
    for at in range(1 if implementation.is_interpreted else 3):
        CONTRACTS["repetition"](implementation, case_of(implementation, B=5, T=5, P=1), at=at)


@pytest.mark.parametrize("name", [*CHUNKED, "wkv/reference", "wkv_states/reference"])
def test_another_process(name: str) -> None:
    implementation = IMPLEMENTATIONS[name]
    T = 12 if implementation.is_interpreted else 200
    CONTRACTS["other process"](implementation, case_of(implementation, T=T, P=3, C=16, k_range=40.0))
