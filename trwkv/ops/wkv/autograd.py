"""The op as seen by PyTorch: `torch.library` operators, their fakes and their autograd formulas.

`trwkv::wkv_forward` and `trwkv::wkv_backward` serve every backend but the reference, which is plain PyTorch. The
forward also returns a checkpoint: whatever its backend keeps for the backward besides the inputs.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from trwkv.ops._library import differentiable, is_gradient_needed
from trwkv.ops._validate import sequence_bounds

RECURRENT_MAX_T = 16
"""Calls of at most this many tokens that need no gradient take the recurrent Triton kernel under "auto"."""

torch.library.define(
    "trwkv::wkv_forward",
    "(Tensor w, Tensor u, Tensor k, Tensor v, Tensor? weights, Tensor? initial_state, Tensor? cu_seqlens,"
    " bool reverse, str backend, str algorithm, bool save) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "trwkv::wkv_backward",
    "(Tensor grad_output, Tensor? grad_final_state, Tensor final_state, Tensor w, Tensor u, Tensor k, Tensor v,"
    " Tensor? weights, Tensor? initial_state, Tensor? cu_seqlens, Tensor checkpoint, bool reverse, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def wkv(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    backend: str,
    algorithm: str,
) -> tuple[Tensor, Tensor]:
    """Validated arguments in, (output, final_state) out. `algorithm` is "auto", "chunk" or "recurrent"."""
    inputs = (w, u, k, v, weights, initial_state)
    save = is_gradient_needed(*inputs)
    output, final_state, _ = wkv_forward(*inputs, cu_seqlens, reverse, backend, algorithm, save)
    return output, final_state


def chunk_backend(backend: str) -> ModuleType:
    if backend == "triton":
        from trwkv.ops.wkv import chunk

        return chunk
    from trwkv.ops.wkv import torch_sequences

    return torch_sequences


def sequences_for(cu_seqlens: Tensor | None, k: Tensor, backend: str) -> Any:
    """`cu_seqlens` as the backend takes it, checked: the kernels read the tensor, PyTorch wants its values.

    While a CUDA graph is captured nothing on a GPU may be read, nor can what a replay will find there be known.
    """
    if cu_seqlens is None:
        return None
    if backend == "triton" and cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing():
        return cu_seqlens
    bounds = sequence_bounds(cu_seqlens, k.shape[1])
    return cu_seqlens if backend == "triton" else bounds


@torch.library.impl("trwkv::wkv_forward", "CompositeExplicitAutograd")
def _forward(w, u, k, v, weights, initial_state, cu_seqlens, reverse, backend, algorithm, save):
    sequences = sequences_for(cu_seqlens, k, backend)
    inputs = (w, u, k, v, weights, initial_state, sequences, reverse)
    if algorithm == "auto":
        short = backend == "triton" and not save and k.shape[1] <= RECURRENT_MAX_T
        algorithm = "recurrent" if short else "chunk"
    if algorithm == "chunk":
        return chunk_backend(backend).chunk_forward(*inputs, save=save)
    if backend == "triton":
        from trwkv.ops.wkv.recurrent import recurrent_forward as step_by_step
    else:
        from trwkv.ops.wkv.reference import step_wkv as step_by_step
    output, final_state = step_by_step(*inputs)
    return output, final_state, _no_checkpoint(k)


@torch.library.register_fake("trwkv::wkv_forward")
def _forward_fake(w, u, k, v, weights, initial_state, cu_seqlens, reverse, backend, algorithm, save):
    P, C = w.shape
    B, T = k.shape[:2]
    output = v.new_empty((B, T, P, C) if weights is None else (B, T, C))
    final_state = fake_state(w, k, cu_seqlens)
    if algorithm == "recurrent" or not save:
        return output, final_state, _no_checkpoint(k)
    n_sequences = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return output, final_state, chunk_backend(backend).empty_checkpoint(w, k, n_sequences)


def fake_state(w: Tensor, k: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    N = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
    return k.new_empty((N, 3, *w.shape), dtype=dtype)


def _no_checkpoint(k: Tensor) -> Tensor:
    return k.new_empty(0, dtype=torch.float32)


@torch.library.impl("trwkv::wkv_backward", "CompositeExplicitAutograd")
def _backward(
    grad_output, grad_final_state, final_state, w, u, k, v, weights, initial_state, cu_seqlens,
    checkpoint, reverse, backend,
):  # fmt: skip
    chunked = chunk_backend(backend)
    inputs = (w, u, k, v, weights, initial_state, sequences_for(cu_seqlens, k, backend), reverse)
    if checkpoint.numel() == 0 and k.numel() > 0:  # the recurrent forward keeps none
        _, chunk_state, checkpoint = chunked.chunk_forward(*inputs, save=True)
        if grad_final_state is not None:  # the two may write the same sums with different exponents
            shift = chunk_state[:, 2:].double() - final_state[:, 2:].double()
            grad_final_state = (grad_final_state.double() * torch.exp(shift)).to(grad_final_state.dtype)
    grads = chunked.chunk_backward(grad_output, grad_final_state, *inputs, checkpoint)
    return tuple(k.new_empty(0) if g is None else g for g in grads)


@torch.library.register_fake("trwkv::wkv_backward")
def _backward_fake(
    grad_output, grad_final_state, final_state, w, u, k, v, weights, initial_state, cu_seqlens,
    checkpoint, reverse, backend,
):  # fmt: skip
    inputs = (w, u, k, v, weights, initial_state)
    return tuple(k.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs)


def _setup_context(ctx, inputs, output):
    w, u, k, v, weights, initial_state, cu_seqlens, ctx.reverse, ctx.backend, _, _ = inputs
    ctx.save_for_backward(w, u, k, v, weights, initial_state, cu_seqlens, *output[1:])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _backward_formula(ctx, grad_output, grad_final_state, _grad_checkpoint):
    *inputs, cu_seqlens, final_state, checkpoint = ctx.saved_tensors
    if grad_output is None and grad_final_state is None:
        return (None,) * 11
    if grad_output is None:
        w, _, k, v, weights, _ = inputs
        grad_output = v.new_zeros((*k.shape[:2], *w.shape[weights is not None :]))
    grads = wkv_backward(
        grad_output, grad_final_state, final_state, *inputs, cu_seqlens, checkpoint, ctx.reverse, ctx.backend
    )
    return (*(None if x is None else g for x, g in zip(inputs, grads, strict=True)), *(None,) * 5)


def _no_second_order(ctx, *grads):
    raise NotImplementedError(
        "multi_perspective_wkv: second-order gradients are available with backend='reference' only"
    )


wkv_forward = differentiable("wkv_forward", _setup_context, _backward_formula)
wkv_backward = differentiable("wkv_backward", lambda ctx, inputs, output: None, _no_second_order)
