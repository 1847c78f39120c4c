"""What comes later changes no earlier output, to the bit, and gets no gradient from it; in either direction."""

import pytest

from tests.contracts.support import case_of, everywhere, hold
from trwkv.testing import CONTRACTS, IMPLEMENTATIONS, Implementation, wkv_case


@everywhere("causality")
def test_causality(implementation: Implementation) -> None:
    hold("causality", implementation)


@everywhere("causality", is_kernel=False)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("k_range", [4.0, 300.0])
def test_every_cut(implementation: Implementation, k_range: float, reverse: bool) -> None:
    T = 19
    case = case_of(
        implementation, T=T, C=5, k_range=k_range, log_decays=(-13.8, 4.4), growing=0.2, reverse=reverse
    )
    for cut in range(1, T):
        CONTRACTS["causality"](implementation, case, at=cut - 1)


@pytest.mark.parametrize("name", ["wkv/triton-recurrent", "wkv/triton-chunk"])
@pytest.mark.parametrize(("P", "k_range"), [(1, 4.0), (2, 60.0)])
def test_a_tile_rounds_alike_on_its_fast_and_its_exact_path(name: str, P: int, k_range: float) -> None:
    """Later tokens decide which path a tile takes. Found by fuzzing: u's gradient had other bits."""
    case = wkv_case(B=1, T=4, P=P, C=16, k_range=k_range, final_gradient=False)
    for at in range(3):
        CONTRACTS["causality"](IMPLEMENTATIONS[name], case, at=at)
