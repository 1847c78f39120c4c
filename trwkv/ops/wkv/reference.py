"""Two independent oracles of the WKV recurrence, in float64, readable and slow.

`step_wkv` and `step_states` walk the tokens one by one, every packed sequence alone, cut out and flipped as asked.
`direct_wkv` and `direct_states` write every result as one log-sum-exp over all packed tokens, O(T^2), where sequences
and direction are nothing but masks and signed lags. They share no arithmetic: an error in one, such as a state that
leaks from one sequence into the next, shows against the other. All are differentiable to any order by PyTorch's
autograd. Every stabiliser is detached: its value cancels from the result, and so must its derivative. The exponents
returned carry no gradient.

Shapes as in `multi_perspective_wkv`, with the P axis present. `bounds`: cu_seqlens as a list, or None.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from einops import rearrange
from torch import Tensor

EMPTY_EXP = -1e38
"""Exponent of an empty state: finite, so that no difference of two exponents is NaN."""

_State = tuple[Tensor, Tensor, Tensor]  # num, den, exp


def step_wkv(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor | None,
    initial_state: Tensor | None,
    bounds: list[int] | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """One token after the other. Returns the output in v's dtype and the state after the last token."""
    w64, u64 = w.double(), u.double()  # once: gradients of all sequences add up in float64
    weights64 = None if weights is None else weights.double()

    def run(k: Tensor, v: Tensor, weights: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor]:
        k64, v64 = _per_perspective(k, len(w)), _per_perspective(v, len(w))
        states = _walk(w64, k64, v64, state)
        rows = []
        for (num, den, exp), kt, vt in zip(states[:-1], k64.unbind(1), v64.unbind(1), strict=True):
            bonus = u64 + kt
            top = torch.maximum(_exponent_of_mass(num, den, exp), bonus).detach()
            past, now = _exp(exp - top), _exp(bonus - top)
            rows.append((past * num + now * vt) / (past * den + now))
        y = torch.stack(rows, dim=1) if rows else k64.new_empty(k.shape[0], 0, *w.shape)
        return aggregate(y, weights).to(v.dtype), _pack_state(*states[-1], k)

    return _each_sequence(run, k, v, weights64, initial_state, bounds, reverse, token_axis=1)


