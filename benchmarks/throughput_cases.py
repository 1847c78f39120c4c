"""What is measured: the work, who can do it, and what the right answer is.

A contender computes the WKV of one `Inputs`; those that know nothing of perspectives are called once for each. The
right answer comes from the float64 reference, on channels spread over all of them (channels do not interact).
"""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trwkv.ops import multi_perspective_wkv, reference_wkv

MODES = ("forward", "forward+backward", "decode")
LAYOUTS = ("aggregated", "separate", "own")
DECODE_TOKENS = 32
"""Tokens decoded, one call each, per sample of the mode "decode"."""
MAX_TOKENS = {"reference": 256, "transformers": 2048}
"""Loops over the tokens are timed on short sequences only: their backward takes time in proportion to T^2."""

_CHECKED_CHANNELS = 16
_SEGMENT = 256
#: Largest error allowed, as a share of the largest magnitude in the tensor: far above rounding, far below a mistake.
_LIMITS = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Case:
    """One piece of work. `T` is `DECODE_TOKENS` for the mode "decode".

    Layouts: "aggregated" shares k and v and returns the weighted sum over the perspectives; "separate" shares them and
    returns every perspective's output; "own" has one k and v per perspective and returns the weighted sum.
    """

    mode: str
    B: int
    T: int
    C: int
    P: int
    layout: str
    dtype: torch.dtype
    device: str

    def __str__(self) -> str:
        return f"{self.mode}, {self.B}x{self.T}x{self.C}, P = {self.P}"

    @property
    def tokens(self) -> int:
        """Tokens per timed call: a decoding step is one per sequence."""
        return self.B if self.mode == "decode" else self.B * self.T

    @property
    def necessary_bytes(self) -> int:
        """Bytes that any implementation must read or write once per timed call; w, u and weights are left out.

        Forward: read k and v, write the output. Backward: read k, v and the output's gradient, write the gradients of
        k and v. A decoding step reads and writes the float32 state as well.
        """
        inputs = 2 * (self.P if self.layout == "own" else 1)
        outputs = self.P if self.layout == "separate" else 1
        elements = inputs + outputs
        if self.mode == "forward+backward":
            elements += 2 * inputs + outputs
        state = 2 * 3 * self.P * self.B * self.C * 4 if self.mode == "decode" else 0
        return elements * self.tokens * self.C * self.dtype.itemsize + state


@dataclass(frozen=True)
class Inputs:
    """Arguments of the op; with P = 1 without the P axis. `grad_output` is what the backward starts from."""

    w: Tensor
    u: Tensor
    k: Tensor
    v: Tensor
    weights: Tensor | None
    grad_output: Tensor

    def differentiable(self) -> dict[str, Tensor]:
        return {n: x for n, x in vars(self).items() if n != "grad_output" and x is not None}


def make_inputs(case: Case) -> Inputs:
    """The same random numbers for the same case on every machine: decays from e^-5 to e^1 per step, as RWKV-4's."""
    random = torch.Generator().manual_seed(0)
    per = (case.P,) if case.P > 1 else ()
    vectors, tokens = (*per, case.C), (case.B, case.T, case.C)
    own = (case.B, case.T, *per, case.C)
    time_decay = torch.rand(vectors, generator=random) * 6 - 5
    k_shape = own if case.layout == "own" else tokens
    k, v = (torch.randn(k_shape, generator=random) for _ in range(2))
    grad_output = torch.randn(own if case.layout == "separate" else tokens, generator=random)
    u = torch.randn(vectors, generator=random) / 2
    weights = None
    if case.P > 1 and case.layout != "separate":
        weights = torch.rand(vectors, generator=random).to(case.device)
    k, v, grad_output = (x.to(case.device, case.dtype) for x in (k, v, grad_output))
    return Inputs(-time_decay.exp().to(case.device), u.to(case.device), k, v, weights, grad_output)


@dataclass(frozen=True)
class Contender:
    """An implementation.

    Attributes:
        name: as in tables.
        run: (decay, u, k, v, weights, state) -> (output, state); no state in, none out. The decay is w, or
            `log(-w)` where `log_decay` says so.
        fresh_state: (B, the shape of w, device) -> the state before the first token.
        device: the only type of device it runs on, if there is just one.
        log_decay: it takes RWKV-4's time_decay instead of w.
        max_tokens: longest sequence worth timing.
        many_calls: it takes one perspective, so P of them are P calls and a sum.
    """

    name: str
    run: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, Any], tuple[Tensor, Any]]
    fresh_state: Callable[[int, Sequence[int], str], Any]
    device: str | None = None
    log_decay: bool = False
    max_tokens: int | None = None
    many_calls: bool = False

    def native(self, inputs: Inputs) -> Inputs:
        """`inputs` with the decay in the form that this implementation takes."""
        return replace(inputs, w=torch.log(-inputs.w)) if self.log_decay else inputs


def contenders(device: str) -> dict[str, Contender]:
    """All that can run on `device` with what is installed here, by name."""
    names = ["torch", "triton", "reference"] if device == "cuda" else ["torch", "reference"]
    found = [_backend(name) for name in names]
    if importlib.util.find_spec("transformers"):
        found.append(_peer("transformers", _transformers_loop, _transformers_state))
    if device == "cuda" and importlib.util.find_spec("fla"):
        found.append(_peer("flash-linear-attention", _fla_recurrent, _fla_state))
    return {contender.name: contender for contender in found}


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

    return Contender(name, run, fresh_state, max_tokens=MAX_TOKENS.get(name))


