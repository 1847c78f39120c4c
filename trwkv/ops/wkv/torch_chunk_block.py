"""What forward and backward of the chunked PyTorch backend share: one layout, blocks of chunks, the scan over chunks.

Inside, k and v have one layout, [B, T, C], with parameters [P, C]. Separate k and v per perspective are the same
problem with one perspective and P * C channels; `Problem.split` undoes that for the aggregation.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 16
"""Tokens per chunk. Fixed: if it depended on the shapes, cutting a sequence would change the rounding."""

BLOCK_ELEMENTS = 1 << 15
"""Batch x chunks x channels worked on by one operation, per thread: large enough to hide its cost (and PyTorch gives no
thread fewer), small enough that most of what a block needs stays in the thread's cache."""

MAX_BLOCK_PERSPECTIVES = 4
"""With more perspectives a block gets fewer chunks: it holds no more than that many perspectives' elements."""

MAX_BLOCK_THREADS = 8
"""With more threads blocks, and the memory they need, do not grow further."""

EMPTY_EXP = -1e38
"""Exponent of an empty state: finite, so that no difference of two exponents is NaN."""

# Bounds of the fast path; what they guarantee is said in `torch_chunk`.
MAX_LOG = 16.0  # of |k - s|: its rounding is then at most 2^-21, a quarter of what the tests allow in all
MAX_BONUS = 30.0  # of |u|
MAX_POSITIVE_W = 0.25
MAX_PRODUCT = 1e25  # of |e^(k-s) v|
MAX_CARRIED_LOG = 50.0  # of the log of the denominator carried in, relative to s
MAX_CARRIED_NUM = 1e30


class Problem(NamedTuple):
    """The op's arguments in the inner layout. `perspectives` is P as the caller has it."""

    batch: int
    tokens: int
    perspectives: int
    own: bool  # k and v separate per perspective
    dtype: torch.dtype  # of the arithmetic
    w: Tensor  # [P, 1, C] float64
    u: Tensor  # [P, 1, C] float64
    decay: Tensor  # [P, 1, 1, C] exp(w)
    bonus: Tensor  # [P, 1, 1, C] exp(u)
    outside: Tensor | None  # [C], channels whose w or u is out of the fast path's bounds; None: none is

    def split(self, y: Tensor) -> Tensor:
        """[P, B, N, C] in the inner layout -> a view of that shape in the caller's."""
        return y[0].unflatten(-1, (self.perspectives, -1)).movedim(-2, 0) if self.own else y

    def public(self, x: Tensor) -> Tensor:
        """[..., P, B, C] in the inner layout -> [..., B, P, C] in the caller's."""
        if self.own:
            return x.squeeze(-3).unflatten(-1, (self.perspectives, -1))
        return x.movedim(-3, -2)

    def inner(self, x: Tensor) -> Tensor:
        """[..., B, P, C] in the caller's layout -> [..., P, B, C] in the inner one."""
        return x.flatten(-2).unsqueeze(-3) if self.own else x.movedim(-2, -3)


class Block(NamedTuple):
    """A run of chunks. `bad` is the first position of each chunk that the fast path may not compute, or `length`."""

    start: int
    chunks: int
    length: int  # tokens per chunk
    base: Tensor  # s, [B, N, C]
    terms: Tensor  # (e^(k-s) v, e^(k-s)), [2, L, B, N, C]
    bad: Tensor | None  # [B, N, C]; None: all good

    def view(self, x: Tensor) -> Tensor:
        """The block's part of [B, T, ...] as [L, B, N, ...], without a copy."""
        part = x[:, self.start : self.start + self.chunks * self.length]
        return part.unflatten(1, (self.chunks, self.length)).movedim(2, 0)


def set_up(w: Tensor, u: Tensor, k: Tensor) -> Problem:
    own = k.ndim == 4
    dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
    w64, u64 = (x.reshape(1, 1, -1) if own else x[:, None] for x in (w.double(), u.double()))
    outside = ~((u64.abs() <= MAX_BONUS) & (w64 <= MAX_POSITIVE_W)).all(0).all(0)
    # Where a channel is outside, any finite values serve the fast path.
    decay, bonus = (x.masked_fill(outside, 0).exp().to(dtype).unsqueeze(1) for x in (w64, u64))
    outside = outside if outside.any() else None
    return Problem(k.shape[0], k.shape[1], w.shape[0], own, dtype, w64, u64, decay, bonus, outside)


