"""Chunked PyTorch backend with packed sequences and direction, around the dense functions of `torch_chunk`.

Packed sequences of one length are one batch of a dense call: a view of the tokens where they lie one after another,
gathered otherwise. Batch rows are independent to the bit there, so packed equals separate. Running in reverse is
running the flipped tokens. `bounds`: cu_seqlens as a list, checked; None: every batch row is a sequence.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from trwkv.ops.wkv import torch_chunk, torch_states
from trwkv.ops.wkv.torch_chunk_block import CHUNK
from trwkv.ops.wkv.torch_chunk_bwd import add_gradients, empty_gradients


class _Group(NamedTuple):
    """M sequences of one length."""

    which: Tensor  # [M], rising
    length: int
    reverse: bool
    start: int  # first token of the first
    tokens: Tensor | None  # [M, length], in running order; None: they lie one after another from `start` on
    slots: Tensor  # [M, K], where their checkpoints are

    def take(self, x: Tensor) -> Tensor:
        """Per-token x [1, T, ...] -> [M, length, ...], in running order."""
        if self.tokens is not None:
            return x[0][self.tokens]
        M = len(self.which)
        part = x[0, self.start : self.start + M * self.length].unflatten(0, (M, self.length))
        return part.flip(1) if self.reverse else part

    def put(self, x: Tensor, part: Tensor) -> None:
        """The inverse of `take`: writes into x."""
        if self.tokens is not None:
            x[0][self.tokens] = part
        else:
            place = self._replace(reverse=False).take(x)
            place.copy_(part.flip(1) if self.reverse else part)

    def inputs(
        self, k: Tensor, v: Tensor, weights: Tensor | None, initial_state: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        return (
            self.take(k),
            self.take(v),
            self.take(weights) if weights is not None and weights.ndim == 3 else weights,
            None if initial_state is None else initial_state[self.which],
        )


def _groups(bounds: list[int], reverse: bool, device: torch.device) -> list[_Group]:
    """All sequences, by length: as many groups as there are different lengths."""
    ends = torch.tensor(bounds)
    starts, lengths = ends[:-1], ends.diff()
    order = lengths.argsort(stable=True)
    values, counts = lengths[order].unique_consecutive(return_counts=True)
    groups = []
    for length, which in zip(values.tolist(), order.split(counts.tolist()), strict=True):
        first = starts[which]
        start, last = int(first[0]), int(first[-1])
        tokens = None
        if last - start != (len(which) - 1) * length:
            steps = torch.arange(length)
            tokens = (first[:, None] + (steps.flip(0) if reverse else steps)).to(device)
        # A sequence from b to e keeps ceil((e - b) / CHUNK) + 1 states. The next one's slots begin
        # e // CHUNK - b // CHUNK + 2 > (e - b) / CHUNK + 1 later, so at least that many.
        slots = (first // CHUNK + 2 * which)[:, None] + torch.arange(-(-length // CHUNK) + 1)
        groups.append(_Group(which.to(device), length, reverse, start, tokens, slots.to(device)))
    return groups


def _flip(x: Tensor | None) -> Tensor | None:
    """Per-token x back to front, what is not per token as it is."""
    return x if x is None or x.ndim < 3 else x.flip(1)


def empty_checkpoint(w: Tensor, k: Tensor, n_sequences: int | None) -> Tensor:
    """Tensor of the checkpoint's shape, dtype and device; T may be symbolic. That of packed sequences is zero, since
    not all of it is used."""
    if n_sequences is None:
        return torch_chunk.empty_checkpoint(w, k)
    P, C = (1, w.shape[0] * w.shape[1]) if k.ndim == 4 else w.shape
    dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
    return k.new_zeros((k.shape[1] // CHUNK + 2 * n_sequences, 3, P, 1, C), dtype=dtype)


def chunk_forward(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor | None,
    initial_state: Tensor | None,
    bounds: list[int] | None,
    reverse: bool,
    *,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, final state and, if `save`, the checkpoint for `chunk_backward`, else an empty tensor."""
    if bounds is None:
        if not reverse:
            return torch_chunk.chunk_forward(w, u, k, v, weights, initial_state, save=save)
        output, final_state, checkpoint = torch_chunk.chunk_forward(
            w, u, k.flip(1), v.flip(1), _flip(weights), initial_state, save=save
        )
        return output.flip(1), final_state, checkpoint
    return _packed_forward(w, u, k, v, weights, initial_state, bounds, reverse, save)


