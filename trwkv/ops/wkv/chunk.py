"""Host side of the chunk kernels: plans, allocates, launches."""

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from trwkv.ops._dispatch import (
    LAUNCH_OPTIONS,
    device_guard,
    has_packed_instructions,
    is_inline_ptx_available,
    lanes_of_a_warp,
    multiprocessors,
)
from trwkv.ops._tuning import SEGMENT, Config, chunk_length, config_for
from trwkv.ops.wkv.block_sums import wkv_block_sums_kernel
from trwkv.ops.wkv.chunk_adjoint import wkv_chunk_adjoint_kernel
from trwkv.ops.wkv.chunk_bwd import wkv_chunk_bwd_kernel
from trwkv.ops.wkv.chunk_fwd import wkv_chunk_fwd_kernel
from trwkv.ops.wkv.chunk_scan import wkv_chunk_bwd_scan_kernel, wkv_chunk_scan_kernel
from trwkv.ops.wkv.chunk_sums import wkv_chunk_sums_kernel
from trwkv.ops.wkv.layout import (
    KernelCall,
    aggregate_backward,
    by_channel,
    finish_output,
    finish_state,
    kernel_layout,
    state_without_tokens,
)

SCAN_AHEAD = 4
"""Chunks whose triples the scans load ahead of use."""
BLOCK_SUMS = 128
"""Elements of the gradient of [B, T, P] weights that a program sums up."""
MULTIPROCESSOR_REGISTERS = 65536
"""Of every NVIDIA GPU that Triton compiles for."""
FEW_WARPS = 8
"""With so many, or fewer, on a multiprocessor each may have all the registers that it can name."""


