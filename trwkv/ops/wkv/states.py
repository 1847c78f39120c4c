"""Unnormalised access: the operator `trwkv::wkv_states`, its gradient, and how states are added.

With S_t = (A_t, B_t) the sums before token t, in running order, S_{t+1} = W S_t + e_t (v_t, 1), and g_t the
derivative by S_t, the adjoint L_t of S_t obeys L_t = g_t + W L_{t+1}, and

    dv_t = e_t LA_{t+1}        dk_t = e_t (v_t LA_{t+1} + LB_{t+1})        dw = sum_t W (LA_{t+1} A_t + LB_{t+1} B_t)

L_{t+1} is itself a sum over what comes before token t when one runs the other way, with weights e^-exp_s (g_s is given
in units of e^exp_s) and values (dnum_s, dden_s). So the gradient of the op is the op, reversed, on numerators alone.
"""

import torch
from torch import Tensor

from trwkv.ops._library import differentiable
from trwkv.ops.wkv.autograd import chunk_backend, fake_state, sequences_for
from trwkv.ops.wkv.reference import EMPTY_EXP

_NEGLIGIBLE = -1e6  # log weight of a token that must not count

torch.library.define(
    "trwkv::wkv_states",
    "(Tensor w, Tensor k, Tensor v, Tensor? initial_state, Tensor? cu_seqlens, bool reverse, str backend)"
    " -> (Tensor, Tensor)",
)


@torch.library.impl("trwkv::wkv_states", "CompositeExplicitAutograd")
def _states(w, k, v, initial_state, cu_seqlens, reverse, backend):
    sequences = sequences_for(cu_seqlens, k, backend)
    return chunk_backend(backend).chunk_states(w, k, v, initial_state, sequences, reverse)


@torch.library.register_fake("trwkv::wkv_states")
def _states_fake(w, k, v, initial_state, cu_seqlens, reverse, backend):
    final_state = fake_state(w, k, cu_seqlens)
    planes = final_state.new_empty((3, *k.shape[:2], *w.shape))
    return planes.movedim(0, 1), final_state


def merge_states(states: tuple[Tensor, ...]) -> Tensor:
    """The sum of states [..., 3, ...] along axis 1, in units of the largest: no exponential overflows."""
    num, den, exp = torch.stack(states).unbind(2)
    size = torch.where(den == 0, num, den).detach().abs()
    mass = torch.where(size > 0, exp.detach() + size.clamp(min=torch.finfo(exp.dtype).tiny).log(), EMPTY_EXP)
    top = mass.amax(0)
    limit = 88.0 if exp.dtype == torch.float32 else 709.0  # a larger factor can only belong to an empty state
    scale = torch.exp((exp.double() - top.double()).clamp(max=limit)).to(exp.dtype)
    return torch.stack([(num * scale).sum(0), (den * scale).sum(0), top], dim=1)


def _setup_context(ctx, inputs, output):
    w, k, v, initial_state, cu_seqlens, ctx.reverse, ctx.backend = inputs
    ctx.save_for_backward(w, k, v, initial_state, cu_seqlens, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_states, grad_final_state):
    w, k, v, initial_state, cu_seqlens, states, final_state = ctx.saved_tensors
    if grad_states is None and grad_final_state is None:
        return (None,) * 7
    grad_states = torch.zeros_like(states) if grad_states is None else grad_states
    num, den, exp = states.unbind(1)
    exp = exp.detach()  # a constant of the representation
    a, b, unit, start = _adjoint(ctx, w, cu_seqlens, grad_states, grad_final_state, exp, final_state)

    k64, v64 = (x.double() if x.ndim == 4 else x.double().unsqueeze(2) for x in (k, v))
    weight = _exp(k64 + unit)
    grad_v = weight * a
    grad_k = weight * (v64 * a + b)
    if k.ndim == 3:
        grad_k, grad_v = grad_k.sum(2), grad_v.sum(2)
    grad_w = (_exp(w.double() + exp.double() + unit) * (a * num + b * den)).sum((0, 1))
    grad_initial = None
    if initial_state is not None:
        grad_initial = _initial_gradient(initial_state, start, states, grad_states, cu_seqlens, ctx.reverse)
    return grad_w.to(w.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), grad_initial, None, None, None


