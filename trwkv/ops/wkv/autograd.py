"""The op as seen by PyTorch: `torch.library` operators, their fakes and their autograd formulas.

Two operators, `trwkv::wkv_forward` and `trwkv::wkv_backward`, serve every backend but the reference, which is plain
PyTorch. The forward also returns a checkpoint: whatever its backend keeps for the backward besides the inputs.
"""

from types import ModuleType

import torch
from torch import Tensor

RECURRENT_MAX_T = 16
"""Calls of at most this many tokens that need no gradient take the recurrent Triton kernel under "auto"."""

torch.library.define(
    "trwkv::wkv_forward",
    "(Tensor w, Tensor u, Tensor k, Tensor v, Tensor? weights, Tensor? initial_state, str backend, str algorithm,"
    " bool save) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "trwkv::wkv_backward",
    "(Tensor grad_output, Tensor? grad_final_state, Tensor final_state, Tensor w, Tensor u, Tensor k, Tensor v,"
    " Tensor? weights, Tensor? initial_state, Tensor checkpoint, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def wkv(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor | None,
    initial_state: Tensor | None,
    backend: str,
    algorithm: str,
) -> tuple[Tensor, Tensor]:
    """Validated arguments in, (output, final_state) out. `algorithm` is "auto", "chunk" or "recurrent"."""
    inputs = (w, u, k, v, weights, initial_state)
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    output, final_state, _ = torch.ops.trwkv.wkv_forward(*inputs, backend, algorithm, save)
    return output, final_state


def _chunk_backend(backend: str) -> ModuleType:
    if backend == "triton":
        from trwkv.ops.wkv import chunk

        return chunk
    from trwkv.ops.wkv import torch_chunk

    return torch_chunk


@torch.library.impl("trwkv::wkv_forward", "CompositeExplicitAutograd")
def _forward(w, u, k, v, weights, initial_state, backend, algorithm, save):
    if algorithm == "auto":
        short = backend == "triton" and not save and k.shape[1] <= RECURRENT_MAX_T
        algorithm = "recurrent" if short else "chunk"
    if algorithm == "chunk":
        return _chunk_backend(backend).chunk_forward(w, u, k, v, weights, initial_state, save=save)
    if backend == "triton":
        from trwkv.ops.wkv.recurrent import recurrent_forward as step_by_step
    else:
        from trwkv.ops.wkv.reference import step_wkv as step_by_step
    output, final_state = step_by_step(w, u, k, v, weights, initial_state)
    return output, final_state, _no_checkpoint(k)


@torch.library.register_fake("trwkv::wkv_forward")
def _forward_fake(w, u, k, v, weights, initial_state, backend, algorithm, save):
    P, C = w.shape
    B, T = k.shape[:2]
    state_dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
    output = v.new_empty((B, T, P, C) if weights is None else (B, T, C))
    final_state = k.new_empty((B, 3, P, C), dtype=state_dtype)
    if algorithm == "recurrent" or not save:
        return output, final_state, _no_checkpoint(k)
    return output, final_state, _chunk_backend(backend).empty_checkpoint(w, k)


def _no_checkpoint(k: Tensor) -> Tensor:
    return k.new_empty(0, dtype=torch.float32)


@torch.library.impl("trwkv::wkv_backward", "CompositeExplicitAutograd")
def _backward(
    grad_output, grad_final_state, final_state, w, u, k, v, weights, initial_state, checkpoint, backend
):
    chunked = _chunk_backend(backend)
    if checkpoint.numel() == 0 and k.numel() > 0:  # the recurrent forward keeps none
        _, chunk_state, checkpoint = chunked.chunk_forward(w, u, k, v, weights, initial_state, save=True)
        if grad_final_state is not None:  # the two may write the same sums with different exponents
            shift = chunk_state[:, 2:].double() - final_state[:, 2:].double()
            grad_final_state = (grad_final_state.double() * torch.exp(shift)).to(grad_final_state.dtype)
    grads = chunked.chunk_backward(
        grad_output, grad_final_state, w, u, k, v, weights, initial_state, checkpoint
    )
    return tuple(k.new_empty(0) if g is None else g for g in grads)


@torch.library.register_fake("trwkv::wkv_backward")
def _backward_fake(
    grad_output, grad_final_state, final_state, w, u, k, v, weights, initial_state, checkpoint, backend
):
    inputs = (w, u, k, v, weights, initial_state)
    return tuple(k.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs)


def _setup_context(ctx, inputs, output):
    w, u, k, v, weights, initial_state, ctx.backend, _, _ = inputs
    ctx.save_for_backward(w, u, k, v, weights, initial_state, *output[1:])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad_output, grad_final_state, _grad_checkpoint):
    w, u, k, v, weights, initial_state, final_state, checkpoint = ctx.saved_tensors
    if grad_output is None and grad_final_state is None:
        return (None,) * 9
    if grad_output is None:
        P, C = w.shape
        grad_output = v.new_zeros((*k.shape[:2], P, C) if weights is None else (*k.shape[:2], C))
    grads = torch.ops.trwkv.wkv_backward(
        grad_output,
        grad_final_state,
        final_state,
        w,
        u,
        k,
        v,
        weights,
        initial_state,
        checkpoint,
        ctx.backend,
    )
    inputs = (w, u, k, v, weights, initial_state)
    return (*(None if x is None else g for x, g in zip(inputs, grads, strict=True)), None, None, None)


torch.library.register_autograd("trwkv::wkv_forward", _autograd, setup_context=_setup_context)


def _no_second_order(ctx, *grads):
    raise NotImplementedError(
        "multi_perspective_wkv: second-order gradients are available with backend='reference' only"
    )


torch.library.register_autograd("trwkv::wkv_backward", _no_second_order)