def chunk_forward(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    *,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(output, final state, checkpoint) for validated arguments, P axis present.

    The checkpoint, empty unless `save`, holds of every sequence the state before each SEGMENT tokens and the last one.
    """
    call = _layout(w, u, k, v, weights, initial_state, cu_seqlens, reverse)
    output = call.new_output()
    final_state, states = _launch_forward(call, output, "y", save)
    if states is None:
        states = k.new_empty(0, dtype=torch.float32)
    return finish_output(output, weights, v, call), finish_state(final_state, w.shape, call), states


def chunk_states(
    w: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """The state before every token, [B, 3, T, P, C], and the last one, for validated arguments, P axis present."""
    call = kernel_layout(w, torch.zeros_like(w), k, v, None, initial_state, cu_seqlens, reverse)
    B, T, P, C = call.sizes
    output = torch.empty(3, B, T, P, C, dtype=torch.float32, device=k.device)
    final_state, _ = _launch_forward(call, output, "states", save=False)
    return output.view(3, B, T, *w.shape).movedim(0, 1), finish_state(final_state, w.shape, call)


def empty_checkpoint(w: Tensor, k: Tensor, n_sequences: int | None) -> Tensor:
    B, T = k.shape[:2]
    P, C = w.shape
    per_channel = (P, C) if k.ndim == 3 else (1, P * C)
    return k.new_empty((_checkpoint_slots(B, T, n_sequences), 3, *per_channel), dtype=torch.float32)


def _segments(T: int) -> int:
    return (T + SEGMENT - 1) // SEGMENT


def _checkpoint_slots(B: int, T: int, n_sequences: int | None) -> int:
    return B * (_segments(T) + 1) if n_sequences is None else T // SEGMENT + 2 * n_sequences


class _Plan(NamedTuple):
    """How T is divided among programs."""

    block_c: int
    n_blocks: int
    chunk_len: int
    n_chunks: int  # of a row, unless sequences are packed
    programs: int  # along T, over all sequences
    is_single: bool  # every sequence is one chunk

    def first_programs(self, call: KernelCall) -> Tensor | slice:
        """Numbers of the programs along T that begin a sequence."""
        if self.is_single:
            return slice(None)
        if call.cu_seqlens is None:
            return slice(None, None, self.n_chunks)
        starts = call.cu_seqlens[:-1].long()
        return starts // self.chunk_len + torch.arange(len(starts), device=starts.device)


def _layout(w: Tensor, u: Tensor, k: Tensor, v: Tensor, *others: Any) -> KernelCall:
    if k.ndim == 3:
        return kernel_layout(w, u, k, v, *others)
    config = config_for(1, k)
    return kernel_layout(w, u, k, v, *others, block_c=max(config.fwd_block_c, config.bwd_block_c))


def _plan(config: Config, call: KernelCall, kernel: str) -> _Plan:
    """`kernel`: "forward", whose groups of channels are a launch each, or "backward"."""
    B, T, _, C = call.sizes
    N = call.n_sequences
    is_forward = kernel == "forward"
    block_c = config.block_c(kernel)
    columns = B * triton.cdiv(C // call.groups if is_forward else C, block_c)
    chunk_len = chunk_length(config, kernel, T, columns, multiprocessors(call.k.device))
    n_chunks = max(1, triton.cdiv(T, chunk_len))
    programs = B * n_chunks if call.cu_seqlens is None else T // chunk_len + N
    is_single = n_chunks == 1
    return _Plan(
        block_c, triton.cdiv(C, block_c), chunk_len, n_chunks, N if is_single else programs, is_single
    )


def _paired(call: KernelCall, block_c: int, *others: Tensor) -> str | None:
    """The dtype of k, v and others if they may be read as int32, two numbers each: every lane has two channels side by
    side.
    """
    tensors = (call.k, call.v, *others)
    is_paired = (
        len({x.dtype for x in tensors}) == 1
        and call.k.dtype.itemsize == 2
        and block_c >= 2 * lanes_of_a_warp(call.k.device)
        and call.sizes[3] % 2 == 0
        and has_packed_instructions(call.k.device)
        and all(x.data_ptr() % 4 == 0 for x in tensors)
    )
    return str(call.k.dtype).removeprefix("torch.") if is_paired else None


def _registers(warps: int) -> dict[str, int]:
    """Launch option: as many registers as that number of warps of a multiprocessor leave each. Without it ptxas may
    take fewer, for more warps than there are, and each then waits longer.
    """
    per_lane = MULTIPROCESSOR_REGISTERS // (32 * warps) // 8 * 8
    return {"maxnreg": min(255, per_lane)} if is_inline_ptx_available() else {}


def _group_name(group: int, groups: int) -> str:
    """Which part of a sum over groups the kernel is to take."""
    if groups == 1:
        return "only"
    return "first" if group == 0 else "last" if group == groups - 1 else "middle"


def _scan_sizes(call: KernelCall) -> dict[str, Any]:
    _, _, P, C = call.sizes
    block = max(32, lanes_of_a_warp(call.k.device))
    return {"LANES": P * C, "BLOCK": block, "AHEAD": SCAN_AHEAD, "VARLEN": call.cu_seqlens is not None}


def _launch_forward(call: KernelCall, output: Tensor, kind: str, save: bool) -> tuple[Tensor, Tensor | None]:
    """Final state (but of empty packed sequences) and, to `save`, the checkpoint. `kind` of output: "y" or "states"."""
    B, T, P, C = call.sizes
    N = call.n_sequences
    config = config_for(P, call.k)
    groups = call.groups
    plan = _plan(config, call, "forward")
    is_packed = call.cu_seqlens is not None

    def triples(n: int) -> Tensor:
        return torch.empty(n, 3, P, C, dtype=torch.float32, device=call.k.device)

    states = triples(_checkpoint_slots(B, T, N if is_packed else None)) if save else None
    if save and is_packed:
        states.zero_()  # not every slot is used, and what is returned is to be the same every time
    if N == 0 or T == 0:
        return state_without_tokens(call), states
    final_state = triples(N)
    chunks = None if plan.is_single else triples(plan.programs)

    partial = output
    if groups > 1 and output.dtype != torch.float32:
        partial = torch.empty_like(output, dtype=torch.float32)

    common: dict[str, Any] = dict(
        C=C, P=P, BLOCK_C=plan.block_c, BLOCK_T=config.fwd_block_t, VARLEN=is_packed, REVERSE=call.reverse,
        PAIRED=_paired(call, plan.block_c), PTX=is_inline_ptx_available(),
        **_registers(FEW_WARPS if plan.is_single else config.fwd_warps), **LAUNCH_OPTIONS,
    )  # fmt: skip
    with device_guard(call.k.device):
        if not plan.is_single:
            wkv_chunk_sums_kernel[(plan.n_blocks * plan.programs,)](
                call.w, call.k, call.v, call.cu_seqlens, chunks, T, plan.chunk_len, plan.n_chunks, N, **common
            )
            scan = _scan_sizes(call)
            wkv_chunk_scan_kernel[(triton.cdiv(P * C, scan["BLOCK"]) * N,)](
                call.w, call.initial_state, call.cu_seqlens, chunks, T, plan.chunk_len, plan.n_chunks,
                HAS_INITIAL=call.initial_state is not None, **scan, **LAUNCH_OPTIONS,
            )  # fmt: skip
        for group in range(groups):
            wkv_chunk_fwd_kernel[(plan.n_blocks // groups * plan.programs,)](
                call.w, call.u, call.k, call.v, call.weights, call.initial_state, call.cu_seqlens, chunks, states,
                final_state, output, partial, group, B * T * P * C, T, plan.chunk_len, plan.n_chunks, N,
                _segments(T) + 1, SEGMENT=SEGMENT, WEIGHTS=call.weights_kind, SINGLE=plan.is_single,
                HAS_INITIAL=call.initial_state is not None, OUTPUT=kind, SAVE=save, GROUPS=groups,
                GROUP=_group_name(group, groups), **common,
            )  # fmt: skip
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
    cu_seqlens: Tensor | None,
    reverse: bool,
    checkpoint: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of w, u, k, v, weights and initial_state, each in its input's dtype; `checkpoint` from the forward."""
    call = _layout(w, u, k, v, weights, initial_state, cu_seqlens, reverse)
    outside = weights is not None and call.weights is None  # the kernels did not see these weights
    grad_weights = None
    if outside:
        y = call.new_output()
        _launch_forward(call, y, "y", save=False)
        grad_weights, grad_output = aggregate_backward(grad_output, y.view(v.shape), weights)
    if grad_final_state is not None:
        grad_final_state = by_channel(grad_final_state) if k.ndim == 4 else grad_final_state
        grad_final_state = grad_final_state.float().contiguous()
    grads = _launch_backward(call, grad_output.contiguous(), grad_final_state, checkpoint)
    grad_w, grad_u, grad_channel_weights = (g.reshape(w.shape) for g in grads.vectors.unbind(0))
    if call.weights_kind == "channel":
        grad_weights = grad_channel_weights.sum(1) if weights.ndim == 1 else grad_channel_weights
    grad_initial = None
    if initial_state is not None:
        grad_initial = _initial_gradient(call, grads.adjoint, grad_final_state).reshape(initial_state.shape)
    return (  # copies: an operator's results must not share memory
        grad_w.to(w.dtype, copy=True),
        grad_u.to(u.dtype, copy=True),
        grads.k.view(k.shape),
        grads.v.view(v.shape),
        grads.weights if grad_weights is None else grad_weights.to(weights.dtype, copy=True),
        grad_initial,
    )


class _Gradients(NamedTuple):
    k: Tensor
    v: Tensor
    weights: Tensor | None  # [B, T, P], in their dtype
    vectors: Tensor  # of w, u and per-channel weights: [3, P, C]
    adjoint: Tensor  # of the initial states: [N, 3, P, C] as (a, b, O); undefined where a sequence is empty


def _launch_backward(
    call: KernelCall, grad_output: Tensor, grad_final_state: Tensor | None, states: Tensor
) -> _Gradients:
    B, T, P, C = call.sizes
    N = call.n_sequences
    device = call.k.device
    config = config_for(P, call.k)
    block_t = config.bwd_block_t
    plan = _plan(config, call, "backward")
    is_packed = call.cu_seqlens is not None
    is_token = call.weights_kind == "token"

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    grad_k, grad_v = torch.empty_like(call.k), torch.empty_like(call.v)
    grad_weights = torch.empty_like(call.weights) if is_token else None
    if N == 0 or T == 0:
        return _Gradients(grad_k, grad_v, grad_weights, floats(3, P, C).zero_(), floats(N, 3, P, C))
    shares = floats(plan.n_blocks, B, T, P) if is_token else None  # of the gradient of weights
    adjoints, vectors = floats(plan.programs, 3, P, C), floats(plan.programs, 3, P, C)
    if is_packed:
        vectors.zero_()  # programs without a chunk write none
    scratch = floats(plan.n_blocks * plan.programs, 3 * P * (SEGMENT // block_t + 1) + 1, plan.block_c)
    inputs = (call.w, call.u, call.k, call.v, call.weights, call.cu_seqlens)
    inputs += (grad_output, grad_final_state, states, adjoints, scratch)
    sizes = (T, plan.chunk_len, plan.n_chunks, N, _segments(T) + 1)
    options: dict[str, Any] = dict(
        C=C, P=P, BLOCK_C=plan.block_c, BLOCK_T=block_t, SEGMENT=SEGMENT, WEIGHTS=call.weights_kind,
        GROUPS=call.groups, VARLEN=is_packed, REVERSE=call.reverse, HAS_FINAL=grad_final_state is not None,
        PTX=is_inline_ptx_available(), **LAUNCH_OPTIONS,
    )  # fmt: skip
    if config.bwd_warps > FEW_WARPS:
        options |= _registers(config.bwd_warps)
    grid = (plan.n_blocks * plan.programs,)
    with device_guard(device):
        if not plan.is_single:
            wkv_chunk_adjoint_kernel[grid](
                *inputs, *sizes, PAIRED=_paired(call, plan.block_c, grad_output), **options
            )
            scan = _scan_sizes(call)
            wkv_chunk_bwd_scan_kernel[(triton.cdiv(P * C, scan["BLOCK"]) * N,)](
                call.w, call.cu_seqlens, adjoints, T, plan.chunk_len, plan.n_chunks, **scan, **LAUNCH_OPTIONS,
            )  # fmt: skip
        wkv_chunk_bwd_kernel[grid](
            *inputs, grad_k, grad_v, shares, vectors, B * T, *sizes,
            SINGLE=plan.is_single, PAIRED=_paired(call, plan.block_c), **options,
        )  # fmt: skip
        if grad_weights is not None:
            wkv_block_sums_kernel[(triton.cdiv(B * T * P, BLOCK_SUMS) * call.groups,)](
                shares, grad_weights, B * T, plan.n_blocks // call.groups,
                P=P, GROUPS=call.groups, BLOCK=BLOCK_SUMS, **LAUNCH_OPTIONS,
            )  # fmt: skip
    return _Gradients(
        grad_k,
        grad_v,
        grad_weights,
        vectors.sum(0),
        adjoints[plan.first_programs(call)],
    )


def _initial_gradient(call: KernelCall, adjoint: Tensor, grad_final_state: Tensor | None) -> Tensor:
    """Gradient of (num, den, exp) of the initial states, [N, 3, P, C]."""
    state = call.initial_state
    if call.sizes[1] == 0:
        return _passed_on(state, grad_final_state)
    grad = _state_gradient(state, adjoint)
    empty = call.empty_sequences()
    return grad if empty is None else torch.where(empty, _passed_on(state, grad_final_state), grad)


def _passed_on(state: Tensor, grad_final_state: Tensor | None) -> Tensor:
    """Gradient of the initial state when no token follows: the final state is a copy of it."""
    if grad_final_state is None:
        return torch.zeros_like(state)
    num, den, _ = state.unbind(1)
    grad_num, grad_den, _ = grad_final_state.unbind(1)
    return torch.stack([grad_num, grad_den, num * grad_num + den * grad_den], dim=1)


def _state_gradient(state: Tensor, adjoint: Tensor) -> Tensor:
    """Gradient of (num, den, exp) from the adjoint (a, b, O) of the true sums num * e^exp and den * e^exp."""
    num, den, exp = state.double().unbind(1)
    a, b, exponent = adjoint.double().unbind(1)
    # Not exp2: on a CPU its last bit depends on an element's place among the others.
    scale = torch.exp((exp - exponent * math.log(2.0)).clamp(max=126.0 * math.log(2.0)))
    grad_num, grad_den = a * scale, b * scale
    return torch.stack([grad_num, grad_den, num * grad_num + den * grad_den], dim=1).to(state.dtype)
