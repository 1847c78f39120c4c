"""Tensors of more than 2^31 elements: offsets are 64 bits wide.

The tensors are that large, but only the rows of one short packed sequence near their end are ever touched, so that they
cost address space and no memory. The host functions are called directly: a sequence that does not begin at 0 is
refused by the public ones.
"""

from collections.abc import Iterator

import pytest
import torch

from trwkv.ops._tuning import pin_config
from trwkv.ops.wkv import chunk, recurrent

pytestmark = pytest.mark.xdist_group("large tensors")  # on a GPU they do cost memory: one after the other
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
C, P, TOKENS = 4096, 2, 5
ROWS = 2**31 // C + TOKENS
BLOCK_C = 64 if torch.cuda.is_available() else C  # in the interpreter a program is what costs time
BLOCK_SUMS = chunk.BLOCK_SUMS if torch.cuda.is_available() else 2**20
BLOCKS = {"fwd_block_c": BLOCK_C, "fwd_block_t": 4, "bwd_block_c": BLOCK_C, "bwd_block_t": 4}


@pytest.fixture(autouse=True)
def memory_given_back() -> Iterator[None]:
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def untouched(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    try:
        return torch.empty(shape, dtype=dtype, device=DEVICE)
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        pytest.skip(f"needs address space for {list(shape)} {dtype}: {error!s:.80}")


def far(x: torch.Tensor) -> torch.Tensor:
    """Per-token x [1, TOKENS, ...] as the last rows of a huge tensor."""
    huge = untouched(1, ROWS, *x.shape[2:], dtype=x.dtype)
    huge[:, -TOKENS:] = x
    return huge


def bounds(rows: int) -> torch.Tensor:
    return torch.tensor([rows - TOKENS, rows], device=DEVICE)


def inputs() -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    w, u = -torch.rand(P, C, generator=g), torch.randn(P, C, generator=g)
    k, v, grad = torch.randn(3, 1, TOKENS, C, generator=g).bfloat16()
    weights = torch.rand(1, TOKENS, P, generator=g)
    return tuple(x.to(DEVICE) for x in (w, u, k, v, weights, grad))


@pytest.mark.parametrize("reverse", [False, True])
def test_forward_and_backward(reverse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk, "BLOCK_SUMS", BLOCK_SUMS)
    w, u, k, v, weights, grad = inputs()

    def run(k, v, weights, grad):
        common = (w, u, k, v, weights, None, bounds(k.shape[1]), reverse)
        output, state, saved = chunk.chunk_forward(*common, save=True)
        grads = chunk.chunk_backward(grad, None, *common, saved)
        per_token = [x[:, -TOKENS:] for x in (output, grads[2], grads[3], grads[4])]
        return [*per_token, state, grads[0], grads[1]]

    with pin_config(**BLOCKS, chunk_len=2**20):
        near = run(k, v, weights, grad)
        there = run(far(k), far(v), far(weights), far(grad))
    for a, b in zip(near, there, strict=True):
        assert torch.equal(a, b)
    assert near[0].abs().sum() > 0


def test_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recurrent, "BLOCK_C", BLOCK_C)
    w, u, k, v, weights, _ = inputs()
    near, state = recurrent.recurrent_forward(w, u, k, v, weights, None, bounds(TOKENS), False)
    there, same = recurrent.recurrent_forward(w, u, far(k), far(v), far(weights), None, bounds(ROWS), False)
    assert torch.equal(near, there[:, -TOKENS:])
    assert torch.equal(state, same)


def test_states() -> None:
    """Here it is the planes of num, den and exp that lie more than 2^31 elements apart."""
    w, _, k, v, _, _ = inputs()
    rows = 2**30 // (P * C) + TOKENS
    with pin_config(**BLOCKS, chunk_len=2**20):
        near, state = chunk.chunk_states(w, k, v, None, bounds(TOKENS), False)
        k, v = (x[:, -rows:] for x in (far(k), far(v)))
        there, same = chunk.chunk_states(w, k, v, None, bounds(rows), False)
    assert 2 * rows * P * C > 2**31
    assert torch.equal(near, there[:, :, -TOKENS:])
    assert torch.equal(state, same)
