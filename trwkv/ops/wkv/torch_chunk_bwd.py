"""Chunked PyTorch backend, backward. Blocks of chunks are walked from the last to the first.

With q[t] = grad_y[t] / D[t], the adjoint (a, b) of the sums (A, B) after token t obeys

    (a, b)[t-1] = e^w (a, b)[t] + (q, -q y)[t]
    grad_v[t] = e^k[t] (a[t] + e^u q[t])
    grad_k[t] = e^k[t] (v[t] (a[t] + e^u q[t]) + b[t] - e^u q[t] y[t])
    grad_u    = sum_t e^(u+k[t]) q[t] (v[t] - y[t])
    grad_w    = sum_t e^w (A[t-1] a[t] + B[t-1] b[t])

Sums are in units of e^s and adjoints in units of e^-s, s being the chunk's; what a token's adjoint holds is bounded by
the forward's weights, so the forward's bounds serve both. Between chunks, the adjoint of the state at a boundary is
kept in float64 in units of e^-exp, exp being that state's own exponent.

In a column (see `torch_chunk_exact`) that is computed exactly from token f on, the fast path sees no token from f on;
the exact adjoint of the sums before token f enters it in place of the token's own. So what is later than f can change
an earlier gradient through that adjoint alone, and not at all where the incoming gradients from f on are zero.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from trwkv.ops.wkv.torch_chunk_block import (
    CHUNK,
    Block,
    Problem,
    block_ranges,
    carried_in,
    columns,
    inner_rows,
    load,
    set_up,
    unpack_state,
    weights_at,
)
from trwkv.ops.wkv.torch_chunk_exact import Adjoint, Step, sum_in_order, walk, walk_back


class Gradients(NamedTuple):
    """Where the gradients gather; w, u and weights (but [B, T, P]) in float64, rounded once, when all is added."""

    w: Tensor  # [P, C]; [1, P * C] for separate k and v
    u: Tensor  # the same
    k: Tensor
    v: Tensor
    weights: Tensor | None  # [P, C] for [P] and [P, C], in the caller's layout; or [B, T, P]

    def rounded(
        self, w: Tensor, u: Tensor, weights: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """All of them, in the shapes and dtypes of the inputs."""
        grad_weights = self.weights
        if weights is not None:
            grad_weights = (grad_weights.sum(1) if weights.ndim == 1 else grad_weights).to(weights.dtype)
        return self.w.view_as(w).to(w.dtype), self.u.view_as(u).to(u.dtype), self.k, self.v, grad_weights


class _Columns(NamedTuple):
    """The columns of a block that are computed exactly, from token `first` on."""

    at: tuple[Tensor, ...]  # batch row, chunk, channel
    first: Tensor  # [M]
    v: Tensor  # [L, M]
    w: Tensor  # [P, M]
    base: Tensor  # [M]
    steps: list[Step]
    end: Tensor  # [P, M], exponent after the last token
    after: Tensor  # [P, M], exponent of the next boundary
    carried: Tensor  # [P, M], exponent of the boundary before


class _Replay(NamedTuple):
    """The block's forward again."""

    sums: Tensor  # before each token, [L, 2, P, B, N, C]
    sources: Tensor  # (q, -q y), [L, 2, P, B, N, C]
    grad_y_cols: Tensor | None  # [L, P, M]


@torch.no_grad()
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
    """Gradients of w, u, k, v, weights and initial_state, each in its input's dtype, None where the input is None."""
    grads = empty_gradients(w, k, v, weights)
    grad_state = add_gradients(
        grads, grad_output, grad_final_state, w, u, k, v, weights, initial_state, checkpoint
    )
    return (*grads.rounded(w, u, weights), grad_state)


