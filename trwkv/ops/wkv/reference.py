"""Two independent oracles of the WKV recurrence, in float64, readable and slow.

`step_wkv` walks the tokens one by one; `direct_wkv` writes every output as one log-sum-exp over its past, O(T^2).
They share no arithmetic, so an error in one shows against the other. Both are differentiable to any order by
PyTorch's autograd. Every stabiliser is detached: its value cancels from the result, and so must its derivative.
"""

import torch
from torch import Tensor

EMPTY_EXP = -1e38
"""Exponent of an empty state: finite, so that no difference of two exponents is NaN."""


def step_wkv(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, weights: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One token after the other. Shapes as in `multi_perspective_wkv`, with the P axis present.

    Returns the output in v's dtype and the state after the last token.
    """
    w64, u64, k64, v64 = (x.double() for x in (w, u, _per_perspective(k), _per_perspective(v)))
    num, den, exp = _unpack_state(initial_state, k64, w64)
    rows = []
    for t in range(k64.shape[1]):
        kt, vt = k64[:, t], v64[:, t]
        mass = _exponent_of_mass(num, den, exp)
        top = torch.maximum(mass, u64 + kt).detach()
        past, now = _exp(exp - top), _exp(u64 + kt - top)
        rows.append((past * num + now * vt) / (past * den + now))
        top = torch.maximum(mass + w64, kt).detach()
        past, now = _exp(exp + w64 - top), _exp(kt - top)
        num, den, exp = past * num + now * vt, past * den + now, top
    y = torch.stack(rows, dim=1) if rows else _no_rows(k64, w64)
    return aggregate(y, weights).to(v.dtype), _pack_state(num, den, exp, k)


def direct_wkv(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, weights: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Every output as one normalised sum over its whole past: logits [B, T + 1, T, P, C] in memory at once."""
    w64, u64, k64, v64 = (x.double() for x in (w, u, _per_perspective(k), _per_perspective(v)))
    num, den, exp = _unpack_state(initial_state, k64, w64)
    T = k64.shape[1]
    t = torch.arange(T + 1, device=k.device)  # row T is the state after the last token
    lag = t[:, None] - 1 - t[None, :T]  # [T + 1, T]
    decay = lag.clamp(min=0)[..., None, None] * w64
    bonus = torch.where((lag == -1)[..., None, None], u64, decay)
    logits = bonus[None] + k64[:, None]
    seen = torch.where(lag == -1, t[:, None] < T, lag >= 0)[None, :, :, None, None]
    logits = logits.masked_fill(~seen, float("-inf"))

    carried = exp[:, None] + t[:, None, None] * w64  # [B, T + 1, P, C]
    top = _exponent_of_mass(num[:, None], den[:, None], carried)
    if T:
        top = torch.maximum(top, logits.detach().amax(2))
    past, now = _exp(carried - top), _exp(logits - top[:, :, None])
    nums = past * num[:, None] + (now * v64[:, None]).sum(2)
    dens = past * den[:, None] + now.sum(2)
    y = nums[:, :T] / dens[:, :T]
    return aggregate(y, weights).to(v.dtype), _pack_state(nums[:, T], dens[:, T], top[:, T], k)


def aggregate(y: Tensor, weights: Tensor | None) -> Tensor:
    """Sum over perspectives: y [B, T, P, C] with weights [P], [P, C] or [B, T, P] -> [B, T, C]."""
    if weights is None:
        return y
    weights = weights.to(y.dtype)
    if weights.ndim == 1:
        return torch.einsum("btpc,p->btc", y, weights)
    if weights.ndim == 2:
        return torch.einsum("btpc,pc->btc", y, weights)
    return torch.einsum("btpc,btp->btc", y, weights)


def _per_perspective(x: Tensor) -> Tensor:
    return x.unsqueeze(2) if x.ndim == 3 else x


def _exp(x: Tensor) -> Tensor:
    # Only an empty state can carry an exponent above the stabiliser; its factor is multiplied by zero.
    return torch.exp(x.clamp(max=700.0))


def _exponent_of_mass(num: Tensor, den: Tensor, exp: Tensor) -> Tensor:
    empty = (num == 0) & (den == 0)
    return torch.where(empty, EMPTY_EXP, exp).detach()


def _unpack_state(initial_state: Tensor | None, k: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if initial_state is None:
        num = torch.zeros(k.shape[0], *w.shape, dtype=torch.float64, device=k.device)
        return num, num, torch.full_like(num, EMPTY_EXP)
    num, den, exp = initial_state.double().unbind(1)
    return num, den, exp


def _pack_state(num: Tensor, den: Tensor, exp: Tensor, k: Tensor) -> Tensor:
    dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
    rounded = exp.to(dtype).double()  # what rounding takes from the exponent goes into the mantissas
    scale = torch.exp((exp - rounded).clamp(-1.0, 1.0))
    return torch.stack([num * scale, den * scale, rounded.expand_as(num)], dim=1).to(dtype)


def _no_rows(k: Tensor, w: Tensor) -> Tensor:
    return k.new_empty(k.shape[0], 0, *w.shape)
