"""Gradients are right for every input, wherever they come from, whoever wants them, and to second order."""

import pytest
import torch

from tests.contracts.support import case_of, everywhere, hold
from trwkv.testing import IMPLEMENTATIONS, Case, Implementation
from trwkv.testing.contracts import assert_same

FORMS = {
    "rows": {"B": 2, "T": 3},
    "own k, v": {"B": 1, "T": 4, "shared": False},
    "packed": {"B": 1, "T": 4, "cu_seqlens": (0, 1, 1, 4)},
    "reverse": {"B": 1, "T": 4, "reverse": True},
    "packed, reverse": {"B": 1, "T": 4, "cu_seqlens": (0, 3, 4), "reverse": True},
}


@everywhere("partial gradients")
def test_partial_gradients(implementation: Implementation) -> None:
    hold("partial gradients", implementation)


def true_results(implementation: Implementation, case: Case):
    """The op as a function of its inputs, with results in units of 1."""

    def run(*leaves):
        c = Case(dict(zip(case.inputs, leaves, strict=True)), {}, case.axes, case.cu_seqlens, case.reverse)
        result = implementation.run(c)
        units = implementation.op.units(result)
        unique = implementation.op.comparable(result, {name: 0 * x.detach() for name, x in units.items()})
        return unique["output"], unique["state"]

    return run, [x.requires_grad_() for x in case.inputs.values()]


@pytest.mark.parametrize("form", FORMS)
@everywhere(name="reference")
def test_gradcheck_of_the_reference(implementation: Implementation, form: str) -> None:
    case = case_of(implementation, **{"P": 2, "C": 2, "dtype": torch.float64, **FORMS[form]})
    assert torch.autograd.gradcheck(*true_results(implementation, case))


@pytest.mark.parametrize("form", ["own k, v", "packed, reverse"])
@pytest.mark.parametrize("name", ["wkv/reference", "wkv_states/reference", "wkv_states/torch"])
def test_second_order(name: str, form: str) -> None:
    implementation = IMPLEMENTATIONS[name]
    case = case_of(implementation, **{"P": 2, "C": 1, "dtype": torch.float64, **FORMS[form]})
    assert torch.autograd.gradgradcheck(*true_results(implementation, case))


@pytest.mark.parametrize("weights", ["none", "P", "PC"])
def test_gradcheck_with_weights(weights: str) -> None:
    implementation = IMPLEMENTATIONS["wkv/reference"]
    case = case_of(implementation, B=1, T=3, C=2, dtype=torch.float64, weights=weights)
    assert torch.autograd.gradcheck(*true_results(implementation, case))


@everywhere(is_token_loop=False)
def test_no_gradient_where_none_is_sent(implementation: Implementation) -> None:
    """Results that do not depend on an input, and a loss on neither result: zeros, not an error."""
    case = case_of(implementation, T=5).to(implementation.device)
    case.grads = {name: torch.zeros_like(x) for name, x in case.grads.items()}
    run, leaves = true_results(implementation, case)
    with implementation.configured():
        output, state = run(*leaves)
        got = torch.autograd.grad(0 * output.sum() + 0 * state.sum(), leaves)
    for name, x in zip(case.inputs, got, strict=True):
        assert_same(name, x, torch.zeros_like(x))
