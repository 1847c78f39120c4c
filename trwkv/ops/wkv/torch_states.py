"""Unnormalised access on PyTorch: the state every token sees, by chunks, in float64 throughout.

Each chunk is summed from an empty state, the summaries are scanned (`scan_chunks`), and a second walk, from the states
at the chunks' starts, writes those of the tokens. A walk takes one step per position in the chunk, vectorised over
batch, chunks and channels, with a running maximum as exponent: of a step's two exponentials one is 1, the other has no
positive argument, so nothing overflows whatever k and w are.

A state is written in units of e^exp with exp an integer: in float32, too, what the true sums do not need of exp goes
into num and den without a rounding of exp. den is in (e^-1, 1], or smaller where |num| > 1e30 den, so that num stays in
range for any finite v. The first token's state is the initial one as it was given, else (0, 0, EMPTY_EXP).
"""

import torch
from torch import Tensor

from trwkv.ops.wkv.torch_chunk_block import (
    EMPTY_EXP,
    Block,
    block_ranges,
    inner_rows,
    scan_chunks,
    set_up,
    unpack_state,
)

_LARGEST_RATIO = 1e30  # of num and den, as long as den decides about the unit


@torch.no_grad()
def chunk_states(w: Tensor, k: Tensor, v: Tensor, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """The state every token sees, [B, 3, T, P, C] as a view of [3, B, T, P, C], and the final state [B, 3, P, C]."""
    p = set_up(w, torch.zeros_like(w), k)
    exp, sums = unpack_state(p, initial_state, w)
    planes = k.new_empty((3, *k.shape[:2], *w.shape), dtype=p.dtype)
    for bounds in block_ranges(p):
        block = Block(*bounds, k, k, None)
        k_rows, v_rows = (block.view(x).flatten(3).unsqueeze(1) for x in (k, v))  # [L, 1, B, N, C]
        rows = inner_rows(p, block, planes.flatten(0, 1))  # [L, P, 3 B, N, C]
        rows = rows.unflatten(2, (3, p.batch)).movedim(2, 0)
        nothing = p.w.new_zeros(2, *rows.shape[2:])
        label, local = _walk(k_rows, v_rows, p.w, torch.full_like(nothing[0], EMPTY_EXP), nothing, None)
        exps, all_sums = scan_chunks(exp, sums, p.w * block.length, label.movedim(2, 0), local.movedim(3, 0))
        before = exps[:-1].movedim(0, 2).contiguous(), all_sums[:-1].movedim(0, 3).contiguous()
        _walk(k_rows, v_rows, p.w, *before, rows)
        exp, sums = exps[-1], all_sums[-1]
    if p.tokens and initial_state is not None:
        planes[:, :, 0] = initial_state.movedim(1, 0)
    if p.tokens == 0 and initial_state is not None:
        return planes.movedim(0, 1), initial_state.clone()
    last = planes.new_empty(3, *exp.shape)
    _write_state(exp, sums, last)
    return planes.movedim(0, 1), p.public(last).movedim(0, 1).contiguous()


def _walk(
    k: Tensor, v: Tensor, w: Tensor, exp: Tensor, sums: Tensor, rows: Tensor | None
) -> tuple[Tensor, Tensor]:
    """From the state before each chunk, exp [P, B, N, C] and sums [2, P, B, N, C], to that after it.

    k, v [L, 1, B, N, C]; w [P, 1, C]. The states before the tokens go to `rows`, [3, L, P, B, N, C].
    """
    w = w.unsqueeze(1)
    for j in range(k.shape[0]):
        if rows is not None:
            _write_state(exp, sums, rows[:, j])
            if j + 1 == k.shape[0]:
                break
        kj, before = k[j].double(), exp
        exp = torch.maximum(before + w, kj)
        keep, add = (before - exp).add_(w).exp_(), (kj - exp).exp_()
        sums = torch.addcmul(torch.stack([add * v[j].double(), add]), sums, keep)
    return exp, sums


def _write_state(exp: Tensor, sums: Tensor, out: Tensor) -> None:
    """The state (num, den) = sums in units of e^exp, into `out`."""
    num, den = sums.unbind(0)
    size = torch.maximum(den.abs(), num.abs().mul_(1 / _LARGEST_RATIO))
    unit = size.log_().add_(exp).ceil_().clamp_(min=EMPTY_EXP).to(out.dtype)
    scale = (exp - unit.double()).clamp_(max=700.0).exp_()  # larger only where it multiplies zeros
    for place, x in zip(out, (num * scale, den * scale, unit), strict=True):
        place.copy_(x.to(out.dtype))  # in two steps: converting while it scatters is several times slower