def step_states(
    w: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: Tensor | None,
    bounds: list[int] | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """The state every token sees, [B, 3, T, P, C], and the one after the last: one token after the other."""
    w64 = w.double()

    def run(k: Tensor, v: Tensor, _: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor]:
        k64, v64 = _per_perspective(k, len(w)), _per_perspective(v, len(w))
        *states, last = _walk(w64, k64, v64, state)
        if not states:
            return last[0].new_empty(k.shape[0], 3, 0, *w.shape, dtype=_state_dtype(k)), _pack_state(*last, k)
        return torch.stack([_pack_state(*s, k) for s in states], dim=2), _pack_state(*last, k)

    return _each_sequence(run, k, v, None, initial_state, bounds, reverse, token_axis=2)


def _walk(w: Tensor, k: Tensor, v: Tensor, initial_state: Tensor | None) -> list[_State]:
    """The states before every token and after the last."""
    if initial_state is None:
        num = k.new_zeros(k.shape[0], *w.shape)
        states = [(num, num, torch.full_like(num, EMPTY_EXP))]
    else:
        num, den, exp = initial_state.double().unbind(1)
        states = [(num, den, exp)]
    for kt, vt in zip(k.unbind(1), v.unbind(1), strict=True):
        num, den, exp = states[-1]
        top = torch.maximum(_exponent_of_mass(num, den, exp) + w, kt).detach()
        past, now = _exp((exp - top) + w), _exp(kt - top)  # exp + w, rounded, would drift
        states.append((past * num + now * vt, past * den + now, top))
    return states


def _each_sequence(
    run: Callable[[Tensor, Tensor, Tensor | None, Tensor | None], tuple[Tensor, Tensor]],
    k: Tensor,
    v: Tensor,
    weights: Tensor | None,
    initial_state: Tensor | None,
    bounds: list[int] | None,
    reverse: bool,
    token_axis: int,
) -> tuple[Tensor, Tensor]:
    """`run` on every sequence alone, its first token being the first to process; results in the order of the tokens."""
    if bounds is None:
        pieces = [(slice(None), initial_state)]
    else:
        tokens = (slice(*ends) for ends in pairwise(bounds))
        states = [None] * (len(bounds) - 1) if initial_state is None else initial_state.split(1)
        pieces = list(zip(tokens, states, strict=True))

    rows, finals = [], []
    for here, state in pieces:

        def cut(x: Tensor, here: slice = here) -> Tensor:
            return x[:, here].flip(1) if reverse else x[:, here]

        own_weights = cut(weights) if weights is not None and weights.ndim == 3 else weights
        row, final = run(cut(k), cut(v), own_weights, state)
        rows.append(row.flip(token_axis) if reverse else row)
        finals.append(final)
    return torch.cat(rows, dim=token_axis), torch.cat(finals)


def direct_wkv(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor | None,
    initial_state: Tensor | None,
    bounds: list[int] | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Every output as one normalised sum over its whole past: logits [B, T + N, T, P, C] in memory at once."""
    T = k.shape[1]
    num, den, exp = _sums(w.double(), u.double(), k, v, initial_state, bounds, reverse)
    y = num[:, :T] / den[:, :T]
    return aggregate(y, weights).to(v.dtype), _final(num, den, exp, k)


def direct_states(
    w: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: Tensor | None,
    bounds: list[int] | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """The state every token sees, [B, 3, T, P, C], each as one sum over its whole past, and the final state."""
    T = k.shape[1]
    num, den, exp = _sums(w.double(), None, k, v, initial_state, bounds, reverse)
    return _pack_state(num[:, :T], den[:, :T], exp[:, :T], k), _final(num, den, exp, k)


def _sums(
    w: Tensor,
    u: Tensor | None,
    k: Tensor,
    v: Tensor,
    initial_state: Tensor | None,
    bounds: list[int] | None,
    reverse: bool,
) -> _State:
    """num, den and their exponent [B, T + N, P, C]: what each of T tokens sees (itself too, with bonus u, unless that
    is None), then the sums of all tokens of each of N sequences (one per row without `bounds`).
    """
    k, v = _per_perspective(k, len(w)), _per_perspective(v, len(w))
    B, T = k.shape[:2]
    ends = torch.tensor([0, T] if bounds is None else bounds, device=k.device)
    N = len(ends) - 1
    start, stop = ends[:-1], ends[1:]
    t = torch.arange(T, device=k.device)
    sequence = torch.repeat_interleave(torch.arange(N, device=k.device), stop - start)
    row_sequence = torch.cat([sequence, torch.arange(N, device=k.device)])
    # Where each row stands: a token at its place, final sums behind the last token; and how far from the initial state.
    place = torch.cat([t, start - 1 if reverse else stop])
    steps = (stop - 1)[row_sequence] - place if reverse else place - start[row_sequence]
    lag = (t - place[:, None] if reverse else place[:, None] - t) - 1  # [T + N, T], -1 at the token itself
    same = row_sequence[:, None] == sequence
    own = same & (lag == -1) & (u is not None)
    seen = (same & (lag >= 0)) | own
    decay = lag.clamp(min=0)[..., None, None] * w
    logits = (decay if u is None else torch.where(own[..., None, None], u, decay)) + k[:, None]
    logits = logits.masked_fill(~seen[..., None, None], float("-inf"))

    if initial_state is None:
        num = den = k.new_zeros(B, N, *w.shape)
        exp = torch.full_like(num, EMPTY_EXP)
    else:
        num, den, exp = rearrange(initial_state.double(), "(b n) s p c -> s b n p c", b=B)
    num, den, exp = (x[:, row_sequence] for x in (num, den, exp))  # [B, T + N, P, C]
    exp = exp + steps[:, None, None] * w
    mass = _exponent_of_mass(num, den, exp)
    top = torch.cat([mass[:, :, None], logits.detach().expand(B, -1, -1, *w.shape)], dim=2).amax(2)
    # With nothing to see, the initial state as it is.
    top = torch.where(seen.any(1)[:, None, None], top, exp).detach()
    past, now = _exp(exp - top), _exp(logits - top[:, :, None])
    return past * num + (now * v[:, None]).sum(2), past * den + now.sum(2), top


def _final(num: Tensor, den: Tensor, exp: Tensor, k: Tensor) -> Tensor:
    T = k.shape[1]
    num, den, exp = (rearrange(x[:, T:], "b n p c -> (b n) p c") for x in (num, den, exp))  # b = 1 or n = 1
    return _pack_state(num, den, exp, k)


def aggregate(y: Tensor, weights: Tensor | None) -> Tensor:
    """Sum over perspectives: y [B, T, P, C] with weights [P], [P, C] or [B, T, P] -> [B, T, C].

    Perspective by perspective: a matrix product would round an element according to its place among the others.
    """
    if weights is None:
        return y
    weights = weights.to(y.dtype)
    weights = weights.unsqueeze(-1) if weights.ndim != 2 else weights  # [.., P, 1] or [P, C]
    first, *others = zip(y.unbind(2), weights.unbind(-2), strict=True)
    total = first[0] * first[1]
    for y_p, weight in others:
        total = torch.addcmul(total, y_p, weight)
    return total


def _per_perspective(x: Tensor, P: int) -> Tensor:
    """[B, T, P, C] in float64. Stacked, not broadcast: the gradient is then added up perspective by perspective, in an
    order that depends neither on shapes nor on layouts."""
    x = x.double()
    return torch.stack([x] * P, dim=2) if x.ndim == 3 else x


def _exp(x: Tensor) -> Tensor:
    # Only an empty state can carry an exponent above the stabiliser; its factor is multiplied by zero.
    return torch.exp(x.clamp(max=700.0))


def _exponent_of_mass(num: Tensor, den: Tensor, exp: Tensor) -> Tensor:
    empty = (num == 0) & (den == 0)
    return torch.where(empty, EMPTY_EXP, exp).detach()


def _state_dtype(k: Tensor) -> torch.dtype:
    return torch.float64 if k.dtype == torch.float64 else torch.float32


def _pack_state(num: Tensor, den: Tensor, exp: Tensor, k: Tensor) -> Tensor:
    dtype = _state_dtype(k)
    rounded = exp.detach().to(dtype).double()  # what rounding takes from the exponent goes into the mantissas
    scale = torch.exp((exp - rounded).clamp(-1.0, 1.0))
    return torch.stack([num * scale, den * scale, rounded.expand_as(num)], dim=1).to(dtype)
