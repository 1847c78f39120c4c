"""Decoding with the gate: `trwkv::wkv_gated`. No gradient."""

import torch

from trwkv.ops.wkv import reference
from trwkv.ops.wkv.autograd import chunk_backend, fake_state

torch.library.define(
    "trwkv::wkv_gated",
    "(Tensor w, Tensor u, Tensor k, Tensor v, Tensor receptance, Tensor? weights, Tensor? initial_state, str backend)"
    " -> (Tensor, Tensor)",
)


@torch.library.impl("trwkv::wkv_gated", "CompositeExplicitAutograd")
def _gated(w, u, k, v, receptance, weights, initial_state, backend):
    if backend == "triton":
        from trwkv.ops.wkv.recurrent import recurrent_forward

        inputs = (w, u, k, v, weights, initial_state, None, False)
        return recurrent_forward(*inputs, receptance=receptance)
    wide = torch.float64 if k.dtype == torch.float64 or backend == "reference" else torch.float32
    inputs = (w, u, k, v.to(wide), weights, initial_state, None, False)  # rounded once, when all is done
    if backend == "torch":
        output, final_state, _ = chunk_backend(backend).chunk_forward(*inputs, save=False)
    else:
        output, final_state = reference.step_wkv(*inputs)
    gate = torch.sigmoid(receptance.to(wide).contiguous())  # rounds by strides otherwise
    return (gate * output).to(v.dtype), final_state


@torch.library.register_fake("trwkv::wkv_gated")
def _gated_fake(w, u, k, v, receptance, weights, initial_state, backend):
    return v.new_empty(receptance.shape), fake_state(w, k, None)


wkv_gated = torch.ops.trwkv.wkv_gated
