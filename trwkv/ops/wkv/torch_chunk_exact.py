"""The columns the chunked fast path may not compute: float64, a running maximum per token and perspective.

A column is one channel of one chunk of one batch row; M of them are worked on at once. Exponents m are constants of
the representation and carry no gradient. All are real maxima, so no exponential exceeds 1 but those of an empty
carried state, which multiply zeros.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Step(NamedTuple):
    """One token: what its adjoint needs, [P, M] each."""

    keep: Tensor  # e^(m[t-1] + w - m[t])
    add: Tensor  # e^(k[t] - m[t])
    past: Tensor  # e^(m[t-1] - o[t])
    now: Tensor  # e^(u + k[t] - o[t])
    num: Tensor  # before the token
    den: Tensor
    exp: Tensor  # m[t]
    out_exp: Tensor  # o[t]
    divisor: Tensor
    y: Tensor


def step(
    k: Tensor, v: Tensor, w: Tensor, u: Tensor, exp: Tensor, num: Tensor, den: Tensor
) -> tuple[Step, Tensor, Tensor]:
    """One token from the state (num, den) e^exp; any shapes that broadcast. Returns it, and num and den after it."""
    bonus = u + k
    out_exp = torch.maximum(exp, bonus)
    past, now = torch.exp(exp - out_exp), torch.exp(bonus - out_exp)
    divisor = torch.addcmul(now, past, den)
    y = torch.addcmul(now * v, past, num) / divisor
    after = torch.maximum(exp + w, k)
    keep, add = torch.exp((exp - after) + w), torch.exp(k - after)
    done = Step(keep, add, past, now, num, den, after, out_exp, divisor, y)
    return done, torch.addcmul(add * v, num, keep), torch.addcmul(add, den, keep)


def walk(
    k: Tensor, v: Tensor, w: Tensor, u: Tensor, exp: Tensor, sums: Tensor
) -> tuple[list[Step], Tensor, Tensor]:
    """k, v [L, M], w, u [P, M], state before: exp [P, M], sums [2, P, M]. Returns steps, exp and sums after."""
    steps = []
    num, den = sums.unbind(0)
    for kt, vt in zip(k.unbind(0), v.unbind(0), strict=True):
        done, num, den = step(kt, vt, w, u, exp, num, den)
        steps.append(done)
        exp = done.exp
    return steps, exp, torch.stack([num, den])


class Adjoint(NamedTuple):
    k: Tensor  # [L, M]
    v: Tensor  # [L, M]
    w: Tensor  # [P, M], tokens from `first` on
    u: Tensor  # [P, M], tokens from `first` on
    before_first: Tensor  # [2, P, M], adjoint of the sums before token `first`, in units of e^-base
    carried: Tensor  # [2, P, M], adjoint of the sums before the chunk, in units of e^-carried_exp


def walk_back(
    steps: list[Step],
    v: Tensor,
    w: Tensor,
    grad_y: Tensor,
    adjoint: Tensor,
    first: Tensor,
    base: Tensor,
    carried_exp: Tensor,
) -> Adjoint:
    """Adjoint of `walk`. grad_y [L, P, M]; adjoint [2, P, M] of the sums after, in units of e^-m; first, base [M]."""
    grads_k, grads_v = [], []
    grad_w, grad_u = torch.zeros_like(w), torch.zeros_like(w)
    before_first, carried = torch.zeros_like(adjoint), torch.zeros_like(adjoint)
    for t in range(len(steps) - 1, -1, -1):
        s, vt, here = steps[t], v[t], first <= t
        q = grad_y[t] / s.divisor
        current = q * (vt - s.y)
        grad_u += torch.where(here, s.now * current, 0)
        grad_w += torch.where(here, s.keep * (adjoint[0] * s.num + adjoint[1] * s.den), 0)
        grads_v.append(sum_in_order((s.add * adjoint[0] + s.now * q).unbind(0)))
        by_k = s.add * (vt * adjoint[0] + adjoint[1]) + s.now * current
        grads_k.append(sum_in_order(by_k.unbind(0)))
        out = torch.stack([q, -q * s.y])
        if t:
            exp = torch.where(first == t, base, steps[t - 1].exp)
        else:
            exp = carried_exp
        # From the true sums, so that any unit can be asked for: e^(unit + w - m[t]) and e^(unit - o[t]).
        asked = adjoint * _exp((exp - s.exp) + w) + out * _exp(exp - s.out_exp)
        if t:
            before_first = torch.where(first == t, asked, before_first)
            adjoint = adjoint * s.keep + out * s.past
        else:
            carried = asked
    return Adjoint(
        torch.stack(grads_k[::-1]), torch.stack(grads_v[::-1]), grad_w, grad_u, before_first, carried
    )


def sum_in_order(terms: tuple[Tensor, ...]) -> Tensor:
    """From first to last, where the order `Tensor.sum` takes depends on the shape: neighbours would have a say.

    A single term is returned as it is, not copied.
    """
    if len(terms) == 1:
        return terms[0]
    total = terms[0] + terms[1]
    for term in terms[2:]:
        total += term
    return total


def _exp(x: Tensor) -> Tensor:
    return torch.exp(x.clamp(max=700.0))
