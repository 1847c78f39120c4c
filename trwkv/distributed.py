"""Sequence parallelism: one sequence over several processes, each of which holds a stretch of its tokens.

    torchrun --nproc-per-node 4 train.py

    # in train.py, with k and v the tokens of this process
    y, state = sequence_parallel_wkv(w, u, k, v, weights=weights)
    x_before = previous_token(x)  # for the token shift, which looks one token back

The processes of a group hold the stretches in the order of their ranks, of any lengths, none included. Only states
[B, 3, P, C] travel, and on the way back their gradients: nothing that grows with T. Each process computes what its
tokens add to an empty state; these states are gathered; each process then runs the op from the state before its first
token. The backward does the same with the gradients of these states. That is the op twice, and its backward twice, all
processes at once, where a single process would run them once.

Every process of the group must make the same calls, forward and backward. A process that fails is an error in the
others: at once or when the group's timeout (`init_process_group(timeout=...)`) has passed, as its backend has it.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from trwkv.ops import WkvOutput, merge_wkv_states, multi_perspective_wkv
from trwkv.ops.wkv.reference import EMPTY_EXP

__all__ = ["previous_token", "sequence_parallel_wkv"]


def sequence_parallel_wkv(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    weights: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    group: "dist.ProcessGroup | None" = None,
    backend: str = "auto",
) -> WkvOutput:
    """`multi_perspective_wkv` of a sequence whose tokens are spread over the processes of a group.

    Args:
        w, u: [P, C] or [C], the same in every process.
        k, v: this process's tokens, [B, T, C] or [B, T, P, C], in the order of the ranks; T may differ, and be 0.
        weights: as in the op; [B, T, P] are those of this process's tokens.
        initial_state: of the sequence, given to the process that comes first (rank 0, or the last one with `reverse`)
            and to no other.
        output_final_state, reverse, backend: as in the op.
        group: a process group whose backend can gather tensors of the device; None is the default group.

    Returns:
        WkvOutput(output, final_state): the outputs of this process's tokens, and the state after the last of them, from
        which its gradient reaches all tokens before. The state of the process that comes last is the sequence's.

    Gradients are those of the sum of all processes' losses. Those of k, v and weights [B, T, P] are whole; those of
    what the processes share (w, u and weights [P], [P, C]) are this process's part: add them up, as data parallelism
    does (it divides them by the number of processes as well). The results are those of one process to float32
    rounding. Second order is not available.

    Raises:
        ValueError: an initial state given to another process than the first; else as `multi_perspective_wkv`.
        RuntimeError: torch.distributed is not initialised, or a process of the group has failed.
    """
    _require_process_group()
    rank, n_ranks = dist.get_rank(group), dist.get_world_size(group)
    position = n_ranks - 1 - rank if reverse else rank
    if initial_state is not None and position > 0:
        first = n_ranks - 1 if reverse else 0
        raise ValueError(
            f"initial_state: expected None in all processes but that of rank {first}; got one in rank {rank}"
        )
    stretch = _Stretch(position, reverse, group, backend, torch.is_grad_enabled())
    output, final_state = _SequenceParallel.apply(stretch, w, u, k, v, weights, initial_state)
    return WkvOutput(output, final_state if output_final_state else None)


def previous_token(
    x: Tensor,
    initial: Tensor | None = None,
    *,
    reverse: bool = False,
    group: "dist.ProcessGroup | None" = None,
) -> Tensor:
    """The token before this process's first one, for a token shift across the boundaries.

    Args:
        x: this process's tokens, [B, T, ...], in the order of the ranks; T may differ, and be 0.
        initial: what comes before the whole sequence, [B, ...], the same in every process; None is zeros.
        reverse: the token after this process's last one instead, for a shift that looks ahead.
        group: as in `sequence_parallel_wkv`.

    Returns: [B, ...], the last token of the nearest process before that has one. Its gradient reaches that process.
    """
    _require_process_group()
    T = x.shape[1]
    initial = torch.zeros_like(x[:, :1]).sum(1) if initial is None else initial
    last = x[:, 0 if reverse else -1] if T else x.sum(1)  # of none, but with a gradient, as everywhere
    tokens = _gather(last, group)
    lengths = [int(n) for n in _all_gather(torch.tensor(T, device=x.device), group)]
    rank = dist.get_rank(group)
    before = range(rank + 1, len(lengths)) if reverse else range(rank - 1, -1, -1)
    source = next((i for i in before if lengths[i] > 0), None)
    # the gathered tokens take part in every process, so that all of them gather the gradients
    everything = torch.cat([tokens, initial.unsqueeze(0)])
    return everything[len(lengths) if source is None else source]


def _require_process_group() -> None:
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "torch.distributed: expected an initialised process group; call torch.distributed.init_process_group "
            "(torchrun starts the processes)"
        )


class _Stretch(NamedTuple):
    """Which part of the sequence a process has, and how it computes."""

    position: int  # in running order
    reverse: bool
    group: "dist.ProcessGroup | None"
    backend: str
    grad_enabled: bool

    def run(
        self, w: Tensor, u: Tensor, k: Tensor, v: Tensor, weights: Tensor | None, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        output, final_state = multi_perspective_wkv(
            w, u, k, v, weights=weights, initial_state=state, output_final_state=True, reverse=self.reverse,
            backend=self.backend,
        )  # fmt: skip
        assert final_state is not None
        return output, final_state

    def gather(self, x: Tensor) -> list[Tensor]:
        """The tensors of all processes, in running order."""
        parts = _all_gather(x, self.group)
        return parts[::-1] if self.reverse else parts


class _SequenceParallel(torch.autograd.Function):
    """Keeps the graph of the second run of the op, from the state before the stretch, and goes back through it twice:
    once for what this stretch's outputs want of that state, and once for the gradients, the state after the stretch now
    having its own from all later ones.
    """

    @staticmethod
    def forward(
        ctx: Any, stretch: _Stretch,
        w: Tensor, u: Tensor, k: Tensor, v: Tensor, weights: Tensor | None, initial_state: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        own = stretch.run(w, u, k, v, weights, initial_state)[1]
        states = stretch.gather(own)
        lengths = [int(n) for n in stretch.gather(torch.tensor(k.shape[1], device=k.device))]
        before = _state_before(stretch.position, states, lengths, w, initial_state)
        is_needed = [needed and stretch.grad_enabled for needed in ctx.needs_input_grad]
        leaves: list[Any] = [None if x is None else x.detach() for x in (w, u, k, v, weights)]
        for x, needed in zip(leaves, is_needed[1:], strict=False):
            if needed:
                x.requires_grad_()
        before = before.detach().requires_grad_(any(is_needed))
        with torch.set_grad_enabled(any(is_needed)):
            w, u, k, v, weights = leaves
            output, final_state = stretch.run(w, u, k, v, weights, before)
        ctx.stretch, ctx.lengths, ctx.leaves, ctx.before = stretch, lengths, leaves, before
        ctx.results = output, final_state
        ctx.set_materialize_grads(False)
        return output.detach(), final_state.detach()

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_output: Tensor | None, grad_state: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        stretch, before, (output, final_state) = ctx.stretch, ctx.before, ctx.results
        grad_output = torch.zeros_like(output) if grad_output is None else grad_output
        grad_state = torch.zeros_like(final_state) if grad_state is None else grad_state
        wanted = torch.autograd.grad(
            (output, final_state), before, (grad_output, grad_state), retain_graph=True
        )[0]
        # gradients by the true sums have the inverse unit of these sums
        both = stretch.gather(torch.stack([*wanted.unbind(1)[:2], before.detach()[:, 2]], 1))
        w = ctx.leaves[0].detach().double()
        total = grad_state[:, :2].double()
        for i in range(stretch.position + 1, len(both)):
            steps = sum(ctx.lengths[stretch.position + 1 : i])
            log_scale = final_state.detach()[:, 2].double() - both[i][:, 2].double() + steps * w
            total = total + both[i][:, :2].double() * torch.exp(log_scale.clamp(max=700.0))[:, None]
        grad_state = torch.cat([total.to(grad_state.dtype), torch.zeros_like(grad_state[:, 2:])], 1)
        needed = [x for x in (*ctx.leaves, before) if x is not None and x.requires_grad]
        grads = torch.autograd.grad(
            (output, final_state), needed, (grad_output, grad_state), retain_graph=True
        )
        found = dict(zip(map(id, needed), grads, strict=True))
        return (
            None,
            *(None if x is None else found.get(id(x)) for x in ctx.leaves),
            found[id(before)] if ctx.needs_input_grad[6] else None,
        )


def _state_before(
    position: int, states: list[Tensor], lengths: list[int], w: Tensor, initial_state: Tensor | None
) -> Tensor:
    """Those of the stretches before it, decayed and added. The initial state is part of the first stretch's."""
    terms = []
    for i in range(position):
        num, den, exp = states[i].double().unbind(1)
        terms.append(torch.stack([num, den, exp + sum(lengths[i + 1 : position]) * w.double()], 1))
    if not terms:
        fresh = torch.zeros_like(states[0])
        fresh[:, 2] = EMPTY_EXP
        return fresh if initial_state is None else initial_state
    num, den, exp = merge_wkv_states(*terms).unbind(1)
    rounded = exp.to(states[0].dtype)
    scale = torch.exp(exp - rounded.double())  # what rounding takes from the exponent
    return torch.stack([num * scale, den * scale, rounded.double()], 1).to(states[0].dtype)


def _all_gather(x: Tensor, group: "dist.ProcessGroup | None") -> list[Tensor]:
    """The tensors of all processes, in the order of their ranks; no gradient."""
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x, group=group)
    return parts


def _gather(x: Tensor, group: "dist.ProcessGroup | None") -> Tensor:
    """The tensors of all processes, stacked in the order of their ranks."""
    return _Gather.apply(x, group)


class _Gather(torch.autograd.Function):
    """Backward: every process's gradient of one process's tensor, summed, to that process."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: "dist.ProcessGroup | None") -> Tensor:
        ctx.group = group
        return torch.stack(_all_gather(x, group))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total[dist.get_rank(ctx.group)], None