def empty_gradients(w: Tensor, k: Tensor, v: Tensor, weights: Tensor | None) -> Gradients:
    zeros = w.new_zeros((1, w.numel()) if k.ndim == 4 else w.shape, dtype=torch.float64)
    grad_weights = None
    if weights is not None:
        grad_weights = torch.zeros_like(zeros).view(w.shape)
        if weights.ndim == 3:
            narrow = torch.float64 if k.dtype == torch.float64 else torch.float32
            grad_weights = weights.new_zeros(weights.shape, dtype=narrow)
    return Gradients(zeros, zeros.clone(), k.new_empty(k.shape), v.new_empty(v.shape), grad_weights)


def add_gradients(
    grads: Gradients,
    grad_output: Tensor,
    grad_final_state: Tensor | None,
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor | None,
    initial_state: Tensor | None,
    checkpoint: Tensor,
) -> Tensor | None:
    """Adds to what is summed over tokens in `grads`, writes the rest; returns the gradient of initial_state."""
    p = set_up(w, u, k)
    exp, sums = unpack_state(p, initial_state, w)
    adjoint = torch.zeros_like(sums)
    if grad_final_state is not None:
        adjoint = p.inner(grad_final_state[:, :2].double().movedim(1, 0)).contiguous()
    unit = exp if initial_state is None else p.inner(initial_state[:, 2].double())
    for bounds in reversed(list(block_ranges(p))):
        adjoint = _block_backward(p, grads, bounds, grad_output, k, v, weights, checkpoint, unit, adjoint)
    if initial_state is None:
        return None
    limit = torch.finfo(initial_state.dtype).max
    # An empty state with a large exponent has a gradient beyond any range.
    adjoint = adjoint.clamp(-limit, limit)
    grad_state = torch.cat([adjoint, (adjoint * sums).sum(0, keepdim=True).clamp(-limit, limit)])
    grad_state = p.public(grad_state).movedim(0, 1)
    return grad_state.to(initial_state.dtype, memory_format=torch.contiguous_format)


def _block_backward(
    p: Problem,
    grads: Gradients,
    bounds: tuple[int, int, int],
    grad_output: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor | None,
    checkpoint: Tensor,
    unit: Tensor,
    adjoint: Tensor,
) -> Tensor:
    """One block: adjoint [2, P, B, C] of the state after it -> that of the state before it."""
    block = load(p, k, v, *bounds)
    number = block.start // CHUNK
    boundaries = checkpoint[number : number + block.chunks + 1]
    boundaries = boundaries.to(torch.float64, copy=True)  # [N + 1, 3, P, B, C], changed below
    exps, sums = boundaries[:, 2], boundaries[:-1, :2]
    block, state = carried_in(p, block, exps[:-1], sums)
    cols = None
    if block.bad is not None:
        cols = _exact_columns(p, block, k, v, exps, sums, unit)
        _silence(cols, block.terms, 1)
    replay = _replay(p, grads, block, state, grad_output, weights, cols)
    if number == 0:
        exps[0] = unit  # an empty state's own exponent counts for its gradient

    alone = None
    if cols is not None:
        _silence(cols, replay.sources, 0)
        alone = _inject(cols, replay, torch.zeros_like(cols.w).expand(2, -1, -1))
    steps = replay.sources.unbind(0)
    local = steps[-1].clone()
    for source in reversed(steps[:-1]):
        torch.addcmul(source, local, p.decay, out=local)

    base = block.base.double().movedim(1, 0)[:, None]  # [N, 1, B, C]
    local = local.movedim(3, 0) * _exp(exps[:-1] - base)[:, None]
    if cols is not None:
        b, n, c = cols.at
        here = torch.where(cols.first == 0, alone.carried, local[n, :, :, b, c].movedim(0, 2))
        local[n, :, :, b, c] = here.movedim(2, 0)
    adjoints = _scan_back(local, _exp((exps[:-1] - exps[1:]) + p.w * block.length)[:, None], adjoint)
    incoming = (adjoints[1:] * torch.exp(base - exps[1:])[:, None]).movedim(0, 3)
    incoming = incoming.to(p.dtype, memory_format=torch.contiguous_format)
    exact = None
    if cols is not None:
        b, n, c = cols.at
        incoming[:, :, b, n, c] = 0
        exact = _inject(
            cols, replay, adjoints[n + 1, :, :, b, c].movedim(0, 2) * torch.exp(cols.end - cols.after)
        )
    _write_gradients(p, grads, block, v, replay, incoming, cols, exact)
    return adjoints[0]


