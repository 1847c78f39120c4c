"""Who is measured: this library's backends, and what else computes the WKV of RWKV-4.

A contender computes the WKV of one `Inputs`; those that know nothing of perspectives are called once for each.
"""

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from throughput_cases import Case, Inputs
from throughput_measure import graphed
from throughput_plain import plain_wkv
from trwkv.ops import multi_perspective_wkv, recurrent_wkv_

IN_PLACE = "triton, in place"
COMPILED = "torch-compiled"
SLOW_TO_START = (COMPILED,)
"""Left out of the quick set: compiled anew for every case, which takes longer than to measure it."""
TRANSFORMERS, FLA = "transformers.models.rwkv.modeling_rwkv", "fla.ops.rwkv4"
MAX_TOKENS = {"reference": 256, "transformers": 2048}
"""Loops over the tokens are timed on short sequences only: their backward takes time in proportion to T^2."""


def _anything(case: Case) -> str | None:
    return None


@dataclass(frozen=True)
class Contender:
    """An implementation.

    Attributes:
        name: as in tables.
        run: (decay, u, k, v, weights, state) -> (output, state); no state in, none out. The decay is w, or
            `log(-w)` where `log_decay` says so.
        fresh_state: (B, the shape of w, device) -> the state before the first token.
        log_decay: it takes RWKV-4's time_decay instead of w.
        many_calls: it takes one perspective, so P of them are P calls and a sum.
        refuses: case -> why it cannot do it or is not asked to, or None.
        module: what it imports when first called.
    """

    name: str
    run: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, Any], tuple[Tensor, Any]]
    fresh_state: Callable[[int, Sequence[int], str], Any]
    log_decay: bool = False
    many_calls: bool = False
    refuses: Callable[[Case], str | None] = _anything
    module: str = "torch"

    def native(self, inputs: Inputs) -> Inputs:
        """`inputs` with the decay in the form that this implementation takes."""
        return replace(inputs, w=torch.log(-inputs.w)) if self.log_decay else inputs


def contenders(device: str) -> dict[str, Contender]:
    """All that can run on `device` with what is installed here, by name; the official kernel is `official`."""
    names = ["torch", "triton", "reference"] if device == "cuda" else ["torch", "reference"]
    found = [*(_backend(name) for name in names), _compiled()]
    if device == "cuda":
        found.insert(2, in_place("triton"))
    if importlib.util.find_spec("transformers"):
        # On a GPU transformers builds a kernel of its own; this is the loop that it falls back to.
        loop = peer("transformers", _transformers_loop, _transformers_state, _short_only("transformers"))
        found.append(replace(loop, module=TRANSFORMERS, name="transformers" + " (loop)" * (device == "cuda")))
    if device == "cuda" and importlib.util.find_spec("fla"):
        found.append(replace(peer("flash-linear-attention", _fla_recurrent, _fla_state), module=FLA))
    return {contender.name: contender for contender in found}


def _short_only(name: str) -> Callable[[Case], str | None]:
    longest = MAX_TOKENS.get(name, float("inf"))
    return lambda case: f"timed up to T = {longest} only" if case.T > longest else None


def _backend(name: str) -> Contender:
    def run(w, u, k, v, weights, state):
        return multi_perspective_wkv(
            w,
            u,
            k,
            v,
            weights=weights,
            initial_state=state,
            output_final_state=state is not None,
            backend=name,
        )

    def fresh_state(B, shape, device):
        return torch.zeros(B, 3, *shape, device=device)

    return Contender(name, run, fresh_state, refuses=_short_only(name))


def in_place(backend: str) -> Contender:
    """Decoding that changes its state where it is, as a CUDA graph wants it."""

    def run(w, u, k, v, weights, state):
        return recurrent_wkv_(state, w, u, k, v, weights=weights, backend=backend), state

    return replace(_backend(backend), name=IN_PLACE, run=run, refuses=_decoding_only)


def _decoding_only(case: Case) -> str | None:
    return None if case.decoding else "it is for decoding"


def _compiled() -> Contender:
    """`torch.compile` of `plain_wkv`, which it can look into (the op itself is opaque to it)."""
    compiled: dict[Any, Callable[..., Tensor]] = {}

    def run(w, u, k, v, weights, state):
        tensors = [x for x in (w, u, k, v, weights) if x is not None]
        key = (torch.is_grad_enabled(), *((x.shape, x.dtype, x.requires_grad) for x in tensors))
        if key not in compiled:
            torch._dynamo.reset()  # beyond eight versions of one function PyTorch runs it uncompiled, silently
            compiled.clear()
            compiled[key] = torch.compile(plain_wkv, fullgraph=True, dynamic=False)
        return compiled[key](w, u, k, v, weights), None

    def refuses(case: Case) -> str | None:
        if case.decoding:
            return "it has no state"
        if case.P not in (1, 3) or (case.P > 1 and case.layout != "aggregated"):
            return "compiled for every case: P = 1 and 3, aggregated, only"
        return None

    return Contender(COMPILED, run, lambda B, shape, device: None, refuses=refuses)


