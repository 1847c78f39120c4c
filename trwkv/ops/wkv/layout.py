"""What the kernels read: contiguous tensors and shared k, v.

k and v of one perspective each, [B, T, P, C], are the shared form with a single perspective of P * C channels, in P
groups. Their weighted sum is taken by the chunk kernels where no block of channels belongs to two groups, otherwise
outside, from float32 outputs.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from trwkv.ops.wkv.reference import EMPTY_EXP, aggregate


@dataclass
class KernelCall:
    """One call as the kernels see it; `sizes` is (B, T, P, C) in that view."""

    w: Tensor
    u: Tensor
    k: Tensor
    v: Tensor
    weights: Tensor | None
    initial_state: Tensor | None
    cu_seqlens: Tensor | None  # on k's device
    reverse: bool
    sizes: tuple[int, int, int, int]
    weights_kind: str  # "none", "channel" ([P, C]) or "token" ([B, T, P])
    output_dtype: torch.dtype
    groups: int  # of channels, whose outputs are summed

    @property
    def n_sequences(self) -> int:
        return self.sizes[0] if self.cu_seqlens is None else self.cu_seqlens.numel() - 1

    def empty_sequences(self) -> Tensor | None:
        """Which packed sequences have no token, [N, 1, 1, 1]; None if there are none packed."""
        if self.cu_seqlens is None:
            return None
        return (self.cu_seqlens[1:] == self.cu_seqlens[:-1]).view(-1, 1, 1, 1)

    def new_output(self) -> Tensor:
        B, T, P, C = self.sizes
        shape = (B, T, P, C) if self.weights_kind == "none" else (B, T, C // self.groups)
        return torch.empty(shape, dtype=self.output_dtype, device=self.k.device)


def kernel_layout(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    *,
    block_c: int | None = None,
) -> KernelCall:
    """`block_c`: how many channels a program has, if it is one that can sum groups of them."""
    B, T = k.shape[:2]
    P, C = w.shape
    output_dtype = v.dtype
    kind = "none"
    groups = 1
    if k.ndim == 4 and weights is not None and (block_c is None or (P > 1 and C % block_c != 0)):
        weights, output_dtype = None, torch.float32
    if weights is not None:
        kind = "token" if weights.ndim == 3 else "channel"
        weights = (weights[:, None].expand(P, C) if weights.ndim == 1 else weights).contiguous()
    if k.ndim == 4:
        w, u = w.reshape(1, P * C), u.reshape(1, P * C)
        k, v = k.reshape(B, T, P * C), v.reshape(B, T, P * C)
        initial_state = by_channel(initial_state)
        groups = 1 if weights is None else P
        P, C = 1, P * C
    if initial_state is not None:
        initial_state = initial_state.contiguous()
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(k.device, non_blocking=True).contiguous()
    return KernelCall(
        w.contiguous(), u.contiguous(), k.contiguous(), v.contiguous(), weights, initial_state,
        cu_seqlens, reverse, (B, T, P, C), kind, output_dtype, groups,
    )  # fmt: skip


def by_channel(state: Tensor | None) -> Tensor | None:
    """A state [N, 3, P, C] as [N, 3, 1, P * C], the same memory."""
    return None if state is None else rearrange(state, "n s p c -> n s 1 (p c)")


def state_without_tokens(call: KernelCall) -> Tensor:
    """The final state of sequences without tokens: a copy of the initial one, or a fresh one."""
    if call.initial_state is not None:
        return call.initial_state.clone()
    _, _, P, C = call.sizes
    fresh = torch.zeros(call.n_sequences, 3, P, C, dtype=torch.float32, device=call.k.device)
    fresh[:, 2] = EMPTY_EXP
    return fresh


def finish_state(final_state: Tensor, shape: tuple[int, int], call: KernelCall) -> Tensor:
    """The final state as the caller wants it; the kernels leave those of empty sequences to this."""
    empty = call.empty_sequences()
    if empty is not None:
        final_state = torch.where(empty, state_without_tokens(call), final_state)
    return final_state.reshape(-1, 3, *shape)


def finish_output(
    output: Tensor, weights: Tensor | None, v: Tensor, call: KernelCall, receptance: Tensor | None = None
) -> Tensor:
    """The output as the caller wants it, from what the kernels wrote. `receptance`: for a sum taken here."""
    if v.ndim == 3 or call.weights_kind != "none":
        return output
    per_perspective = output.view(v.shape)
    if weights is None:
        return per_perspective
    total = aggregate(per_perspective, weights)
    if receptance is not None:
        total = total * torch.sigmoid(receptance.float())
    return total.to(v.dtype)


def aggregate_backward(grad_output: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the weights, and of y [B, T, P, C], from that of `aggregate(y, weights)`; float32."""
    g = grad_output.float().unsqueeze(2)
    reduced = {1: (0, 1, 3), 2: (0, 1), 3: (3,)}[weights.ndim]
    per_token = weights.float()[..., None] if weights.ndim != 2 else weights.float()
    return (g * y).sum(reduced), g * per_token
