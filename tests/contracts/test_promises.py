"""Causality, independence of neighbours, splitting, decoding and determinism."""

import subprocess
import sys

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.contracts.implementations import (
    ALL,
    FAST,
    TORCH_CHUNK,
    TRITON_CHUNK,
    TRITON_RECURRENT,
    Implementation,
)
from trwkv.testing import WkvCase, gradients, true_sums, wkv_case, wkv_truth


def names(implementation: Implementation) -> str:
    return implementation.name


def changed(case: WkvCase, **new: torch.Tensor) -> WkvCase:
    return WkvCase(**{**vars(case), **new})


def part(case: WkvCase, begin: int, end: int, state: torch.Tensor | None) -> WkvCase:
    """Tokens begin .. end - 1 of a case, continuing from a state."""
    weights = case.weights
    if weights is not None and weights.ndim == 3:
        weights = weights[:, begin:end]
    return changed(
        case,
        k=case.k[:, begin:end],
        v=case.v[:, begin:end],
        weights=weights,
        initial_state=case.initial_state if state is None else state,
        grad_output=case.grad_output[:, begin:end],
    )


@pytest.mark.parametrize("implementation", ALL, ids=names)
@pytest.mark.parametrize("k_range", [4.0, 300.0])
def test_causal_to_the_bit(implementation: Implementation, k_range: float) -> None:
    """Whatever tokens t.. hold, outputs before t stay as they are; gradients of tokens after t ignore those before."""
    T = 19
    case = wkv_case(1, T, 2, 8, k_range=k_range, log_decays=(-13.8, 4.4)).to(implementation.device)
    output, _ = implementation.run(case)
    for cut in range(1, T):
        k, v = case.k.clone(), case.v.clone()
        k[:, cut:] = -k[:, cut:] + 50.0
        v[:, cut:] *= -1000.0
        other, _ = implementation.run(changed(case, k=k, v=v))
        assert torch.equal(output[:, :cut], other[:, :cut]), f"outputs before token {cut} changed"
        assert not torch.equal(output[:, cut:], other[:, cut:])


@pytest.mark.parametrize("implementation", FAST, ids=names)
def test_gradients_are_causal(implementation: Implementation) -> None:
    """A loss on outputs before t gives tokens t.. gradients of exactly zero."""
    case = wkv_case(1, 13, 2, 8, k_range=40.0, final_gradient=False).to(implementation.device)
    cut = 7
    case.grad_output[:, cut:] = 0.0
    exponent = torch.zeros(1, 2, 8, dtype=torch.float64, device=implementation.device)
    got = gradients(case, implementation.run, exponent)
    for name in ("k", "v"):
        assert (got[name][:, cut:] == 0).all()
        assert (got[name][:, :cut] != 0).any()


@pytest.mark.parametrize("implementation", ALL, ids=names)
def test_neighbours_change_nothing(implementation: Implementation) -> None:
    """Rows of a batch permute with it to the bit, and a row of NaN leaves the others as they were."""
    case = wkv_case(3, 18, 2, 19, weights="BTP", state="random", k_range=40.0, log_decays=(-13.8, 4.4))
    case = case.to(implementation.device)
    output, state = implementation.run(case)
    order = torch.tensor([2, 0, 1], device=implementation.device)
    swapped = changed(
        case,
        k=case.k[order], v=case.v[order], weights=case.weights[order],
        initial_state=case.initial_state[order], grad_output=case.grad_output[order],
    )  # fmt: skip
    permuted, permuted_state = implementation.run(swapped)
    assert torch.equal(output[order], permuted)
    assert torch.equal(state[order], permuted_state)
    k = case.k.clone()
    k[1] = float("nan")
    poisoned, _ = implementation.run(changed(case, k=k))
    assert torch.equal(output[::2], poisoned[::2])
    assert poisoned[1].isnan().all()
    k = case.k.clone()
    k[..., 5] = float("nan")
    poisoned, _ = implementation.run(changed(case, k=k))
    keep = [c for c in range(19) if c != 5]
    assert torch.equal(output[..., keep], poisoned[..., keep])