def block_elements(perspectives: int) -> int:
    """What a block holds of all perspectives, unless one chunk of all rows and channels is more."""
    return (
        BLOCK_ELEMENTS
        * min(torch.get_num_threads(), MAX_BLOCK_THREADS)
        * min(perspectives, MAX_BLOCK_PERSPECTIVES)
    )


def block_ranges(p: Problem) -> Iterator[tuple[int, int, int]]:
    """(first token, chunks, tokens per chunk) of every block, in order; a last, shorter chunk is its own block.

    None without a batch row: there is no largest element of nothing.
    """
    if p.batch == 0:
        return
    whole = p.tokens // CHUNK
    step = max(1, block_elements(p.decay.shape[0]) // (max(1, p.batch) * p.decay.numel()))
    for first in range(0, whole, step):
        yield first * CHUNK, min(step, whole - first), CHUNK
    if p.tokens % CHUNK:
        yield whole * CHUNK, 1, p.tokens % CHUNK


def load(p: Problem, k: Tensor, v: Tensor, start: int, chunks: int, length: int) -> Block:
    """Exponentials of one block, and where the fast path may not go."""
    block = Block(start, chunks, length, k, k, None)
    k_view, v_view = (block.view(x).flatten(3) for x in (k, v))
    base = k_view[0].to(p.dtype, copy=True)
    terms = base.new_empty(2, length, *base.shape)
    products, exps = terms.unbind(0)
    torch.sub(k_view, base, out=exps).exp_()
    torch.mul(exps, v_view, out=products)
    block = block._replace(base=base, terms=terms)
    if p.outside is None and _within(exps, products):
        return block
    return block._replace(bad=_first_bad(p, exps, products))


def _first_bad(p: Problem, exps: Tensor, products: Tensor) -> Tensor:
    """[B, N, C]: first token out of bounds, or the chunk's length."""
    limit = math.exp(MAX_LOG)
    length = exps.shape[0]
    good = (exps.amin(0) >= 1 / limit) & (exps.amax(0) <= limit)
    good &= (products.amin(0) >= -MAX_PRODUCT) & (products.amax(0) <= MAX_PRODUCT)
    bad = torch.full(good.shape, length, device=good.device)
    if p.outside is not None:
        bad[..., p.outside] = 0
        good |= p.outside
    b, n, c = torch.nonzero(~good, as_tuple=True)
    e, ev = exps[:, b, n, c], products[:, b, n, c]
    within = (e >= 1 / limit) & (e <= limit) & (ev.abs() <= MAX_PRODUCT)
    bad[b, n, c] = within.long().cumprod(0).sum(0)
    return bad


def _extremes(x: Tensor) -> tuple[float, float]:
    return x.amin().item(), x.amax().item()  # `aminmax` takes several times as long


def _within(exps: Tensor, products: Tensor) -> bool:
    low, high = _extremes(exps)
    limit = math.exp(MAX_LOG)
    if not (low >= 1 / limit and high <= limit):  # also when NaN
        return False
    low, high = _extremes(products)
    return -MAX_PRODUCT <= low and high <= MAX_PRODUCT


def carried_in(p: Problem, block: Block, exp: Tensor, sums: Tensor) -> tuple[Block, Tensor]:
    """States at chunk starts, exp [N, P, B, C] and sums [N, 2, P, B, C], in the units of each chunk: [2, P, B, N, C].

    Where they are out of bounds there, the whole chunk is marked bad and the carried state left out.
    """
    scale = torch.exp(exp - block.base.movedim(1, 0).unsqueeze(1))
    carry = (sums * scale.unsqueeze(1)).movedim(0, 3).to(p.dtype, memory_format=torch.contiguous_format)
    low, high = _extremes(carry)
    limit = math.exp(MAX_CARRIED_LOG)
    if block.bad is None and low >= -limit and high <= limit:
        return block, carry
    good = ((carry[0].abs() <= MAX_CARRIED_NUM) & (carry[1] <= limit)).all(0)
    if block.bad is not None:
        good &= block.bad > 0
    elif good.all():
        return block, carry
    bad = torch.full_like(good, block.length, dtype=torch.long) if block.bad is None else block.bad
    return block._replace(bad=bad.where(good, 0)), carry.where(good, 0)


def scan_chunks(
    exp: Tensor, sums: Tensor, steps_w: Tensor, labels: Tensor, local: Tensor
) -> tuple[Tensor, Tensor]:
    """States at all chunk boundaries from the chunk summaries, in float64 with a running maximum as exponent.

    exp [P, B, C], sums [2, P, B, C]: before the block. steps_w [P, 1, C]: log decay of a chunk. labels
    [N, P or 1, B, C], local [N, 2, P, B, C]: each chunk alone, local * e^labels. Returns [N + 1, ...] of both.
    """
    exps = exp.new_empty(labels.shape[0] + 1, *exp.shape)
    exps[0] = exp
    rows = exps.unbind(0)
    for n, label in enumerate(labels.unbind(0)):
        torch.maximum(rows[n] + steps_w, label, out=rows[n + 1])
    keep = torch.exp((exps[:-1] - exps[1:]) + steps_w).unsqueeze(1)  # the sum, rounded, would drift
    add = local * torch.exp(labels - exps[1:]).unsqueeze(1)
    all_sums = sums.new_empty(len(rows), *sums.shape)
    all_sums[0] = sums
    rows = all_sums.unbind(0)
    for n, (a, b) in enumerate(zip(add.unbind(0), keep.unbind(0), strict=True)):
        torch.addcmul(a, rows[n], b, out=rows[n + 1])
    return exps, all_sums


def unpack_state(p: Problem, initial_state: Tensor | None, w: Tensor) -> tuple[Tensor, Tensor]:
    """The initial state as exp [P, B, C] and sums [2, P, B, C], float64."""
    if initial_state is None:
        shape = (p.w.shape[0], p.batch, p.w.shape[2])
        exp = torch.full(shape, EMPTY_EXP, dtype=torch.float64, device=w.device)
        return exp, exp.new_zeros(2, *shape)
    state = p.inner(initial_state.double().movedim(1, 0))  # [3, P, B, C]
    sums, exp = state[:2], state[2]
    return torch.where((sums == 0).all(0), EMPTY_EXP, exp), sums


def pack_states(p: Problem, exp: Tensor, sums: Tensor) -> Tensor:
    """exp [N, P, B, C], sums [N, 2, P, B, C] -> [N, 3, P, B, C] in the arithmetic's dtype, den near 1."""
    near = (
        exp.to(p.dtype) + sums[:, 1].abs().clamp_(1e-30, 1e30).to(p.dtype).log_()
    )  # an empty one's stays EMPTY_EXP
    packed = near.new_empty(len(near), 3, *near.shape[1:])
    packed[:, :2] = sums * torch.exp(exp - near).unsqueeze(1)
    packed[:, 2] = near
    return packed


def columns(
    p: Problem, block: Block, k: Tensor, v: Tensor, at: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """k, v [L, M] and w, u [P, M] of M columns, float64. `at`: batch row, chunk and channel of each, [M]."""
    b, n, c = at
    k_cols, v_cols = (block.view(x).flatten(3)[:, b, n, c].double() for x in (k, v))
    return k_cols, v_cols, p.w[:, 0, c], p.u[:, 0, c]


def weights_at(p: Problem, block: Block, weights: Tensor, j: int) -> Tensor:
    """Weights of the block's tokens at chunk position j, to multiply `Problem.split(y)`, [P, B, N, C], with."""
    weights = weights.to(p.dtype)
    if weights.ndim == 3:
        return block.view(weights)[j].movedim(-1, 0).unsqueeze(-1)
    return weights[:, None, None, None] if weights.ndim == 1 else weights[:, None, None]


def inner_rows(p: Problem, block: Block, x: Tensor) -> Tensor:
    """The block's part of x [B, T, P, C] as a view [L, P, B, N, C] in the inner layout."""
    rows = block.view(x)
    return rows.flatten(-2).unsqueeze(1) if p.own else rows.movedim(-2, 1)
