"""The contracts on kernels as they are compiled, with whole blocks of channels: what the interpreter cannot see.

On a GPU, or without one as `make compiled` runs it. Few kernels, for each takes seconds to compile, and many cases.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch

from trwkv.ops._dispatch import is_interpreting
from trwkv.testing import CONTRACTS, IMPLEMENTATIONS, Case
from trwkv.testing.contracts import assert_same
from trwkv.testing.ops import forward

pytestmark = pytest.mark.skipif(is_interpreting(), reason="needs a GPU, or TRWKV_EMULATE=90 (make compiled)")

BLOCKS = {"fwd_block_c": 64, "fwd_block_t": 4, "bwd_block_c": 64, "bwd_block_t": 4, "chunk_len": 64}
"""Two channels a lane: k and v of 16 bits are read in pairs."""
HARD = {"k_range": 300.0, "u_range": 30.0, "log_decays": (-13.8, 4.4), "growing": 0.3}
PACKED = {"B": 1, "cu_seqlens": (0, 3, 3, 70, 75), "reverse": True}


def case_of(name: str, **arguments: Any) -> Case:
    """Two chunks, the second of them ragged, and two blocks of channels."""
    usual = {"B": 2, "T": 75, "P": 2, "C": 128, "dtype": torch.bfloat16, "weights": "PC", "state": "random"}
    if name.startswith("wkv_states"):
        del usual["weights"]
    implementation = IMPLEMENTATIONS[name]
    return implementation.op.case(**(usual | arguments)).to(implementation.device)


def hold(
    contract: str, name: str, at: int = 5, blocks: dict[str, int] | None = None, **arguments: Any
) -> None:
    implementation = IMPLEMENTATIONS[name]
    with implementation.configured(blocks or BLOCKS):
        CONTRACTS[contract].check(implementation, case_of(name, **arguments), at)


@pytest.mark.parametrize("k_range", [4.0, 40.0, 300.0])
def test_agreement(k_range: float) -> None:
    """The fast path, tiles of either path, and the exact path where keys are far apart."""
    hold("agreement", "wkv/triton-chunk", k_range=k_range)


def test_any_finite_input() -> None:
    hold("agreement", "wkv/triton-chunk", **HARD)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("neighbours", "split", "repetition")]


@pytest.mark.parametrize("contract", ["causality", "lanes", "memory", *SLOW])
def test_contract(contract: str) -> None:
    hold(contract, "wkv/triton-chunk", k_range=40.0)


def test_not_a_number() -> None:
    """A key that is NaN makes its channel NaN from there on, and changes nothing before it nor beside it."""
    implementation = IMPLEMENTATIONS["wkv/triton-chunk"]
    case = case_of("wkv/triton-chunk")
    k = case.inputs["k"].clone()
    k[0, 30, 17] = float("nan")
    with implementation.configured(BLOCKS):
        clean, hit = (
            forward(c, implementation.run)["output"]
            for c in (case, replace(case, inputs=case.inputs | {"k": k}))
        )
    assert hit[0, 30:, 17].isnan().all()
    hit[0, 30:, 17] = clean[0, 30:, 17]
    assert_same("output", hit, clean)


@pytest.mark.parametrize(
    "options", [{"T": 707}, {"T": 707, "cu_seqlens": (0, 3, 132, 707), "reverse": True}], ids=str
)
def test_many_chunks(options: dict[str, Any]) -> None:
    """More than the scans load ahead; a slow decay, so that chunks reach far."""
    hold("agreement", "wkv/triton-chunk", B=1, P=1, C=64, log_decays=(-13.8, 0.0), **options)


def test_packed_and_reversed() -> None:
    hold("agreement", "wkv/triton-chunk", dtype=torch.float16, weights="BTP", k_range=40.0, **PACKED)


@pytest.mark.parametrize("P", [3, 4])
def test_weights_of_tokens(P: int) -> None:
    """Loaded for a tile at once (forward, P = 3), or some tokens ahead, where registers are short."""
    blocks = BLOCKS | {"fwd_block_t": 8}
    hold("agreement", "wkv/triton-chunk", blocks=blocks, B=1, P=P, C=64, weights="BTP", k_range=4.0)


def test_own_keys() -> None:
    """A launch for each perspective adds to one sum. Some tokens vanish beside the initial state."""
    hold("agreement", "wkv/triton-chunk", P=3, shared=False, weights="BTP", k_range=100.0, **PACKED)


@pytest.mark.parametrize("block_c", [32, 64])
def test_channels_that_fill_no_block(block_c: int) -> None:
    """In blocks of 64 lanes load two neighbours and store one, for their number is odd."""
    blocks = {
        "fwd_block_c": block_c,
        "fwd_block_t": 2,
        "bwd_block_c": block_c,
        "bwd_block_t": 2,
        "chunk_len": 64,
    }
    C = block_c + 13
    hold("memory", "wkv/triton-chunk", blocks=blocks, P=1, C=C, dtype=torch.float32, weights="none")


def test_shipped_blocks() -> None:
    """As users get them: one chunk, tiles of 16 forward and 8 backward."""
    implementation = IMPLEMENTATIONS["wkv/triton-chunk"]
    case = case_of("wkv/triton-chunk", B=1, T=40, P=1, k_range=40.0)
    CONTRACTS["agreement"].check(implementation, case, 0)


@pytest.mark.parametrize("contract", ["agreement", "decoding"])
def test_decoding(contract: str) -> None:
    hold(contract, "wkv/triton-recurrent", T=9, k_range=40.0)


def test_states() -> None:
    hold("agreement", "wkv_states/triton", P=1, k_range=40.0)