def _adjoint(ctx, w, cu_seqlens, grad_states, grad_final_state, exp, final_state):
    """LA and LB after every token, in units of e^unit, [B, T, P, C] in float64; and L at the start, [N, 3, P, 2 C]."""
    T = exp.shape[1]
    is_first = torch.zeros(T + 1, dtype=torch.bool, device=exp.device)
    is_first = is_first.index_fill(0, _first_tokens(T, cu_seqlens, ctx.reverse, exp.device), True)
    is_first = is_first[
        :T, None, None
    ]  # their states stand for the initial ones: `_initial_gradient` adds them
    log_weight = torch.where(is_first, _NEGLIGIBLE, -exp)
    values = torch.cat([x.masked_fill(is_first, 0) for x in grad_states[:, :2].unbind(1)], dim=-1)
    end = None
    if grad_final_state is not None:
        sums = torch.cat(grad_final_state[:, :2].unbind(1), dim=-1)
        end = torch.stack([sums, torch.ones_like(sums), -_twice(final_state[:, 2].detach())], dim=1)
    adjoint, start = wkv_states(
        _twice(w), _twice(log_weight), values, end, cu_seqlens, not ctx.reverse, ctx.backend
    )
    value, _, unit = adjoint.double().unbind(1)
    a, b = value.chunk(2, dim=-1)
    return a, b, unit.detach().chunk(2, dim=-1)[0], start


def _initial_gradient(initial_state, start, states, grad_states, cu_seqlens, reverse):
    """Gradient of (num, den, exp): by the first tokens' states, which stand for the initial ones, and by the later."""
    num, den, exp = initial_state.double().unbind(1)
    value, _, unit = start.double().unbind(1)
    grads = torch.stack(value.chunk(2, dim=-1)) * _exp(exp + unit.detach().chunk(2, dim=-1)[0])
    T = states.shape[2]
    if T > 0:
        first = _first_tokens(T, cu_seqlens, reverse, states.device).clamp(max=T - 1)
        seen, direct = (
            x.index_select(2, first).movedim(2, 1).flatten(0, 1).double() for x in (states, grad_states)
        )
        ratio = _exp(exp - seen[:, 2].detach())  # of the two ways to write the same sums
        ratio = torch.where((seen[:, :2] == 0).all(1), 1.0, ratio)
        direct = direct[:, :2].movedim(1, 0) * ratio
        if cu_seqlens is not None:
            direct = torch.where(
                (cu_seqlens[1:] > cu_seqlens[:-1]).to(direct.device, non_blocking=True)[:, None, None],
                direct,
                0.0,
            )
        grads = grads + direct
    limit = torch.finfo(
        initial_state.dtype
    ).max  # an absent state of large exponent has a gradient beyond any range
    grad_num, grad_den = grads.clamp(-limit, limit)
    grad = torch.stack([grad_num, grad_den, num * grad_num + den * grad_den], dim=1)
    return grad.clamp(-limit, limit).to(initial_state.dtype)


def _first_tokens(T, cu_seqlens, reverse, device):
    """Index of each sequence's first token in running order, of all rows alike; that of an empty one means nothing."""
    if cu_seqlens is None:
        return torch.full((1,), T - 1 if reverse else 0, device=device) % (T + 1)
    return (cu_seqlens[1:] - 1 if reverse else cu_seqlens[:-1]).long().to(device, non_blocking=True) % (T + 1)


def _twice(x):
    return torch.cat([x, x], dim=-1)


def _exp(x):
    return torch.exp(x.clamp(max=700.0))


wkv_states = differentiable("wkv_states", _setup_context, _backward)
