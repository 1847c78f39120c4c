"""The same bits from run to run, from process to process, with cold caches, and after other block sizes."""

import torch

from tests.contracts.support import case_of, everywhere, hold
from trwkv.testing import CONTRACTS, Implementation


@everywhere("repetition")
def test_repetition(implementation: Implementation) -> None:
    hold("repetition", implementation)


@everywhere("repetition")
def test_sums_of_many_programs(implementation: Implementation) -> None:
    """Gradients that five rows share: two numbers could be added in any order, five cannot."""
    for at in range(3):
        CONTRACTS["repetition"](implementation, case_of(implementation, B=5, T=5, dtype=torch.float32), at=at)


@everywhere("other process")
def test_another_process(implementation: Implementation) -> None:
    T = 12 if implementation.is_interpreted else 200
    CONTRACTS["other process"](implementation, case_of(implementation, T=T, P=3, C=16, k_range=40.0))
