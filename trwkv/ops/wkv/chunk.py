"""Host side of the chunk kernels: plans, allocates, launches."""

import torch
import triton
from torch import Tensor

from trwkv.ops._dispatch import device_guard, is_approximate_reciprocal_available
from trwkv.ops._tuning import SEGMENT, chunk_length, config_for
from trwkv.ops.wkv.chunk_fwd import wkv_chunk_fwd_kernel, wkv_chunk_scan_kernel
from trwkv.ops.wkv.layout import KernelCall, by_channel, finish_output, kernel_layout


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
    if B == 0:
        return final_state, states
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