@torch.no_grad()
def _packed_forward(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor | None,
    initial_state: Tensor | None,
    bounds: list[int],
    reverse: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    N = len(bounds) - 1
    output = v.new_empty((1, k.shape[1], *w.shape[weights is not None :]))
    final_state = _empty_states(w, k, N)
    checkpoint = empty_checkpoint(w, k, N) if save else k.new_empty(0, dtype=torch.float32)
    for group in _groups(bounds, reverse, k.device):
        part, state, saved = torch_chunk.chunk_forward(
            w, u, *group.inputs(k, v, weights, initial_state), save=save
        )
        group.put(output, part)
        final_state[group.which] = state
        if save:
            checkpoint[:, :, :, 0][group.slots] = saved.movedim(3, 0)
    return output, final_state, checkpoint


def _empty_states(w: Tensor, k: Tensor, N: int) -> Tensor:
    dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
    return k.new_empty((N, 3, *w.shape), dtype=dtype)


def chunk_backward(
    grad_output: Tensor,
    grad_final_state: Tensor | None,
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor | None,
    initial_state: Tensor | None,
    bounds: list[int] | None,
    reverse: bool,
    checkpoint: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of w, u, k, v, weights and initial_state, each in its input's dtype, None where the input is None."""
    if bounds is None:
        if not reverse:
            return torch_chunk.chunk_backward(
                grad_output, grad_final_state, w, u, k, v, weights, initial_state, checkpoint
            )
        grads = torch_chunk.chunk_backward(
            grad_output.flip(1), grad_final_state, w, u, k.flip(1), v.flip(1), _flip(weights), initial_state,
            checkpoint,
        )  # fmt: skip
        grad_w, grad_u, grad_k, grad_v, grad_weights, grad_state = grads
        return grad_w, grad_u, grad_k.flip(1), grad_v.flip(1), _flip(grad_weights), grad_state
    return _packed_backward(
        grad_output, grad_final_state, w, u, k, v, weights, initial_state, bounds, reverse, checkpoint
    )


@torch.no_grad()
def _packed_backward(
    grad_output: Tensor,
    grad_final_state: Tensor | None,
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor | None,
    initial_state: Tensor | None,
    bounds: list[int],
    reverse: bool,
    checkpoint: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    total = empty_gradients(w, k, v, weights)
    grad_state = None if initial_state is None else initial_state.new_empty(initial_state.shape)
    for group in _groups(bounds, reverse, k.device):
        inputs = group.inputs(k, v, weights, initial_state)
        grads = empty_gradients(w, *inputs[:3])._replace(w=total.w, u=total.u)
        if weights is not None and weights.ndim < 3:
            grads = grads._replace(weights=total.weights)
        here = None if grad_final_state is None else grad_final_state[group.which]
        saved = checkpoint[:, :, :, 0][group.slots].movedim(0, 3)
        state = add_gradients(grads, group.take(grad_output), here, w, u, *inputs, saved)
        for whole, part in zip(total[2:], grads[2:], strict=True):
            if whole is not None and part is not None and part is not whole:
                group.put(whole, part)
        if grad_state is not None and state is not None:
            grad_state[group.which] = state
    return (*total.rounded(w, u, weights), grad_state)


@torch.no_grad()
def chunk_states(
    w: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: Tensor | None,
    bounds: list[int] | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """The state every token sees, [B, 3, T, P, C] as a view of [3, B, T, P, C], and the final state."""
    if bounds is None:
        if not reverse:
            return torch_states.chunk_states(w, k, v, initial_state)
        states, final_state = torch_states.chunk_states(w, k.flip(1), v.flip(1), initial_state)
        return states.flip(2), final_state
    final_state = _empty_states(w, k, len(bounds) - 1)
    planes = final_state.new_empty((3, *k.shape[:2], *w.shape))
    for group in _groups(bounds, reverse, k.device):
        k_part, v_part, _, state = group.inputs(k, v, None, initial_state)
        states, final_state[group.which] = torch_states.chunk_states(w, k_part, v_part, state)
        for plane, part in zip(planes, states.unbind(1), strict=True):
            group.put(plane, part)
    return planes.movedim(0, 1), final_state
