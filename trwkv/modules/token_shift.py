"""Token shift: each token sees itself and the token before it, mixed per channel."""

from collections.abc import Sequence

import torch
from torch import Tensor

from trwkv.ops._dispatch import resolve_backend
from trwkv.ops._library import is_plain_inference
from trwkv.ops.token_shift_mix.api import token_shift_mix_op
from trwkv.ops.token_shift_mix.plain import time_mix, token_shift, token_shift_mix_plain

__all__ = ["absent", "last_token", "shift_and_mix", "time_mix", "token_shift"]


def shift_and_mix(
    x: Tensor, mixes: Sequence[Tensor], previous: Tensor | None, cu_seqlens: Tensor | None, backend: str
) -> Sequence[Tensor]:
    """`trwkv.ops.token_shift_mix` for a layer whose backend is `backend`.

    The kernel where that is "triton" and no gradient is wanted; plain PyTorch elsewhere, for packed sequences, and in
    `torch.compile`, which makes one kernel of it and of what is around it.
    """
    if previous is not None:
        previous = previous.to(x.dtype)
    is_packed = cu_seqlens is not None
    is_kernel_wanted = (
        not is_packed and not torch.compiler.is_compiling() and is_plain_inference(x, *mixes, previous)
    )
    if is_kernel_wanted and resolve_backend(backend, x.device, x.dtype) == "triton":
        return token_shift_mix_op(x, mixes, previous)
    return token_shift_mix_plain(x, mixes, previous, cu_seqlens)


def last_token(x: Tensor, previous: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """What `token_shift` of the next tokens takes for `previous`: the last of x, or `previous` where x has none.

    With cu_seqlens that of each packed sequence, [N, ...].
    """
    if cu_seqlens is None and x.shape[1] > 0:
        return x[:, -1].clone()  # a view would keep the whole sequence alive
    n_sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    without = x.new_zeros(n_sequences, *x.shape[2:]) if previous is None else previous
    if cu_seqlens is None or x.shape[1] == 0:
        return without
    ends = cu_seqlens.to(x.device, non_blocking=True).long()
    is_empty = (ends[1:] == ends[:-1]).view(-1, *[1] * (x.ndim - 2))
    return torch.where(is_empty, without.to(x.dtype), x[0, (ends[1:] - 1).clamp(0, x.shape[1] - 1)])


def absent(mask: Tensor, ndim: int) -> Tensor:
    """Where a bool mask [B, T] has no token, with axes of size one added up to `ndim`."""
    return ~mask.reshape(*mask.shape, *[1] * (ndim - 2))
