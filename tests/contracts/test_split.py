"""[0, t) and then [t, T) from the state is one run; tokens one by one are one call, in bfloat16 too."""

import pytest
import torch

from tests.contracts.support import case_of, everywhere, hold
from trwkv.testing import CONTRACTS, IMPLEMENTATIONS, Implementation, truth_of
from trwkv.testing.contracts import in_parts


@everywhere("split")
def test_split(implementation: Implementation) -> None:
    hold("split", implementation)


@everywhere("decoding")
def test_decoding(implementation: Implementation) -> None:
    hold("decoding", implementation)


@pytest.mark.parametrize(
    "name", ["wkv/torch-chunk", "wkv/triton-recurrent", "wkv_states/torch", "wkv/reference"]
)
def test_512_steps_in_bfloat16(name: str) -> None:
    """The state stays float32 and does not drift, with decays from 1e-6 to 4."""
    implementation = IMPLEMENTATIONS[name]
    case = case_of(
        implementation, B=1, T=512, P=1, C=12, dtype=torch.bfloat16, state="none", log_decays=(-13.8, 1.5)
    )
    CONTRACTS["decoding"](implementation, case)


@pytest.mark.parametrize("name", ["wkv/triton-chunk", "wkv_states/triton"])
def test_calls_of_one_token_do_not_drift(name: str) -> None:
    """No tile of theirs is full: what rounding takes from a decay would add up from call to call, forward and back."""
    implementation = IMPLEMENTATIONS[name]
    case = case_of(implementation, B=1, T=60, P=1, C=16, k_range=1.0, log_decays=(-6.0, -3.0))
    with implementation.configured():
        implementation.check(
            case.to(implementation.device),
            truth_of(implementation.op, case),
            lambda c: in_parts(implementation, c, range(1, c.tokens)),
        )
