"""Decoding: every token in turn, in one launch, the state in registers from the first to the last."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from trwkv.ops._dispatch import LAUNCH_OPTIONS, device_guard, is_inline_ptx_available
from trwkv.ops._tuning import config_for
from trwkv.ops.wkv.chunk_fwd import exact_tile
from trwkv.ops.wkv.kernel_math import empty_state, load_user_state, load_vectors, store_user_state, zeros
from trwkv.ops.wkv.kernel_rows import first_row, locate_sequence
from trwkv.ops.wkv.layout import finish_output, finish_state, kernel_layout, state_without_tokens

BLOCK_C = 32


@triton.jit(do_not_specialize_on_alignment=["T"])
def wkv_recurrent_fwd_kernel(
    w,  # [P, C]
    u,  # [P, C]
    k,  # [rows, C]: B T rows, or those of all packed sequences
    v,  # [rows, C]
    weights,  # [P, C] or [rows, P]
    receptance,  # as the output, if GATED
    initial_state,  # [N, 3, P, C]
    cu_seqlens,  # [N + 1] if VARLEN
    final_state,  # [N, 3, P, C]
    output,  # [rows, P, C] or [rows, C]
    T,
    C: tl.constexpr,
    P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WEIGHTS: tl.constexpr,
    VARLEN: tl.constexpr,
    REVERSE: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    GATED: tl.constexpr,
    PTX: tl.constexpr,
):
    n_blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    c = (tl.program_id(0) % n_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    STEP: tl.constexpr = -1 if REVERSE else 1
    i_s = (tl.program_id(0) // n_blocks).to(tl.int64)
    first, length = locate_sequence(cu_seqlens, i_s, T, VARLEN)
    row0 = first_row(first, length, REVERSE)
    vectors = load_vectors(w, u, c, C, P, BLOCK_C, 1)
    A, B, O = empty_state(P, BLOCK_C)
    if HAS_INITIAL:
        A, B, O = load_user_state(initial_state + i_s * (3 * P * C), c, C, P, BLOCK_C)
    rest = zeros(2 * P, BLOCK_C)
    for t in range(length):
        A, B, O, rest = exact_tile(
            A, B, O, rest, vectors, w, k, v, weights, receptance, (output, None), 0, row0 + t * STEP, 1, c,
            C, P, BLOCK_C, 1, STEP, WEIGHTS, 1, "only", "y", GATED, PTX,
        )  # fmt: skip
    store_user_state(final_state + i_s * (3 * P * C), c, A, B, O, C, P, BLOCK_C)


def recurrent_forward(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    *,
    receptance: Tensor | None = None,
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """Arguments and results as in `multi_perspective_wkv` and `gated_recurrent_wkv`, P axis present, validated.

    `in_place`: the final state replaces the initial one, which is contiguous and no other tensor's memory.
    """
    config_for(w.shape[0])
    call = kernel_layout(w, u, k, v, weights, initial_state, cu_seqlens, reverse)
    _, T, P, C = call.sizes
    N = call.n_sequences
    output = call.new_output()
    is_gated_here = receptance is not None and (k.ndim == 3 or weights is None)
    gate = receptance.contiguous() if is_gated_here else None
    if in_place:  # every program reads its part before it writes it
        final_state = call.initial_state
    else:
        final_state = torch.empty(N, 3, P, C, dtype=torch.float32, device=k.device)
    if T == 0:
        final_state = final_state if in_place else state_without_tokens(call)
    elif N > 0:
        with device_guard(k.device):
            wkv_recurrent_fwd_kernel[(N * triton.cdiv(C, BLOCK_C),)](
                call.w, call.u, call.k, call.v, call.weights, gate, call.initial_state, call.cu_seqlens,
                final_state, output, T,
                C=C, P=P, BLOCK_C=BLOCK_C, WEIGHTS=call.weights_kind, VARLEN=cu_seqlens is not None,
                REVERSE=reverse, HAS_INITIAL=call.initial_state is not None, GATED=gate is not None,
                PTX=is_inline_ptx_available(), **LAUNCH_OPTIONS,
            )  # fmt: skip
    output = finish_output(output, weights, v, call, None if is_gated_here else receptance)
    return output, finish_state(final_state, w.shape, call)
