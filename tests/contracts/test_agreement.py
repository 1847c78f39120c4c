"""Every implementation computes what float64 computes, forward and backward, with all options drawn together."""

import pytest
import torch

from tests.contracts.support import CHUNKED, case_of, everywhere, hold
from trwkv.ops.wkv.reference import direct_states, direct_wkv
from trwkv.testing import CONTRACTS, IMPLEMENTATIONS, SMALL, Implementation, truth_of


@everywhere()
def test_agreement(implementation: Implementation) -> None:
    hold("agreement", implementation, times=2 if implementation.is_interpreted else 1)


@pytest.mark.parametrize("name", CHUNKED)
def test_across_chunks(name: str) -> None:
    """Three chunks of 64, the last one ragged: summaries, scan and outputs, forward and back."""
    implementation = IMPLEMENTATIONS[name]
    case = case_of(implementation, B=1, T=131, P=1, C=5, k_range=40.0, log_decays=(-13.8, 4.4))
    CONTRACTS["agreement"](implementation, case)


@pytest.mark.parametrize("name", CHUNKED)
def test_across_chunks_of_packed_sequences(name: str) -> None:
    implementation = IMPLEMENTATIONS[name]
    case = case_of(implementation, B=1, T=75, P=1, C=5, cu_seqlens=(0, 3, 3, 70, 75), reverse=True)
    CONTRACTS["agreement"](implementation, case)


def test_across_chunks_in_wide_blocks() -> None:
    """Where registers would be short the adjoints' walk keeps what a tile takes once in memory."""
    implementation = IMPLEMENTATIONS["wkv/triton-chunk"]
    case = case_of(implementation, B=1, T=75, P=3, C=64, k_range=40.0, weights="PC")
    with implementation.configured(SMALL | {"bwd_block_c": 64}):
        implementation.check(case.to(implementation.device), truth_of(implementation.op, case))


def test_many_blocks_of_channels() -> None:
    """Ten, more than the sum of their shares of the weights' gradient loads at once."""
    implementation = IMPLEMENTATIONS["wkv/triton-chunk"]
    for shared in (True, False):
        C = 16 * (10 if shared else 9)
        case = case_of(implementation, B=2, T=3, P=2, C=C, shared=shared, weights="BTP", dtype=torch.float32)
        CONTRACTS["agreement"](implementation, case)


def test_the_states_kept_for_the_backward() -> None:
    """One chunk of three segments: the state before each, with an exponent for each perspective again."""
    implementation = IMPLEMENTATIONS["wkv/triton-chunk"]
    case = case_of(implementation, B=1, T=131, P=2, C=2, log_decays=(-6.0, 3.0))
    with implementation.configured(SMALL | {"chunk_len": 192}):
        implementation.check(case.to(implementation.device), truth_of(implementation.op, case))


@pytest.mark.parametrize(
    "weights, dtype, C",
    [
        ("P", torch.float32, 16),
        ("PC", torch.bfloat16, 32),
        ("PC", torch.float32, 20),
        ("BTP", torch.float32, 32),
    ],
    ids=str,
)
def test_weighted_sums_of_own_keys(weights: str, dtype: torch.dtype, C: int) -> None:
    """A launch for each perspective adds to the sum where the blocks of 16 channels are those of one; else PyTorch."""
    implementation = IMPLEMENTATIONS["wkv/triton-chunk"]
    packed = {"cu_seqlens": (0, 3, 3, 70, 75), "reverse": True} if weights == "BTP" else {}
    case = case_of(implementation, B=1, T=75, P=2, C=C, shared=False, weights=weights, dtype=dtype, **packed)
    CONTRACTS["agreement"](implementation, case)


DIRECT = {
    "wkv": lambda c: direct_wkv(c.w, c.u, c.k, c.v, c.weights, c.initial_state, _bounds(c), c.reverse),
    "wkv_states": lambda c: direct_states(c.w, c.k, c.v, c.initial_state, _bounds(c), c.reverse),
}


def _bounds(case):
    return None if case.cu_seqlens is None else case.bounds


@pytest.mark.parametrize("op", DIRECT)
@pytest.mark.parametrize("seed", range(12))
def test_the_two_oracles_agree(op: str, seed: int) -> None:
    """The step loop on sequences cut out and turned round, and one sum over all packed tokens with masks."""
    implementation = IMPLEMENTATIONS[f"{op}/reference"]
    packed = {"B": 1, "cu_seqlens": (0, 4, 4, 9)} if seed % 3 == 0 else {}
    case = case_of(
        implementation, seed=seed, dtype=torch.float64, shared=seed % 2 == 0, reverse=seed % 4 > 1,
        state=("none", "random", "zero")[seed // 2 % 3], k_range=(4.0, 300.0)[seed // 6],
        log_decays=(-13.8, 4.4), growing=0.3, **packed,
    )  # fmt: skip
    implementation.check(case, truth_of(implementation.op, case), DIRECT[op])


@everywhere()
def test_single_perspective_form(implementation: Implementation) -> None:
    """w of shape [C] is P = 1 without the P axis, in output, state and weights."""
    packed = {"B": 1, "cu_seqlens": (0, 2, 2, 7), "reverse": True}
    for arguments in ({}, packed):
        case = case_of(implementation, T=7, P=1, C=5, **arguments).to(implementation.device)
        flat = case.mapped(lambda x, _: x)
        flat.inputs = {name: _without_perspective(name, x) for name, x in case.inputs.items()}
        with implementation.configured():
            full, single = implementation.run(case), implementation.run(flat)
        for a, b in zip(full, single, strict=True):
            assert torch.equal(a.reshape(b.shape), b)
        assert single[1].shape == (case.sequences, 3, 5)
        assert 1 not in single[0].shape[1:]


def _without_perspective(name: str, x: torch.Tensor) -> torch.Tensor:
    axis = {"w": 0, "u": 0, "weights": -1, "initial_state": 2}.get(name)
    return x if axis is None else x.squeeze(axis)
