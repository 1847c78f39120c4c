"""The two oracles against the float64 truth of every sequence alone, and against each other where it counts."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from trwkv.ops.wkv.reference import EMPTY_EXP, direct_states, direct_wkv, step_states, step_wkv
from trwkv.testing import IMPLEMENTATIONS, Case, truth_of, wkv_case, wkv_states_case

WKV = {"step": step_wkv, "direct": direct_wkv}
STATES = {"step": step_states, "direct": direct_states}
BOUNDS = [None, (0, 9), (0, 4, 4, 9), (0, 0, 1, 8, 9, 9), (0, 0, 0)]


def sequences(case: Case) -> list[int] | None:
    return None if case.cu_seqlens is None else case.bounds


def wkv(oracle: str) -> Callable[[Case], tuple[Tensor, Tensor]]:
    return lambda c: WKV[oracle](c.w, c.u, c.k, c.v, c.weights, c.initial_state, sequences(c), c.reverse)


def states(oracle: str) -> Callable[[Case], tuple[Tensor, Tensor]]:
    return lambda c: STATES[oracle](c.w, c.k, c.v, c.initial_state, sequences(c), c.reverse)


def sizes(bounds: tuple[int, ...] | None) -> dict[str, int]:
    return {"B": 2, "T": 9, "P": 2, "C": 3} if bounds is None else {"B": 1, "T": bounds[-1], "P": 2, "C": 3}


@pytest.mark.parametrize("oracle", WKV)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("state", ["none", "zero", "random"])
def test_sequences_and_direction(oracle: str, reverse: bool, bounds, state: str) -> None:
    """Cut out and turned round by the testing tools, not by the oracle."""
    for weights, shared, dtype in (
        ("none", True, torch.float64),
        ("P", False, torch.float32),
        ("PC", True, torch.bfloat16),
        ("BTP", True, torch.float64),
    ):
        options = {"dtype": dtype, "shared": shared, "state": state, "cu_seqlens": bounds, "reverse": reverse}
        case = wkv_case(**sizes(bounds), weights=weights, growing=0.3, **options)
        implementation = IMPLEMENTATIONS["wkv/reference"]
        implementation.check(case, truth_of(implementation.op, case), run=wkv(oracle))
        case = wkv_states_case(**sizes(bounds), growing=0.3, **options)
        implementation = IMPLEMENTATIONS["wkv_states/reference"]
        implementation.check(case, truth_of(implementation.op, case), run=states(oracle))


@pytest.mark.parametrize("oracle", WKV)
def test_far_exponents(oracle: str) -> None:
    """float32 states: what rounding takes from an exponent near 300, or of thousands, must be in num and den."""
    for seed in range(3):
        options = {
            "k_range": 300.0, "log_decays": (-13.8, 4.4), "growing": 0.5, "state": "random", "reverse": seed == 1,
            "cu_seqlens": (0, 11, 40), "seed": seed,
        }  # fmt: skip
        case = wkv_case(1, 40, 2, 6, u_range=300.0, **options)
        implementation = IMPLEMENTATIONS["wkv/reference"]
        implementation.check(case, truth_of(implementation.op, case), run=wkv(oracle))
        case = wkv_states_case(1, 40, 2, 6, **options)
        implementation = IMPLEMENTATIONS["wkv_states/reference"]
        implementation.check(case, truth_of(implementation.op, case), run=states(oracle))


@pytest.mark.parametrize("oracle", WKV)
@pytest.mark.parametrize("reverse", [False, True])
def test_sequences_do_not_leak(oracle: str, reverse: bool) -> None:
    """What another sequence holds changes no bit: not the outputs, nor the gradients."""
    for run, case in (
        (wkv(oracle), wkv_case(1, 9, 2, 3, cu_seqlens=(0, 3, 3, 5, 9), reverse=reverse, state="random")),
        (states(oracle), wkv_states_case(1, 9, 2, 3, cu_seqlens=(0, 3, 3, 5, 9), reverse=reverse, state="random")),
    ):  # fmt: skip
        before = alone(case, run)
        for name in ("k", "v"):
            getattr(case, name)[:, 3:5] = 77.0
        case.initial_state[2, :, :] = 5.0
        case.initial_state[1, :, :] = 7.0
        for x, y in zip(before, alone(case, run), strict=True):
            assert torch.equal(x, y)


def alone(case: Case, run: Callable[[Case], tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Results and gradients of the first and the last sequence, all their results being asked for."""
    leaves = [case.k.clone().requires_grad_(), case.v.clone().requires_grad_()]
    inputs = case.inputs | {"k": leaves[0], "v": leaves[1]}
    result, final_state = run(replace(case, inputs=inputs))
    axis = case.axes["output"].tokens
    mine = [0, 1, 2, 5, 6, 7, 8]
    result, final_state = result[(slice(None),) * axis + (mine,)], final_state[[0, 3]]
    grads = torch.autograd.grad(result.sum() + final_state[:, :2].sum(), leaves)
    return [result, final_state, *(x[:, mine] for x in grads)]


