"""Decoding in place: `trwkv::wkv_recurrent_` changes the state it is given. No gradient."""

import torch
from torch import Tensor

from trwkv.ops.wkv import reference
from trwkv.ops.wkv.autograd import chunk_backend

torch.library.define(
    "trwkv::wkv_recurrent_",
    "(Tensor(a!) state, Tensor w, Tensor u, Tensor k, Tensor v, Tensor? weights, str backend) -> Tensor",
)


@torch.library.impl("trwkv::wkv_recurrent_", "CompositeExplicitAutograd")
def _recurrent_(state, w, u, k, v, weights, backend):
    inputs = (w, u, k, v, weights, state, None, False)
    if backend == "triton":
        from trwkv.ops.wkv.recurrent import recurrent_forward

        return recurrent_forward(*inputs, in_place=True)[0]
    if backend == "torch":
        output, final_state, _ = chunk_backend(backend).chunk_forward(*inputs, save=False)
    else:
        output, final_state = reference.step_wkv(*inputs)
    state.copy_(final_state)
    return output


@torch.library.register_fake("trwkv::wkv_recurrent_")
def _recurrent_fake(
    state: Tensor, w: Tensor, u: Tensor, k: Tensor, v: Tensor, weights: Tensor | None, backend
):
    (B, T), (P, C) = k.shape[:2], w.shape
    return v.new_empty((B, T, P, C) if weights is None else (B, T, C))


wkv_recurrent_ = torch.ops.trwkv.wkv_recurrent_
