"""No tokens, no rows, and states that are empty."""

import pytest
import torch

from tests.contracts.support import case_of, everywhere
from trwkv.testing import CONTRACTS, Implementation


@everywhere()
@pytest.mark.parametrize("reverse", [False, True])
def test_no_tokens(implementation: Implementation, reverse: bool) -> None:
    """T = 0: an empty output, and a copy of the state that came in, to which its gradient passes."""
    case = case_of(implementation, T=0, reverse=reverse)
    CONTRACTS["agreement"](implementation, case)
    output, state = implementation.run(case.to(implementation.device))
    assert output.numel() == 0
    assert torch.equal(state.cpu(), case.initial_state)
    del case.inputs["initial_state"]
    CONTRACTS["agreement"](implementation, case)
    _, fresh = implementation.run(case.to(implementation.device))
    assert (fresh[:, :2] == 0).all()
    assert torch.isfinite(fresh).all()


@everywhere()
def test_no_rows(implementation: Implementation) -> None:
    case = case_of(implementation, B=0, T=5).to(implementation.device)
    output, state = implementation.run(case)
    assert output.shape[0] == 0
    assert state.shape == (0, 3, 2, 3)


@everywhere(is_token_loop=False)
def test_a_fresh_state_written_out_is_none(implementation: Implementation) -> None:
    case = case_of(implementation, B=1, T=6).to(implementation.device)
    zeros = torch.zeros_like(case.initial_state)
    with implementation.configured():
        _, fresh = implementation.run(case.part(0, 0, zeros))
        written = [implementation.run(case.part(0, 6, state)) for state in (fresh, zeros)]
        del case.inputs["initial_state"]
        _, nothing = implementation.run(case.part(0, 0, None))
        written.append(implementation.run(case.part(0, 6, nothing)))
        expected = implementation.run(case)
    for result in written:
        assert torch.equal(_sums(result[0]), _sums(expected[0]))
        assert torch.equal(result[1], expected[1])


def _sums(output: torch.Tensor) -> torch.Tensor:
    """Of states at every token, without the exponent of an empty one, which means nothing."""
    return output[:, :2] if output.ndim == 5 else output