@pytest.mark.parametrize("implementation", FAST, ids=names)
def test_split_anywhere(implementation: Implementation) -> None:
    """[0, t) and then [t, T) from its state is one run, in bfloat16 too; and so is its backward."""
    examples = 40 if implementation is TORCH_CHUNK else 6

    @given(
        st.integers(1, 30), st.floats(0, 1), st.sampled_from([torch.float32, torch.bfloat16]), st.booleans(),
        st.sampled_from([4.0, 300.0]), st.integers(0, 9999),
    )  # fmt: skip
    @settings(max_examples=examples, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
    def check(T, fraction, dtype, shared, k_range, seed):
        case = wkv_case(
            1, T, 2, 5, dtype=dtype, shared=shared, weights="BTP", state="random", k_range=k_range, seed=seed,
            log_decays=(-13.8, 4.4),
        )  # fmt: skip
        truth = wkv_truth(case)
        case = case.to(implementation.device)
        cut = int(fraction * T)

        def halves(c: WkvCase) -> tuple[torch.Tensor, torch.Tensor]:
            first, state = implementation.run(part(c, 0, cut, None))
            second, state = implementation.run(part(c, cut, T, state))
            return torch.cat([first, second], dim=1), state

        output, state = halves(case)
        exponent = truth.exponent.to(implementation.device)
        implementation.assert_accurate("output", output, truth)
        implementation.assert_accurate("state", true_sums(state, exponent).float(), truth)
        for name, grad in gradients(case, halves, exponent).items():
            implementation.assert_accurate(name, grad, truth)

    check()


@pytest.mark.parametrize("implementation", [TORCH_CHUNK, TRITON_RECURRENT], ids=names)
@pytest.mark.parametrize("log_decays", [(-13.8, -9.0), (-6.0, 1.5)], ids=["slow", "usual"])
def test_decoding_one_by_one(implementation: Implementation, log_decays: tuple[float, float]) -> None:
    """512 one-token bfloat16 calls are as accurate as one call: the state stays float32 and does not drift."""
    T = 512
    case = wkv_case(1, T, 2, 3, dtype=torch.bfloat16, weights="PC", log_decays=log_decays)
    truth = wkv_truth(case)
    case = case.to(implementation.device)
    rows, state = [], None
    for t in range(T):
        output, state = implementation.run(part(case, t, t + 1, state))
        rows.append(output)
    assert state.dtype == torch.float32
    implementation.assert_accurate("output", torch.cat(rows, dim=1), truth)
    implementation.assert_accurate("state", true_sums(state, truth.exponent.to(state.device)).float(), truth)


@pytest.mark.parametrize("implementation", FAST, ids=names)
def test_repeats_to_the_bit(implementation: Implementation) -> None:
    case = wkv_case(2, 70 if implementation is TORCH_CHUNK else 30, 2, 19, weights="BTP", state="random")
    case = case.to(implementation.device)
    exponent = torch.zeros(2, 2, 19, dtype=torch.float64, device=implementation.device)
    first, second = (gradients(case, implementation.run, exponent) for _ in range(2))
    assert torch.equal(implementation.run(case).output, implementation.run(case).output)
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_same_bits_in_another_process() -> None:
    case = wkv_case(1, 200, 3, 16, weights="P")
    code = (
        "import torch; torch.set_num_threads(1)\n"
        "from trwkv.ops import multi_perspective_wkv as op; from trwkv.testing import wkv_case\n"
        "c = wkv_case(1, 200, 3, 16, weights='P')\n"
        "print(c.call(op).output.double().sum().item().hex())"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        here = TORCH_CHUNK.run(case).output.double().sum().item().hex()
    finally:
        torch.set_num_threads(threads)
    assert done.stdout.strip() == here


@pytest.mark.parametrize("implementation", FAST, ids=names)
def test_the_initial_state_is_not_written_to(implementation: Implementation) -> None:
    case = wkv_case(1, 5, 2, 3, state="random").to(implementation.device)
    before = {name: x.clone() for name, x in case.inputs().items()}
    implementation.run(case)
    for name, x in case.inputs().items():
        assert torch.equal(x, before[name]), name


@pytest.mark.parametrize("implementation", ALL, ids=names)
def test_no_tokens(implementation: Implementation) -> None:
    """T = 0: an empty output, and the state that came in."""
    case = wkv_case(2, 0, 2, 3, state="random").to(implementation.device)
    output, state = implementation.run(case)
    assert output.shape == (2, 0, 2, 3)
    exponent = case.initial_state[:, 2].double()
    torch.testing.assert_close(
        true_sums(state, exponent), true_sums(case.initial_state, exponent), rtol=1e-6, atol=0
    )
    _, fresh = implementation.run(changed(case, initial_state=None))
    assert (fresh[:, :2] == 0).all()
    assert torch.isfinite(fresh).all()


@pytest.mark.parametrize("implementation", FAST, ids=names)
def test_a_fresh_state_written_out_is_none(implementation: Implementation) -> None:
    case = wkv_case(1, 6, 2, 3).to(implementation.device)
    _, fresh = implementation.run(part(case, 0, 0, None))
    assert torch.equal(
        implementation.run(case).output, implementation.run(changed(case, initial_state=fresh)).output
    )
    zeros = torch.zeros_like(fresh)
    assert torch.equal(
        implementation.run(case).output, implementation.run(changed(case, initial_state=zeros)).output
    )


CONFIGURATIONS = [
    {"fwd_block_c": 64, "fwd_block_t": 16, "bwd_block_c": 64, "bwd_block_t": 8},
    {"fwd_block_c": 64, "fwd_block_t": 8, "bwd_block_c": 32, "bwd_block_t": 8},
    {"fwd_block_c": 32, "fwd_block_t": 4, "bwd_block_c": 32, "bwd_block_t": 2},
    {"fwd_block_c": 16, "fwd_block_t": 2, "bwd_block_c": 16, "bwd_block_t": 4},
]


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=lambda c: "-".join(str(x) for x in c.values()))
def test_every_configuration(configuration: dict[str, int]) -> None:
    case = wkv_case(1, 83, 2, 20, weights="BTP", state="random", k_range=8.0, dtype=torch.bfloat16)
    TRITON_CHUNK.check(case, wkv_truth(case), **configuration)


def test_kernels_write_everything_they_return(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is filled with NaN: a result that was never written, or scratch read before, would show."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(x: torch.Tensor) -> torch.Tensor:
        return x.fill_(float("nan")) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", lambda *a, **o: poison(empty(*a, **o)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **o: poison(empty_like(*a, **o)))
    case = wkv_case(1, 77, 2, 19, weights="BTP", state="random")
    truth = wkv_truth(case)
    for implementation in FAST:
        implementation.check(case, truth)


@pytest.mark.parametrize("implementation", ALL, ids=names)
@pytest.mark.parametrize("exponent", [-250.0, 250.0])
def test_a_state_far_from_the_tokens(implementation: Implementation, exponent: float) -> None:
    """A state that outweighs every token by e^250 decays until they count; one that much lighter does not count."""
    case = wkv_case(1, 24, 2, 1, state="random", k_range=1.0, log_decays=(-4.0, 3.0))
    case.initial_state[:, 2] = exponent
    implementation.check(case, wkv_truth(case))


@pytest.mark.parametrize("implementation", FAST, ids=names)
def test_a_long_fall(implementation: Implementation) -> None:
    """One token, then silence 200 nats below it: it fades by half a mantissa a step until the two are equal.

    The second channel, beyond every bound, keeps its neighbour on the exact path.
    """
    case = wkv_case(1, 152, 1, 2, k_range=300.0, final_gradient=False)
    case.w[:] = torch.tensor([-1.379, -80.0])
    case.k[:, :, 0] = -200.0
    case.k[:, 0, 0] = 0.0
    implementation.check(case, wkv_truth(case))