def _peer(name: str, one: Callable, one_state: Callable) -> Contender:
    """A contender out of a function of one perspective."""

    def run(decay, u, k, v, weights, state):
        if decay.ndim == 1:
            return one(decay, u, k, v, state)
        outputs, states = [], []
        for p in range(decay.shape[0]):
            kp, vp = (k, v) if k.ndim == 3 else (k[:, :, p], v[:, :, p])
            y, s = one(decay[p], u[p], kp, vp, None if state is None else state[p])
            outputs.append(y if weights is None else weights[p].to(y.dtype) * y)
            states.append(s)
        return torch.stack(outputs, 2) if weights is None else sum(outputs), states

    def fresh_state(B, shape, device):
        *perspectives, C = shape
        return (
            [one_state(B, C, device) for _ in range(perspectives[0])]
            if perspectives
            else one_state(B, C, device)
        )

    return Contender(name, run, fresh_state, log_decay=True, max_tokens=MAX_TOKENS.get(name), many_calls=True)


def _transformers_loop(decay, u, k, v, state):
    from transformers.models.rwkv.modeling_rwkv import rwkv_linear_attention_cpu

    return rwkv_linear_attention_cpu(decay, u, k, v, state=state, return_state=state is not None)


def _transformers_state(B, C, device):
    empty = torch.zeros(B, C, device=device)
    return [empty, empty, empty - 1e38]


def _fla_recurrent(decay, u, k, v, state):
    from fla.ops.rwkv4 import fused_recurrent_rwkv4

    fresh = _fla_state(k.shape[0], k.shape[2], k.device) if state is None else state
    output, final = fused_recurrent_rwkv4(decay, u, k, v, fresh)
    return output, None if state is None else final


def _fla_state(B, C, device):
    state = torch.zeros(B, 3, 1, C, device=device)
    state[:, 2] = -1e38
    return state


def work(case: Case, contender: Contender, inputs: Inputs) -> Callable[[], dict[str, Tensor]]:
    """The function to time. It returns the results by name: "output", and gradients by the input's name."""
    native = contender.native(inputs)
    if case.mode == "decode":
        return lambda: {"output": _decode(contender, native)}
    if case.mode == "forward":

        def forward():
            with torch.no_grad():
                return {
                    "output": contender.run(native.w, native.u, native.k, native.v, native.weights, None)[0]
                }

        return forward
    leaves = {name: x.detach().requires_grad_() for name, x in native.differentiable().items()}

    def forward_backward():
        output, _ = contender.run(*(leaves.get(name) for name in ("w", "u", "k", "v", "weights")), None)
        grads = torch.autograd.grad(output, tuple(leaves.values()), native.grad_output)
        return {"output": output.detach(), **dict(zip(leaves, grads, strict=True))}

    return forward_backward


@torch.no_grad()
def _decode(contender: Contender, x: Inputs) -> Tensor:
    state = contender.fresh_state(x.k.shape[0], x.w.shape, str(x.k.device))
    outputs = []
    for t in range(x.k.shape[1]):
        y, state = contender.run(x.w, x.u, x.k[:, t : t + 1], x.v[:, t : t + 1], x.weights, state)
        outputs.append(y)
    return torch.cat(outputs, 1)


def exact_results(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """What `work` should return, in float64 and on `checked_channels` only, from the reference."""
    channels = checked_channels(case.C)
    leaves = {n: x[..., channels].cpu().double() for n, x in inputs.differentiable().items()}
    differentiate = case.mode == "forward+backward"
    for x in leaves.values():
        x.requires_grad_(differentiate)
    w, u, k, v = (leaves[name] for name in "wukv")
    outputs, state = [], None
    for ks, vs in zip(k.split(_SEGMENT, 1), v.split(_SEGMENT, 1), strict=True):
        y, state = reference_wkv(
            w, u, ks, vs, weights=leaves.get("weights"), initial_state=state, output_final_state=True
        )
        outputs.append(y)
    output = torch.cat(outputs, 1)
    if not differentiate:
        return {"output": output}
    grads = torch.autograd.grad(
        output, tuple(leaves.values()), inputs.grad_output[..., channels].cpu().double()
    )
    return {"output": output.detach(), **dict(zip(leaves, grads, strict=True))}


def checked_channels(C: int) -> list[int]:
    return torch.linspace(0, C - 1, min(C, _CHECKED_CHANNELS)).long().tolist()


def errors(
    case: Case, contender: Contender, inputs: Inputs, results: dict[str, Tensor], exact: dict[str, Tensor]
) -> dict[str, float]:
    """Largest error of every result as a share of its largest exact magnitude; infinite if any is not finite."""
    found = {}
    for name, right in exact.items():
        result = results[name]
        if not bool(torch.isfinite(result).all()):
            found[name] = float("inf")
            continue
        got = result[..., checked_channels(case.C)].cpu().double()
        if name == "w" and contender.log_decay:  # d/dw = d/dtime_decay / w
            got = got / inputs.w[..., checked_channels(case.C)].cpu().double()
        found[name] = float((got - right).abs().max() / right.abs().max())
    return found


def error_limit(dtype: torch.dtype) -> float:
    return _LIMITS[dtype]
