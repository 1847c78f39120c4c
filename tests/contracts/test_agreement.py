"""Chunked, recurrent and naive agree with float64, forward and backward, whatever the shapes, types and options."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings

from tests.contracts.implementations import ALL, FAST, GPU, Implementation
from tests.contracts.strategies import cases
from trwkv.ops import reference_wkv
from trwkv.ops.wkv.reference import direct_wkv, step_wkv
from trwkv.testing import assert_accurate, gradients, true_sums, wkv_case, wkv_truth

EXAMPLES = {
    "reference": 10,
    "torch-chunk": 80,
    "torch-recurrent": 10,
    "triton-chunk": 10,
    "triton-recurrent": 6,
}


def examples(implementation: Implementation) -> settings:
    count = EXAMPLES[implementation.name] * (8 if GPU else 1)
    interpreted = implementation.backend == "triton" and not GPU  # too slow to search for a smaller failure
    phases = [Phase.explicit, Phase.generate] + ([] if interpreted else [Phase.shrink])
    return settings(
        max_examples=count,
        phases=phases,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )


@pytest.mark.parametrize("adversarial", [False, True], ids=["usual", "adversarial"])
@pytest.mark.parametrize("implementation", ALL, ids=lambda i: i.name)
def test_results_and_gradients(implementation: Implementation, adversarial: bool) -> None:
    quick = (implementation.backend == "torch" and implementation.name.endswith("chunk")) or GPU

    @examples(implementation)
    @given(cases(adversarial=adversarial, long=quick))
    def check(case):
        implementation.check(case, wkv_truth(case))

    check()


@pytest.mark.parametrize("implementation", FAST, ids=lambda i: i.name)
@pytest.mark.parametrize("k_range", [4.0, 300.0])
def test_across_chunks(implementation: Implementation, k_range: float) -> None:
    """Three chunks, the last one ragged: summaries, scan and outputs, forward and back."""
    T = 150 if k_range == 4.0 else 133
    case = wkv_case(1, T, 2, 5, weights="BTP", state="random", k_range=k_range, log_decays=(-13.8, 4.4))
    implementation.check(case, wkv_truth(case))


@given(cases(adversarial=True, dtypes=(torch.float64,), long=False))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_float64_on_torch(case) -> None:
    from tests.contracts.implementations import TORCH_CHUNK

    TORCH_CHUNK.check(case, wkv_truth(case))


@given(cases(adversarial=True, dtypes=(torch.float64,), long=False))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_two_oracles_agree(case) -> None:
    truth = wkv_truth(case)
    output, state = direct_wkv(*(getattr(case, n) for n in ("w", "u", "k", "v", "weights", "initial_state")))
    assert_accurate("output", output, truth)
    assert_accurate("state", true_sums(state, truth.exponent), truth)
    got = gradients(
        case, lambda c: direct_wkv(c.w, c.u, c.k, c.v, c.weights, c.initial_state), truth.exponent
    )
    for name, grad in got.items():
        assert_accurate(name, grad, truth)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("weights", ["none", "P", "PC", "BTP"])
def test_gradcheck_of_the_reference(shared: bool, weights: str) -> None:
    case = wkv_case(1, 4, 2, 2, dtype=torch.float64, shared=shared, weights=weights, state="random")
    inputs = [x.requires_grad_() for x in case.inputs().values()]

    def run(*leaves):
        named = dict(zip(case.inputs(), leaves, strict=True))
        arguments = [named.get(n) for n in ("w", "u", "k", "v", "weights", "initial_state")]
        output, state = step_wkv(*arguments)
        return output, true_sums(state, torch.zeros_like(state[:, 2]))

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_single_perspective_form() -> None:
    """w of shape [C] is P = 1 without the P axis, in output, state and weights."""
    case = wkv_case(2, 7, 1, 5, weights="BTP", state="random")
    full = reference_wkv(
        case.w, case.u, case.k, case.v,
        weights=case.weights, initial_state=case.initial_state, output_final_state=True,
    )  # fmt: skip
    flat = reference_wkv(
        case.w[0], case.u[0], case.k, case.v,
        weights=case.weights[..., 0], initial_state=case.initial_state[:, :, 0], output_final_state=True,
    )  # fmt: skip
    assert torch.equal(full.output, flat.output)
    assert torch.equal(full.final_state[:, :, 0], flat.final_state)
    assert flat.output.shape == (2, 7, 5)
    plain = reference_wkv(case.w[0], case.u[0], case.k, case.v)
    assert plain.output.shape == (2, 7, 5)
    assert plain.final_state is None