def _exp(x: Tensor) -> Tensor:
    return torch.exp(x.clamp(max=700.0))


def _silence(cols: _Columns, x: Tensor, axis: int) -> None:
    """Zero in x [..., B, N, C], whose tokens lie along `axis`, what the fast path must not see."""
    late = torch.arange(x.shape[axis], device=x.device)[:, None] >= cols.first  # [L, M]
    b, n, c = cols.at
    shape = [1] * (x.ndim - 3) + [len(cols.first)]
    shape[axis] = x.shape[axis]
    x[..., b, n, c] = x[..., b, n, c].masked_fill(late.view(shape), 0)


def _exact_columns(
    p: Problem, block: Block, k: Tensor, v: Tensor, exps: Tensor, sums: Tensor, unit: Tensor
) -> _Columns:
    at = b, n, c = torch.nonzero(block.bad < block.length, as_tuple=True)
    k_cols, v_cols, w_cols, u_cols = columns(p, block, k, v, at)
    before = exps[n, :, b, c].T
    steps, end, _ = walk(k_cols, v_cols, w_cols, u_cols, before, sums[n, :, :, b, c].movedim(0, 2))
    after, carried = exps[n + 1, :, b, c].T, torch.where(n + block.start == 0, unit[:, b, c], before)
    return _Columns(at, block.bad[at], v_cols, w_cols, block.base[at].double(), steps, end, after, carried)


def _inject(cols: _Columns, replay: _Replay, adjoint: Tensor) -> Adjoint:
    """Walk the columns back, and hand the adjoint before token `first` to the fast path as that token's source."""
    exact = walk_back(
        cols.steps, cols.v, cols.w, replay.grad_y_cols, adjoint, cols.first, cols.base, cols.carried
    )
    m = torch.nonzero(cols.first > 0, as_tuple=True)[0]
    b, n, c = (x[m] for x in cols.at)
    replay.sources[cols.first[m], :, :, b, n, c] = (
        exact.before_first[:, :, m].movedim(2, 0).to(replay.sources.dtype)
    )
    return exact


def _scan_back(local: Tensor, keep: Tensor, adjoint: Tensor) -> Tensor:
    """Adjoints at all boundaries, [N + 1, 2, P, B, C], from those of each chunk alone."""
    adjoints = adjoint.new_empty(local.shape[0] + 1, *adjoint.shape)
    adjoints[-1] = adjoint
    rows = adjoints.unbind(0)
    for n in range(local.shape[0] - 1, -1, -1):
        torch.addcmul(local[n], rows[n + 1], keep[n], out=rows[n])
    return adjoints


def _replay(
    p: Problem,
    grads: Gradients,
    block: Block,
    state: Tensor,
    grad_output: Tensor,
    weights: Tensor | None,
    cols: _Columns | None,
) -> _Replay:
    """Sums and sources token by token; the gradient of weights on the way."""
    terms = block.terms.unsqueeze(2).unbind(1)
    sums = state.new_empty(len(terms), *state.shape)
    sources = torch.empty_like(sums)
    sums[0] = state
    zero = state.new_zeros(())
    both = torch.empty_like(state)
    outer = (
        None
        if weights is None or weights.ndim == 3
        else state.new_zeros(p.perspectives, *_channels(p, state))
    )
    grad_y_cols = []
    for j, term in enumerate(terms):
        torch.addcmul(sums[j], p.bonus, term, out=both)
        if j + 1 < len(terms):
            torch.addcmul(term, sums[j], p.decay, out=sums[j + 1])
        grad_y = _grad_y(p, block, grad_output, weights, j, state)
        torch.div(grad_y, both[1], out=sources[j, 0])
        y = torch.div(both[0], both[1], out=both[0])
        torch.addcmul(zero, sources[j, 0], y, value=-1, out=sources[j, 1])
        if cols is not None:
            b, n, c = cols.at
            grad_y_cols.append(grad_y[:, b, n, c].double())
            y[:, b, n, c] = torch.where(cols.first <= j, cols.steps[j].y.to(y.dtype), y[:, b, n, c])
        if weights is not None:
            _grad_weights(p, grads, block, grad_output, y, j, outer)
    if outer is not None:
        grads.weights.add_(outer.double().sum((1, 2)))
    return _Replay(sums, sources, torch.stack(grad_y_cols) if grad_y_cols else None)


