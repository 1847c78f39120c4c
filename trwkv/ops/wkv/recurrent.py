"""Decoding: every token in turn, in one launch, the state in registers from the first to the last."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from trwkv.ops._dispatch import device_guard, is_approximate_reciprocal_available
from trwkv.ops._tuning import config_for
from trwkv.ops.wkv.chunk_fwd import exact_tile
from trwkv.ops.wkv.kernel_math import empty_state, load_user_state, load_vectors, store_user_state
from trwkv.ops.wkv.layout import by_channel, finish_output, kernel_layout, state_without_tokens

BLOCK_C = 32


@triton.jit
def wkv_recurrent_fwd_kernel(
    w,  # [P, C]
    u,  # [P, C]
    k,  # [B, T, C]
    v,  # [B, T, C]
    weights,  # [P, C] or [B, T, P]
    initial_state,  # [B, 3, P, C]
    final_state,  # [B, 3, P, C]
    output,  # [B, T, P, C] or [B, T, C]
    T,
    C: tl.constexpr,
    P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WEIGHTS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    APPROX: tl.constexpr,
):
    n_blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    c = (tl.program_id(0) % n_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    i_b = (tl.program_id(0) // n_blocks).to(tl.int64)
    vectors = load_vectors(w, u, c, C, P, BLOCK_C, 1)
    A, B, O = empty_state(P, BLOCK_C)
    if HAS_INITIAL:
        A, B, O = load_user_state(initial_state + i_b * (3 * P * C), c, C, P, BLOCK_C)
    for t in range(0, T):
        A, B, O = exact_tile(
            A, B, O, vectors, k, v, weights, output, i_b * T + t, 1, c,
            C, P, BLOCK_C, 1, WEIGHTS, True, APPROX,
        )  # fmt: skip
    store_user_state(final_state + i_b * (3 * P * C), c, A, B, O, C, P, BLOCK_C)


def recurrent_forward(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, weights: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Arguments and results as in `multi_perspective_wkv`, P axis present, validated."""
    config_for(w.shape[0])
    call = kernel_layout(w, u, k, v, weights, initial_state)
    B, T, P, C = call.sizes
    output = call.new_output()
    final_state = torch.empty(B, 3, P, C, dtype=torch.float32, device=k.device)
    if T == 0:
        final_state = state_without_tokens(call)
    elif B > 0:
        with device_guard(k.device):
            wkv_recurrent_fwd_kernel[(B * triton.cdiv(C, BLOCK_C),)](
                call.w, call.u, call.k, call.v, call.weights, call.initial_state, final_state, output, T,
                C=C, P=P, BLOCK_C=BLOCK_C, WEIGHTS=call.weights_kind,
                HAS_INITIAL=call.initial_state is not None,
                APPROX=is_approximate_reciprocal_available(), num_warps=1,
            )  # fmt: skip
    return finish_output(output, weights, v, call), by_channel(final_state, w.shape, back=True)