def peer(
    name: str, one: Callable, one_state: Callable, refuses: Callable[[Case], str | None] = _anything
) -> Contender:
    """A contender out of a function of one perspective: (time_decay, u, k, v, state) -> (output, state)."""

    def run(decay, u, k, v, weights, state):
        if decay.ndim == 1:
            return one(decay, u, k, v, state)
        if k.ndim == 4 and state is None:  # so many channels of one perspective: no copy, one call
            y = one(decay.flatten(), u.flatten(), k.flatten(2), v.flatten(2), None)[0].view(k.shape)
            return y if weights is None else torch.einsum("btpc,pc->btc", y, weights.to(y.dtype)), None
        outputs, states = [], []
        shares = (
            [k] * len(decay) if k.ndim == 3 else k.unbind(2),
            [v] * len(decay) if v.ndim == 3 else v.unbind(2),
        )
        for p, (kp, vp) in enumerate(zip(*shares, strict=True)):
            y, s = one(decay[p], u[p], kp, vp, None if state is None else state[p])
            outputs.append(y)
            states.append(s)
        if weights is None:
            return torch.stack(outputs, 2), states
        weights = weights.to(outputs[0].dtype)
        total = outputs[0] * weights[0]
        for y, weight in zip(outputs[1:], weights[1:], strict=True):
            total = torch.addcmul(total, y, weight)
        return total, states

    def fresh_state(B, shape, device):
        *perspectives, C = shape
        return (
            [one_state(B, C, device) for _ in range(perspectives[0])]
            if perspectives
            else one_state(B, C, device)
        )

    return Contender(name, run, fresh_state, log_decay=True, many_calls=True, refuses=refuses)


def _transformers_loop(decay, u, k, v, state):
    loop = importlib.import_module(TRANSFORMERS).rwkv_linear_attention_cpu
    return loop(decay, u, k, v, state=state, return_state=state is not None)


def _transformers_state(B, C, device):
    empty = torch.zeros(B, C, device=device)
    return [empty, empty, empty - 1e38]


def _fla_recurrent(decay, u, k, v, state):
    """It takes (time_decay, u, k, v, state), all by position, and always returns the state after the last token."""
    fused_recurrent_rwkv4 = importlib.import_module(FLA).fused_recurrent_rwkv4
    # In k's dtype: it keeps the states of all tokens in the wider of the two. The results are the same to the bit.
    fresh = _fla_state(k.shape[0], k.shape[2], k.device).to(k.dtype) if state is None else state
    output, final = fused_recurrent_rwkv4(decay, u, k, v, fresh)
    return output, None if state is None else final


def _fla_state(B, C, device):
    """[B, 3, 1, C] = (num, den, exp), natural log."""
    state = torch.zeros(B, 3, 1, C, device=device)
    state[:, 2] = -1e38
    return state


def work(case: Case, contender: Contender, inputs: Inputs) -> Callable[[], dict[str, Tensor]]:
    """The function to time. It returns the results by name: "output", and gradients by the input's name."""
    native = contender.native(inputs)
    if case.decoding:
        # As layers have them: a token's k and v side by side in memory.
        tokens = [
            (k.contiguous(), v.contiguous())
            for k, v in zip(native.k.split(1, 1), native.v.split(1, 1), strict=True)
        ]

        def decode():
            return {"output": _decode(contender, native, tokens)}

        return graphed(decode) if case.mode == "decode-graph" else decode
    if case.mode == "forward":

        def forward():
            with torch.no_grad():
                return {
                    "output": contender.run(native.w, native.u, native.k, native.v, native.weights, None)[0]
                }

        return forward
    leaves = {name: x.detach().requires_grad_() for name, x in native.differentiable().items()}

    def run():
        return contender.run(*(leaves.get(name) for name in ("w", "u", "k", "v", "weights")), None)[0]

    def gradients(output, retain_graph=False):
        grads = torch.autograd.grad(
            output, tuple(leaves.values()), native.grad_output, retain_graph=retain_graph
        )
        return dict(zip(leaves, grads, strict=True))

    if case.mode == "backward":
        kept = run()
        return lambda: gradients(kept, retain_graph=True)

    def forward_backward():
        output = run()
        return {"output": output.detach(), **gradients(output)}

    return forward_backward


@torch.no_grad()
def _decode(contender: Contender, x: Inputs, tokens: list[tuple[Tensor, Tensor]]) -> Tensor:
    state = contender.fresh_state(x.k.shape[0], x.w.shape, str(x.k.device))
    outputs = []
    for k, v in tokens:
        y, state = contender.run(x.w, x.u, k, v, x.weights, state)
        outputs.append(y)
    return torch.cat(outputs, 1)