def _channels(p: Problem, state: Tensor) -> tuple[int, int, int]:
    b, n, c = state.shape[2:]
    return b, n, c // p.perspectives if p.own else c


def _grad_y(
    p: Problem, block: Block, grad_output: Tensor, weights: Tensor | None, j: int, like: Tensor
) -> Tensor:
    """Gradient of every perspective's own output at chunk position j, [P, B, N, C] in the inner layout."""
    if weights is None:
        return inner_rows(p, block, grad_output)[j].to(p.dtype)
    grad_y = like.new_empty(like.shape[1:])
    torch.mul(block.view(grad_output)[j], weights_at(p, block, weights, j), out=p.split(grad_y))
    return grad_y


def _grad_weights(
    p: Problem, grads: Gradients, block: Block, grad_output: Tensor, y: Tensor, j: int, outer: Tensor | None
) -> None:
    here = block.view(grad_output)[j].to(p.dtype)
    if outer is None:
        block.view(grads.weights)[j] = (p.split(y) * here).sum(-1).movedim(0, -1)
    else:
        outer.addcmul_(p.split(y), here)


def _write_gradients(
    p: Problem,
    grads: Gradients,
    block: Block,
    v: Tensor,
    replay: _Replay,
    adjoint: Tensor,
    cols: _Columns | None,
    exact: Adjoint | None,
) -> None:
    """From the adjoint after each chunk, [2, P, B, N, C], to the gradients of k, v, w and u."""
    v_view = block.view(v).flatten(3)
    grad_k, grad_v = (block.view(x).flatten(3) for x in (grads.k, grads.v))
    outer_w, outer_u = torch.zeros_like(adjoint), torch.zeros_like(adjoint[0])
    both, current = torch.empty_like(adjoint), torch.empty_like(outer_u)
    for j in range(block.length - 1, -1, -1):
        source, exps, v_here = replay.sources[j], block.terms[1, j], v_view[j].to(p.dtype)
        outer_w.addcmul_(replay.sums[j], adjoint)
        torch.addcmul(adjoint, p.bonus, source, out=both)
        towards_v, towards_k = sum_in_order(both.unbind(1)).unbind(0)
        torch.addcmul(source[1], source[0], v_here, out=current)
        outer_u.addcmul_(current, exps)
        if j:
            torch.addcmul(source, adjoint, p.decay, out=adjoint)
        torch.mul(towards_k.addcmul_(towards_v, v_here), exps, out=grad_k[j])
        torch.mul(towards_v, exps, out=grad_v[j])
        if cols is not None:
            for x, x_exact in ((grad_k[j], exact.k[j]), (grad_v[j], exact.v[j])):
                x[cols.at] = torch.where(cols.first <= j, x_exact.to(x.dtype), x[cols.at])
    total_w = (outer_w.sum(0) * p.decay).double()
    total_u = (outer_u * p.bonus).double()
    if cols is not None:
        b, n, c = cols.at
        total_w[:, b, n, c] += exact.w
        total_u[:, b, n, c] += exact.u
    grads.w.add_(total_w.sum((1, 2)))
    grads.u.add_(total_u.sum((1, 2)))
