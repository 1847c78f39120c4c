"""Every configuration of block sizes that ships is right, alone, not just the winner."""

import pytest
import torch

from tests.contracts.support import case_of
from trwkv.testing import CONTRACTS, IMPLEMENTATIONS, SMALL
from trwkv.testing.contracts import forward_accuracy


@pytest.mark.parametrize("name", ["wkv/triton-chunk", "wkv_states/triton"])
@pytest.mark.parametrize("packed", [False, True])
def test_every_configuration(name: str, packed: bool) -> None:
    """A full tile of the longest and a ragged one, or a ragged block of channels."""
    implementation = IMPLEMENTATIONS[name]
    sizes = {"T": 10, "C": 20, "cu_seqlens": (0, 3, 10)} if packed else {"T": 19, "C": 5, "reverse": True}
    case = case_of(implementation, B=1, P=1, k_range=8.0, dtype=torch.bfloat16, **sizes)
    CONTRACTS["every configuration"](implementation, case)


def test_across_segments() -> None:
    implementation = IMPLEMENTATIONS["wkv/triton-chunk"]
    case = case_of(implementation, B=1, T=67, P=1, C=5, k_range=8.0, dtype=torch.bfloat16)
    CONTRACTS["every configuration"](implementation, case)


TILES = sorted({sizes["fwd_block_t"] for sizes in IMPLEMENTATIONS["wkv/triton-chunk"].op.configurations})


@pytest.mark.parametrize("tokens", TILES)
def test_slow_decays_do_not_drift(tokens: int) -> None:
    """The rounding of a decay near 1 would add up over the tokens; each tile makes good for its own."""
    implementation = IMPLEMENTATIONS["wkv/triton-chunk"]
    case = case_of(implementation, B=1, T=768, P=1, C=16, k_range=1.0, state="none", log_decays=(-13.8, -8.0))
    with implementation.configured(SMALL | {"fwd_block_t": tokens}):
        forward_accuracy(implementation, case.to(implementation.device))