@pytest.mark.parametrize("oracle", WKV)
@pytest.mark.parametrize("reverse", [False, True])
def test_derivatives_to_second_order(oracle: str, reverse: bool) -> None:
    g = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()

    bounds = [0, 2, 2, 3]
    w, u, k, v, weights, state = (
        leaf(*shape) for shape in ((2, 1), (2, 1), (1, 3, 1), (1, 3, 1), (1, 3, 2), (3, 3, 2, 1))
    )
    with torch.no_grad():
        state[:, 1].abs_().add_(0.5)

    def run_wkv(*x: Tensor) -> tuple[Tensor, Tensor]:
        output, final = WKV[oracle](*x, bounds, reverse)
        return output, true(final)

    def run_states(*x: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(true(x) for x in STATES[oracle](*x, bounds, reverse))

    def true(state: Tensor) -> Tensor:
        return state[:, :2] * torch.exp(state[:, 2:].detach())  # gradcheck moves the exponent, too

    for function, inputs in ((run_wkv, (w, u, k, v, weights, state)), (run_states, (w, k, v, state))):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("oracle", WKV)
@pytest.mark.parametrize("reverse", [False, True])
def test_nothing_to_process(oracle: str, reverse: bool) -> None:
    """An empty sequence passes its state on, the exponent of an empty one included, and its gradient."""
    state = torch.tensor([[2.0, 3.0, 300.7], [0.0, 0.0, 5.0], [1.0, 2.0, -7.5]])[:, :, None, None]
    state.requires_grad_()
    w, k = torch.zeros(1, 1), torch.zeros(1, 0, 1)
    for run in (
        lambda s, b: WKV[oracle](w, w, k, k, None, s, b, reverse),
        lambda s, b: STATES[oracle](w, k, k, s, b, reverse),
    ):
        result, final = run(state, [0, 0, 0, 0])
        assert result.numel() == 0 and torch.equal(final, state)
        (grad,) = torch.autograd.grad(final, state, torch.ones_like(final))
        assert grad.flatten(1).tolist() == [[1.0, 1.0, 5.0], [1.0, 1.0, 0.0], [1.0, 1.0, 3.0]]
        _, fresh = run(None, [0, 0, 0])
        assert fresh.shape == (2, 3, 1, 1)
        assert torch.equal(fresh[:, :2], torch.zeros(2, 2, 1, 1)) and (fresh[:, 2] == EMPTY_EXP).all()
        _, dense = run(None, None)
        assert torch.equal(dense, fresh[:1])


@pytest.mark.parametrize("oracle", STATES)
@pytest.mark.parametrize("reverse", [False, True])
def test_first_state(oracle: str, reverse: bool) -> None:
    """Every sequence's first token sees its initial state, and none gets a gradient through an exponent."""
    case = wkv_states_case(1, 5, 2, 3, cu_seqlens=(0, 2, 5), reverse=reverse, state="random")
    case.initial_state[0, :2] = 0.0
    case.initial_state.requires_grad_()
    seen, _ = states(oracle)(case)
    first = [1, 4] if reverse else [0, 2]
    assert torch.equal(seen[0].movedim(1, 0)[first], case.initial_state)
    (grad,) = torch.autograd.grad(
        seen[:, 2].sum(), case.initial_state, allow_unused=True, materialize_grads=True
    )
    assert not grad.any()


@pytest.mark.parametrize("oracle", WKV)
def test_narrow_parameters_are_rounded_once(oracle: str) -> None:
    """Gradients of what all sequences share add up before they are rounded to the parameter's type."""
    bounds = tuple(range(0, 41, 2))
    case = wkv_case(1, 40, 3, 4, mixed_dtypes=True, weights="PC", cu_seqlens=bounds)
    implementation = IMPLEMENTATIONS["wkv/reference"]
    implementation.check(case, truth_of(implementation.op, case), run=wkv(oracle))
    case = wkv_states_case(1, 40, 3, 4, mixed_dtypes=True, cu_seqlens=bounds)
    implementation = IMPLEMENTATIONS["wkv_states/reference"]
    implementation.check(case, truth_of(implementation.op, case), run=states(oracle))
