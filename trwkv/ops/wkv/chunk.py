"""Host side of the chunk kernels: plans, allocates, launches."""

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from trwkv.ops._dispatch import device_guard, is_approximate_reciprocal_available
from trwkv.ops._tuning import SEGMENT, chunk_length, config_for
from trwkv.ops.wkv.chunk_bwd import wkv_chunk_bwd_kernel, wkv_chunk_bwd_scan_kernel
from trwkv.ops.wkv.chunk_fwd import wkv_chunk_fwd_kernel, wkv_chunk_scan_kernel
from trwkv.ops.wkv.layout import (
    KernelCall,
    aggregate_backward,
    by_channel,
    finish_output,
    kernel_layout,
    state_without_tokens,
)


def chunk_forward(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor | None,
    initial_state: Tensor | None,
    *,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(output, final state, checkpoint) for validated arguments, P axis present.

    The checkpoint, empty unless `save`, holds the state before every SEGMENT tokens and the last one.
    """
    call = kernel_layout(w, u, k, v, weights, initial_state)
    output = call.new_output()
    final_state, states = _launch_forward(call, output, save)
    if not save:
        states = k.new_empty(0, dtype=torch.float32)
    return finish_output(output, weights, v, call), by_channel(final_state, w.shape, back=True), states


def empty_checkpoint(w: Tensor, k: Tensor) -> Tensor:
    B, T = k.shape[:2]
    P, C = w.shape
    per_channel = (P, C) if k.ndim == 3 else (1, P * C)
    return k.new_empty((B, _segments(T) + 1, 3, *per_channel), dtype=torch.float32)


def _segments(T: int) -> int:
    return (T + SEGMENT - 1) // SEGMENT


def _launch_forward(call: KernelCall, output: Tensor, save: bool) -> tuple[Tensor, Tensor]:
    B, T, P, C = call.sizes
    config = config_for(P)
    block_c = config.fwd_block_c
    chunk_len = chunk_length(config, B, T, C, block_c)
    n_chunks = max(1, triton.cdiv(T, chunk_len))
    slots_per_chunk = chunk_len // SEGMENT if save else 1
    slots = _segments(T) + 1 if save else n_chunks
    states = torch.empty(B, slots, 3, P, C, dtype=torch.float32, device=call.k.device)
    final_state = torch.empty(B, 3, P, C, dtype=torch.float32, device=call.k.device)
    n_blocks = triton.cdiv(C, block_c)
    if B == 0 or T == 0:
        return state_without_tokens(call), states
    has_initial = call.initial_state is not None

    def walk(is_output: bool) -> None:
        wkv_chunk_fwd_kernel[(n_blocks * n_chunks * B,)](
            call.w, call.u, call.k, call.v, call.weights, call.initial_state, states, final_state, output,
            T, chunk_len, n_chunks, slots, slots_per_chunk,
            C=C, P=P, BLOCK_C=block_c, BLOCK_T=config.fwd_block_t, SEGMENT=SEGMENT,
            WEIGHTS=call.weights_kind, HAS_INITIAL=has_initial, OUTPUT=is_output, SAVE=save and is_output,
            APPROX=is_approximate_reciprocal_available(), num_warps=1,
        )  # fmt: skip

    with device_guard(call.k.device):
        if n_chunks > 1:
            walk(is_output=False)
            wkv_chunk_scan_kernel[(n_blocks * B,)](
                call.w, call.initial_state, states, chunk_len, n_chunks, slots, slots_per_chunk,
                C=C, P=P, BLOCK_C=block_c, HAS_INITIAL=has_initial, num_warps=1,
            )  # fmt: skip
        walk(is_output=True)
    return final_state, states


def chunk_backward(
    grad_output: Tensor,
    grad_final_state: Tensor | None,
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor | None,
    initial_state: Tensor | None,
    checkpoint: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of w, u, k, v, weights and initial_state, each in its input's dtype; `checkpoint` from the forward."""
    call = kernel_layout(w, u, k, v, weights, initial_state)
    outside = k.ndim == 4 and weights is not None  # the kernels did not see these weights
    grad_weights = None
    if outside:
        y = _launch_outputs(call)
        grad_weights, grad_output = aggregate_backward(grad_output, y.view(v.shape), weights)
    if grad_final_state is not None:
        grad_final_state = by_channel(grad_final_state, w.shape) if k.ndim == 4 else grad_final_state
        grad_final_state = grad_final_state.float().contiguous()
    grads = _launch_backward(call, grad_output.contiguous(), grad_final_state, checkpoint)
    grad_w, grad_u, grad_channel_weights = (g.reshape(w.shape) for g in grads.vectors.unbind(0))
    if call.weights_kind == "token":
        grad_weights = grads.weights
    elif call.weights_kind == "channel":
        grad_weights = grad_channel_weights.sum(1) if weights.ndim == 1 else grad_channel_weights
    grad_initial = None
    if initial_state is not None and k.shape[1] == 0:
        grad_initial = _passed_on(initial_state, grad_final_state)
    elif initial_state is not None:
        grad_initial = _state_gradient(call.initial_state, grads.adjoint).reshape(initial_state.shape)
    return (
        grad_w.to(w.dtype),
        grad_u.to(u.dtype),
        grads.k.view(k.shape),
        grads.v.view(v.shape),
        None if weights is None else grad_weights.to(weights.dtype),
        grad_initial,
    )


def _passed_on(state: Tensor, grad_final_state: Tensor | None) -> Tensor:
    """Gradient of the initial state when no token follows: the final state is a copy of it."""
    if grad_final_state is None:
        return torch.zeros_like(state)
    num, den, _ = state.unbind(1)
    grad_num, grad_den, _ = grad_final_state.reshape(state.shape).unbind(1)
    return torch.stack([grad_num, grad_den, num * grad_num + den * grad_den], dim=1)


def _launch_outputs(call: KernelCall) -> Tensor:
    output = call.new_output()
    _launch_forward(call, output, save=False)
    return output


class _Gradients(NamedTuple):
    k: Tensor
    v: Tensor
    weights: Tensor | None  # [B, T, P]
    vectors: Tensor  # of w, u and per-channel weights: [3, P, C]
    adjoint: Tensor  # of the initial state: [B, 3, P, C] as (a, b, O)


def _launch_backward(
    call: KernelCall, grad_output: Tensor, grad_final_state: Tensor | None, states: Tensor
) -> _Gradients:
    B, T, P, C = call.sizes
    device = call.k.device
    config = config_for(P)
    block_c, block_t = config.bwd_block_c, config.bwd_block_t
    chunk_len = chunk_length(config, B, T, C, block_c)
    n_chunks = max(1, triton.cdiv(T, chunk_len))
    n_blocks = triton.cdiv(C, block_c)
    programs = n_blocks * n_chunks * B
    is_token = call.weights_kind == "token"

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    grad_k, grad_v = torch.empty_like(call.k), torch.empty_like(call.v)
    grad_weights = floats(n_blocks, B, T, P) if is_token else None
    adjoints, vectors = floats(B, n_chunks, 3, P, C), floats(B, n_chunks, 3, P, C)
    if programs == 0 or T == 0:
        empty_weights = floats(B, T, P) if is_token else None
        return _Gradients(grad_k, grad_v, empty_weights, floats(3, P, C).zero_(), adjoints[:, 0])
    scratch = floats(programs, SEGMENT // block_t, 3, P, block_c)

    def walk(is_grads: bool) -> None:
        wkv_chunk_bwd_kernel[(programs,)](
            call.w, call.u, call.k, call.v, call.weights, grad_output, grad_final_state, states, adjoints, scratch,
            grad_k, grad_v, grad_weights, vectors, T, chunk_len, n_chunks, states.shape[1],
            C=C, P=P, BLOCK_C=block_c, BLOCK_T=block_t, SEGMENT=SEGMENT, WEIGHTS=call.weights_kind,
            HAS_FINAL=grad_final_state is not None, GRADS=is_grads,
            APPROX=is_approximate_reciprocal_available(), num_warps=1,
        )  # fmt: skip

    with device_guard(device):
        if n_chunks > 1:
            walk(is_grads=False)
            wkv_chunk_bwd_scan_kernel[(n_blocks * B,)](
                call.w, adjoints, chunk_len, n_chunks, C=C, P=P, BLOCK_C=block_c, num_warps=1
            )
        walk(is_grads=True)
    return _Gradients(
        grad_k,
        grad_v,
        grad_weights.sum(0) if is_token else None,
        vectors.sum((0, 1)),
        adjoints[:, 0],
    )


def _state_gradient(state: Tensor, adjoint: Tensor) -> Tensor:
    """Gradient of (num, den, exp) from the adjoint (a, b, O) of the true sums num * e^exp and den * e^exp."""
    num, den, exp = state.double().unbind(1)
    a, b, exponent = adjoint.double().unbind(1)
    scale = torch.exp2((exp / math.log(2.0) - exponent).clamp(max=126.0))
    grad_num, grad_den = a * scale, b * scale
    return torch.stack([grad_num, grad_den, num * grad_num + den * grad_den], dim=1).to(state.dtype)
