"""Strided, transposed, expanded and unaligned inputs work, without a bit of difference."""

import pytest

from tests.contracts.support import case_of, everywhere, hold
from trwkv.testing import CONTRACTS, LAYOUTS, Implementation


@everywhere("layouts", is_kernel=False)
def test_layouts(implementation: Implementation) -> None:
    hold("layouts", implementation)


@everywhere("layouts")
@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_each_layout(implementation: Implementation, layout: str) -> None:
    """Shared k and v or not, and the first axis expanded or the last."""
    choice = LAYOUTS.index(layout)
    for seed in (choice,) if implementation.is_kernel else (choice, choice + 1):
        case = case_of(implementation, T=3, P=1, layout=layout, shared=choice % 2 == 0, seed=seed)
        CONTRACTS["layouts"](implementation, case)
