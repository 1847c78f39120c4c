"""Chunked PyTorch backend: the default on the CPU. Equations and arguments as in `multi_perspective_wkv`.

T is cut into chunks of `CHUNK` tokens. Every chunk is summarised from an empty state, all chunks of a block at once
(one step per token position, vectorised over batch, chunks and channels); a scan over the summaries, in float64,
gives the state at each chunk's start; a second walk from those states gives the outputs.

Inside a chunk the sums are kept relative to e^s with s = k of the chunk's first token: k - s is rounded by 2^-21 at
most, one exponential per token serves all perspectives, and s depends on nothing later, which keeps causality bitwise.
With |k - s| <= 16, |u| <= 30, w <= 0.25, |e^(k-s) v| <= 1e25 and a carried numerator and denominator of at most 1e30
and e^50, nothing overflows (e^30 * 1e25 is the largest term, and 16 tokens grow by at most e^4), and no denominator
underflows: it holds the token's own bonus weight e^(u+k-s) and, from the chunk's second token on, that of the token
before, so it is at least e^-30. Whatever lies outside these bounds, from that token to the end of its chunk and for
that channel alone, is computed by `torch_chunk_exact` in float64 with a running maximum per token. Each bound looks at
the past only, so the choice, too, is causal; and it is made per channel and batch row: neighbours have no say in it.

State convention of every backend: (num, den, exp) stands for num * e^exp and den * e^exp. The final state's exp is a
constant of the representation: its incoming gradient is ignored, and the gradient of the true sums is that of num and
den times e^-exp. The gradient of the initial state's exp is exact, num * grad_num + den * grad_den. Here the final
state has den near 1 (after a single token, at least that of the initial state), or is (0, 0, EMPTY_EXP) when empty.
"""

import torch
from torch import Tensor

from trwkv.ops.wkv.torch_chunk_block import (
    CHUNK,
    EMPTY_EXP,
    Block,
    Problem,
    block_ranges,
    carried_in,
    columns,
    inner_rows,
    load,
    pack_states,
    scan_chunks,
    set_up,
    unpack_state,
    weights_at,
)
from trwkv.ops.wkv.torch_chunk_bwd import chunk_backward
from trwkv.ops.wkv.torch_chunk_exact import step, walk

__all__ = ["CHUNK", "chunk_backward", "chunk_forward", "empty_checkpoint"]


