"""What is measured: the work, its inputs, and what the right answer is.

The right answer is computed in float64, on channels spread over all of them (channels do not interact).
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from throughput_plain import plain_wkv
from trwkv.ops import reference_wkv

MODES = ("forward", "backward", "forward+backward", "decode", "decode-graph")
"""decode-graph: the decoding steps captured into one CUDA graph, and replayed."""
LAYOUTS = ("aggregated", "separate", "own")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DECODE_TOKENS = 32
"""Tokens decoded, one call each, per sample of the decoding modes."""

_CHECKED_CHANNELS = 16
_SEGMENT = 256
_REFERENCE_TOKENS = 2048
"""Longest sequence compared with the reference, a loop over the tokens: longer ones with `plain_wkv`, in float64."""
_BANK = 2**24 + 43
"""Different random numbers in a tensor; larger ones repeat them (a prime, so that no two rows are alike)."""
#: Largest error allowed, as a share of the largest magnitude in the tensor: far above rounding, far below a mistake.
_LIMITS = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Case:
    """One piece of work. `T` is `DECODE_TOKENS` for the decoding modes.

    Layouts: "aggregated" shares k and v and returns the weighted sum over the perspectives; "separate" shares them and
    returns every perspective's output; "own" has one k and v per perspective and returns the weighted sum. With P = 1
    they are all the same.
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
        return f"{self.mode}, {self.B}x{self.T}x{self.C}, P = {self.P}, {self.layout}, {self.dtype_name}"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def decoding(self) -> bool:
        return self.mode.startswith("decode")

    @property
    def shape(self) -> list[int]:
        """(B, T, C) of one timed call."""
        return [self.B, 1 if self.decoding else self.T, self.C]

    @property
    def tokens(self) -> int:
        """Tokens per timed call: a decoding step is one per sequence."""
        return self.B if self.decoding else self.B * self.T

    @property
    def necessary_bytes(self) -> int:
        """Bytes that any implementation must read or write once per timed call; w, u and weights are left out.

        Forward: read k and v, write the output. Backward: read k, v and the output's gradient, write the gradients of
        k and v. A decoding step reads and writes the float32 state as well.
        """
        inputs = 2 * (self.P if self.layout == "own" else 1)
        outputs = self.P if self.layout == "separate" else 1
        forward, backward = inputs + outputs, 2 * inputs + outputs
        elements = {"backward": backward, "forward+backward": forward + backward}.get(self.mode, forward)
        state = 2 * 3 * self.P * self.B * self.C * 4 if self.decoding else 0
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


def make_inputs(case: Case, *, random: bool = True) -> Inputs:
    """The same random numbers for the same case on every machine: decays from e^-5 to e^1 per step, as RWKV-4's.
    Without `random` k, v and the gradient are whatever memory holds.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(shape: tuple[int, ...]) -> Tensor:
        if not random:
            return torch.empty(shape, dtype=case.dtype, device=case.device)
        size = prod(shape)
        bank = torch.randn(min(size, _BANK), generator=generator).to(case.device, case.dtype)
        return (bank if size <= _BANK else bank.repeat(-(-size // _BANK))[:size]).view(shape)

    per = (case.P,) if case.P > 1 else ()
    vectors, tokens = (*per, case.C), (case.B, case.T, case.C)
    own = (case.B, case.T, *per, case.C)
    time_decay = torch.rand(vectors, generator=generator) * 6 - 5
    k_shape = own if case.layout == "own" else tokens
    k, v = (normal(k_shape) for _ in range(2))
    grad_output = normal(own if case.layout == "separate" else tokens)
    u = torch.randn(vectors, generator=generator) / 2
    weights = None
    if case.P > 1 and case.layout != "separate":
        weights = torch.rand(vectors, generator=generator).to(case.device)
    return Inputs(-time_decay.exp().to(case.device), u.to(case.device), k, v, weights, grad_output)


def exact_results(inputs: Inputs, *, gradients: bool) -> dict[str, Tensor]:
    """The output and the gradients, by the input's name, in float64 and on `checked_channels` only."""
    channels = checked_channels(inputs.k.shape[-1])
    leaves = {n: x[..., channels].cpu().double() for n, x in inputs.differentiable().items()}
    for x in leaves.values():
        x.requires_grad_(gradients)
    w, u, k, v = (leaves[name] for name in "wukv")
    exact: Callable[..., Tensor] = _by_reference if k.shape[1] <= _REFERENCE_TOKENS else plain_wkv
    output = exact(w, u, k, v, leaves.get("weights"))
    if not gradients:
        return {"output": output}
    grads = torch.autograd.grad(
        output, tuple(leaves.values()), inputs.grad_output[..., channels].cpu().double()
    )
    return {"output": output.detach(), **dict(zip(leaves, grads, strict=True))}


def _by_reference(w: Tensor, u: Tensor, k: Tensor, v: Tensor, weights: Tensor | None) -> Tensor:
    """In segments: the backward of the loop takes time in proportion to the square of its length."""
    outputs, state = [], None
    for ks, vs in zip(k.split(_SEGMENT, 1), v.split(_SEGMENT, 1), strict=True):
        y, state = reference_wkv(w, u, ks, vs, weights=weights, initial_state=state, output_final_state=True)
        outputs.append(y)
    return torch.cat(outputs, 1)


def expected(mode: str, exact: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of the exact results that the work of `mode` returns."""
    if mode == "backward":
        return {name: x for name, x in exact.items() if name != "output"}
    return exact if mode == "forward+backward" else {"output": exact["output"]}


def checked_channels(C: int) -> list[int]:
    return torch.linspace(0, C - 1, min(C, _CHECKED_CHANNELS)).long().tolist()


def errors(
    inputs: Inputs, results: dict[str, Tensor], right: dict[str, Tensor], *, log_decay: bool = False
) -> dict[str, float]:
    """Largest error of every result as a share of its largest right magnitude; infinite if any is not finite.

    `right` is from `expected`. With `log_decay` the result "w" is the gradient of log(-w).
    """
    found = {}
    for name, exact in right.items():
        result = results[name]
        if not bool(torch.isfinite(result).all()):
            found[name] = float("inf")
            continue
        channels = checked_channels(inputs.k.shape[-1])
        got = result[..., channels].cpu().double()
        if name == "w" and log_decay:  # d/dw = d/dtime_decay / w
            got = got / inputs.w[..., channels].cpu().double()
        found[name] = float((got - exact).abs().max() / exact.abs().max())
    return found


def error_limit(dtype: torch.dtype) -> float:
    return _LIMITS[dtype]