@torch.no_grad()
def chunk_forward(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor | None,
    initial_state: Tensor | None,
    *,
    save: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, final state and, if `save`, the checkpoint for `chunk_backward`: the states at all chunk boundaries,
    [ceil(T / CHUNK) + 1, 3, P, B, C] (perspectives with their own k and v count as channels); else an empty tensor.
    """
    if k.shape[1] == 1 and not save:
        output, final_state = _single_token(w, u, k, v, weights, initial_state)
        return output, final_state, k.new_empty(0, dtype=torch.float32)
    p = set_up(w, u, k)
    exp, sums = unpack_state(p, initial_state, w)
    output = _empty_output(p, v, weights)
    checkpoint = empty_checkpoint(w, k) if save else k.new_empty(0, dtype=torch.float32)
    done = 0
    for bounds in block_ranges(p):
        block = load(p, k, v, *bounds)
        exps, all_sums = _states(p, block, k, v, exp, sums)
        if save:
            checkpoint[done : done + block.chunks] = pack_states(p, exps[:-1], all_sums[:-1])
        _write_output(p, block, k, v, weights, exps[:-1], all_sums[:-1], output)
        exp, sums, done = exps[-1], all_sums[-1], done + block.chunks
    last = pack_states(p, exp.unsqueeze(0), sums.unsqueeze(0))[0]
    if save:
        checkpoint[done] = last
    if p.tokens == 0 and initial_state is not None:
        return output, initial_state.clone(), checkpoint
    return output, p.public(last).movedim(0, 1).contiguous(), checkpoint


def empty_checkpoint(w: Tensor, k: Tensor) -> Tensor:
    """Uninitialised tensor of the checkpoint's shape, dtype and device; T may be symbolic."""
    chunks = (k.shape[1] + CHUNK - 1) // CHUNK
    P, C = (1, w.shape[0] * w.shape[1]) if k.ndim == 4 else w.shape
    dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
    return k.new_empty((chunks + 1, 3, P, k.shape[0], C), dtype=dtype)


def _empty_output(p: Problem, v: Tensor, weights: Tensor | None) -> Tensor:
    C = p.w.shape[2] // p.perspectives if p.own else p.w.shape[2]
    shape = (p.batch, p.tokens, C) if weights is not None else (p.batch, p.tokens, p.perspectives, C)
    return v.new_empty(shape)


def _states(
    p: Problem, block: Block, k: Tensor, v: Tensor, exp: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor]:
    """States at the block's chunk boundaries, exp [N + 1, P, B, C] and sums [N + 1, 2, P, B, C], in float64."""
    steps = block.terms.unsqueeze(2).unbind(1)  # [2, 1, B, N, C] each
    P = p.decay.shape[0]
    local = steps[0].expand(-1, P, -1, -1, -1).contiguous()
    for term in steps[1:]:
        torch.addcmul(term, local, p.decay, out=local)
    labels = block.base.double().movedim(1, 0).unsqueeze(1)  # [N, 1, B, C]
    local = local.double().movedim(3, 0)
    if block.bad is not None:
        at = b, n, c = torch.nonzero(block.bad < block.length, as_tuple=True)
        k_cols, v_cols, w_cols, u_cols = columns(p, block, k, v, at)
        empty = torch.full_like(w_cols, EMPTY_EXP)
        _, col_exp, col_sums = walk(
            k_cols, v_cols, w_cols, u_cols, empty, torch.zeros_like(empty).expand(2, -1, -1)
        )
        labels = labels.repeat(1, P, 1, 1)
        labels[n, :, b, c] = col_exp.T
        local = local.contiguous()
        local[n, :, :, b, c] = col_sums.movedim(2, 0)
    return scan_chunks(exp, sums, p.w * block.length, labels, local)


def _write_output(
    p: Problem,
    block: Block,
    k: Tensor,
    v: Tensor,
    weights: Tensor | None,
    exps: Tensor,
    sums: Tensor,
    output: Tensor,
) -> None:
    """The outputs of a block from the states at its chunks' starts, exps [N, P, B, C] and sums [N, 2, P, B, C]."""
    block, state = carried_in(p, block, exps, sums)
    exact = None
    if block.bad is not None:
        at = b, n, c = torch.nonzero(block.bad < block.length, as_tuple=True)
        cols = columns(p, block, k, v, at)
        steps, _, _ = walk(*cols, exps[n, :, b, c].T, sums[n, :, :, b, c].movedim(0, 2))
        exact = block.bad[at], [s.y.to(p.dtype) for s in steps]
    both = torch.empty_like(state)
    rows = inner_rows(p, block, output) if weights is None else block.view(output)
    for j, terms in enumerate(block.terms.unsqueeze(2).unbind(1)):
        torch.addcmul(state, p.bonus, terms, out=both)
        torch.addcmul(terms, state, p.decay, out=state)
        y = torch.div(both[0], both[1], out=rows[j] if weights is None else both[0])
        if block.start + j == 0:
            y[:, :, 0] = _first_output(p, k, v, exps[0], sums[0]).to(p.dtype)
        if exact is not None:
            first, ys = exact
            y[:, b, n, c] = torch.where(first <= j, ys[j].to(y.dtype), y[:, b, n, c])
        if weights is not None:
            _aggregate(p.split(y), weights_at(p, block, weights, j), rows[j])


def _first_output(p: Problem, k: Tensor, v: Tensor, exp: Tensor, sums: Tensor) -> Tensor:
    """The very first token's output, [P, B, C], computed as `_single_token` does: bitwise the same."""
    k0, v0 = (x[:, 0].flatten(1).double() for x in (k, v))
    return step(k0, v0, p.w, p.u, exp, *sums.unbind(0))[0].y


def _single_token(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, weights: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """T = 1, in few operations, for decoding: one exact step in the caller's layout, [B, P, C]."""
    if k.ndim == 4:
        k, v = k[:, 0], v[:, 0]
    dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
    if initial_state is None:
        num = den = torch.zeros(k.shape[0], *w.shape, dtype=torch.float64, device=k.device)
        exp = torch.full_like(num, EMPTY_EXP)
    else:
        num, den, exp = initial_state.double().unbind(1)
        exp = exp.masked_fill((num == 0) & (den == 0), EMPTY_EXP)
    done, num, den = step(k.double(), v.double(), w.double(), u.double(), exp, num, den)
    y = done.y.to(dtype)
    if weights is None:
        output = y.to(v.dtype, copy=True).unsqueeze(1)
    else:
        weights = weights.to(dtype)
        weights = (
            weights.movedim(-1, 0) if weights.ndim == 3 else weights[:, None]
        )  # [P, B, 1] or [P, 1, (C)]
        weights = weights.unsqueeze(-1) if weights.ndim == 2 else weights
        output = v.new_empty(y.shape[0], 1, y.shape[2])
        _aggregate(y.movedim(1, 0), weights, output[:, 0])
    exp = done.exp.to(dtype)
    rest = torch.exp(done.exp - exp)  # what rounding takes from the exponent
    return output, torch.stack([(num * rest).to(dtype), (den * rest).to(dtype), exp.expand(num.shape)], dim=1)


def _aggregate(y: Tensor, weights: Tensor, out: Tensor) -> None:
    """Sum over the perspectives, first to last, of y [P, ...] into out [...]."""
    *others, last = zip(y.unbind(0), weights.unbind(0), strict=True)
    if not others:
        torch.mul(*last, out=out)
        return
    total = torch.mul(*others[0])
    for y_p, weight in others[1:]:
        total.addcmul_(y_p, weight)
    torch.addcmul(total, *last, out=out)
