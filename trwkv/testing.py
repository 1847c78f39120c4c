"""Tools for testing the ops: cases to compute, float64 truth with its condition, and the only tolerances there are.

A float32 result is allowed an error of `FLOAT32_ULPS` half-ulps of its *condition*: the sum of the magnitudes of all
terms that make it up, the scale below which no float32 summation can promise anything. A result in a narrower type is
allowed 1.5 times one rounding to that type on top: of every element 1.5 times the largest rounding error there is, of
the root mean square of every channel 1.5 times that of rounding the true values (and a quarter of the float32 part).
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from trwkv.ops import WkvOutput
from trwkv.ops.wkv.reference import EMPTY_EXP, aggregate, step_wkv

FLOAT32_ULPS = 32.0
FLOAT64_TOLERANCE = 1e-12
ROUNDINGS = 1.5
ROUNDINGS_TRUNCATED = 2.1  # Triton's interpreter truncates float32 to bfloat16 where a GPU rounds
VANISHING_SHARE = 2.0**-64  # gradients of tokens that weigh less than this everywhere may underflow to zero


@dataclass
class WkvCase:
    """Inputs of one call, and gradients to send back: `grad_state` is that of the true final sums (num, den)."""

    w: Tensor
    u: Tensor
    k: Tensor
    v: Tensor
    weights: Tensor | None
    initial_state: Tensor | None
    grad_output: Tensor
    grad_state: Tensor | None

    def inputs(self) -> dict[str, Tensor]:
        names = ("w", "u", "k", "v", "weights", "initial_state")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def call(self, op: Any, **options: Any) -> WkvOutput:
        """Runs `op`, one of the public functions."""
        return op(
            self.w, self.u, self.k, self.v, weights=self.weights, initial_state=self.initial_state,
            output_final_state=True, **options,
        )  # fmt: skip

    def to(self, target: Any) -> "WkvCase":
        """The case on another device, or in another dtype."""
        moved: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {name: x if x is None else x.to(target) for name, x in moved.items()}
        return WkvCase(**moved)


def wkv_case(
    B: int,
    T: int,
    P: int,
    C: int,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shared: bool = True,
    weights: str = "none",
    state: str = "none",
    final_gradient: bool = True,
    k_range: float = 4.0,
    u_range: float = 1.0,
    log_decays: tuple[float, float] = (-6.0, 1.5),
    layout: str = "contiguous",
) -> WkvCase:
    """Random inputs. `weights` is "none", "P", "PC" or "BTP"; `state` "none", "zero" or "random".

    k is uniform in +-k_range, u in +-u_range, and log(-w) in `log_decays` (w from -1e-6 to -80: (-13.8, 4.4)).
    `layout` "strided" gives k and v as every other element of a wider, transposed tensor.
    """
    g = torch.Generator().manual_seed(seed)

    def uniform(*shape: int, low: float = -1.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=g)

    narrow = torch.float32 if dtype != torch.float64 else torch.float64
    shape = (B, T, C) if shared else (B, T, P, C)
    w = -torch.exp(uniform(P, C, low=log_decays[0], high=log_decays[1]))
    u = u_range * uniform(P, C)
    k = k_range * uniform(*shape)
    v = torch.randn(*shape, generator=g)
    shapes = {"P": (P,), "PC": (P, C), "BTP": (B, T, P)}
    aggregation = None if weights == "none" else uniform(*shapes[weights])
    initial = None
    if state != "none":
        initial = torch.randn(B, 3, P, C, generator=g)
        initial[:, 1] = initial[:, 1].abs() + 0.1
        initial[:, 2] *= k_range
        if state == "zero":
            initial[:, :2] = 0.0
            if (
                k_range > 10 or u_range > 10
            ):  # the derivative by an absent state of finite exponent can overflow
                initial[:, 2] = EMPTY_EXP
    grad_output = torch.randn(*((B, T, P, C) if aggregation is None else (B, T, C)), generator=g)
    grad_state = torch.randn(B, 2, P, C, generator=g).to(narrow) if final_gradient else None
    k, v, grad_output = k.to(dtype), v.to(dtype), grad_output.to(dtype)
    if layout == "strided":
        k, v = _strided(k), _strided(v)
    return WkvCase(
        w.to(narrow), u.to(narrow), k, v,
        aggregation if aggregation is None else aggregation.to(dtype),
        initial if initial is None else initial.to(narrow), grad_output, grad_state,
    )  # fmt: skip


def _strided(x: Tensor) -> Tensor:
    wide = torch.full((*x.shape[:-2], x.shape[-1] * 2, x.shape[-2]), float("nan"), dtype=x.dtype)
    view = wide[..., ::2, :].transpose(-1, -2)
    view.copy_(x)
    return view


def true_sums(state: Tensor, exponent: Tensor) -> Tensor:
    """(num, den) of a state in units of e^exponent, float64: comparable between states of any representation."""
    num, den, exp = state.double().unbind(1)
    scale = torch.exp((exp.detach() - exponent).clamp(max=700.0))
    return torch.stack([num * scale, den * scale], dim=1)


def gradients(case: WkvCase, run: Any, exponent: Tensor) -> dict[str, Tensor]:
    """Gradients of `case`'s inputs under `run(case) -> (output, final_state)`."""
    leaves = {
        name: x.detach().clone(memory_format=torch.preserve_format) for name, x in case.inputs().items()
    }
    for x in leaves.values():
        x.requires_grad_()
    traced = WkvCase(**{f.name: leaves.get(f.name, getattr(case, f.name)) for f in fields(case)})
    output, final_state = run(traced)
    outputs, grads = [output], [case.grad_output.to(output.dtype)]
    if case.grad_state is not None:
        outputs.append(true_sums(final_state, exponent))
        grads.append(case.grad_state.double())
    got = torch.autograd.grad(outputs, list(leaves.values()), grads, materialize_grads=True)
    return dict(zip(leaves, got, strict=True))


@dataclass
class WkvTruth:
    """Float64 results of a case and their conditions, by name: "output", "state", and the inputs' gradients."""

    values: dict[str, Tensor]
    conditions: dict[str, Tensor]
    exponent: Tensor


def wkv_truth(case: WkvCase) -> WkvTruth:
    """Computes a case in float64 by the step loop, and how well each result is conditioned."""
    exact = case.to(torch.float64)

    def reference(c: WkvCase) -> tuple[Tensor, Tensor]:
        return step_wkv(c.w, c.u, c.k, c.v, c.weights, c.initial_state)

    output, state = reference(exact)
    exponent = state[:, 2].detach()
    values = {"output": output, "state": true_sums(state, exponent)}
    values |= gradients(exact, reference, exponent)
    return WkvTruth(values, _conditions(exact, values["state"]), exponent)


def shares(case: WkvCase) -> Tensor:
    """What each token, and first the initial state, weighs in each y: [B, T + 1, 1 + T, P, C], row T the final state.

    A direct softmax in float64, independent of both oracles.
    """
    w, u = case.w.double(), case.u.double()
    k = (case.k.unsqueeze(2) if case.k.ndim == 3 else case.k).double()
    B, T = k.shape[:2]
    t = torch.arange(T + 1)
    lag = (t[:, None] - 1 - t[None, :T])[..., None, None]
    own = (lag == -1) & (t[:, None, None, None] < T)
    logits = torch.where(own, u, lag * w) + k[:, None]
    logits = torch.where(own | (lag >= 0), logits, float("-inf"))
    start = torch.full((B, *w.shape), float("-inf"), dtype=torch.float64)
    if case.initial_state is not None:
        _, den, exp = case.initial_state.double().unbind(1)
        start = torch.where(den > 0, den.clamp(min=1e-300).log() + exp, float("-inf"))
    start = start[:, None] + t[:, None, None] * w
    everything = torch.cat([start[:, :, None], logits.expand(B, T + 1, T, *w.shape)], dim=2)
    return torch.softmax(everything, dim=2).nan_to_num(0.0)


def _conditions(case: WkvCase, state: Tensor) -> dict[str, Tensor]:
    """Sum of the magnitudes of the terms of each result, or a close upper bound, broadcastable to its shape."""
    share = shares(case)
    P = case.w.shape[0]
    T = case.k.shape[1]
    v = case.v.unsqueeze(2) if case.v.ndim == 3 else case.v
    size = v.abs().amax((0, 1)).expand(case.w.shape)  # [P, C]: largest value there is to average
    if case.initial_state is not None:
        num, den, _ = case.initial_state.unbind(1)
        size = torch.maximum(size, (num / den.clamp(min=1e-300)).nan_to_num(0.0).abs().amax(0))
    ones = torch.ones(P, dtype=torch.float64)
    weights = ones if case.weights is None else case.weights.abs()
    y_size = size.expand(1, 1, *case.w.shape)
    conditions = {
        "output": y_size
        if case.weights is None
        else aggregate(y_size.expand(*case.k.shape[:2], -1, -1), weights)
    }
    g = case.grad_output.abs() if case.grad_output.ndim == 4 else case.grad_output.abs().unsqueeze(2)
    g_y = g * (
        weights.reshape(1, 1, *weights.shape) if weights.ndim == 2 else weights[..., None]
    )  # [B, T, P, C]
    g_y = g_y.expand(*case.k.shape[:2], *case.w.shape)
    g_rows = torch.cat([g_y, torch.zeros_like(g_y[:, :1])], dim=1)
    spread = 2 * size
    if (
        case.grad_state is not None
    ):  # the final sums as one more row, with derivatives by log weight of its own
        sums = state.abs()
        from_state = (
            case.grad_state[:, 0].abs() * sums[:, 1] + (case.grad_state[:, 1].abs() * sums[:, 1]) / size
        )
        g_rows[:, -1] = from_state
    received = torch.einsum("btipc,btpc->bipc", share, g_rows)  # by the initial state and by every token
    lag = torch.arange(T + 1)[:, None] - torch.arange(T + 1)[None]
    lags = torch.einsum("btipc,ti->btpc", share, lag.clamp(min=0).double())
    own = torch.diagonal(share[:, :T, 1:], dim1=1, dim2=2).permute(0, 3, 1, 2)  # [B, T, P, C]
    total = received[:, 1:].sum(2) if case.k.ndim == 3 else received[:, 1:]
    total_spread = (received[:, 1:] * spread).sum(2) if case.k.ndim == 3 else received[:, 1:] * spread
    conditions |= {
        "state": torch.stack([state[:, 1] * size, state[:, 1]], dim=1),
        "v": _visible(total),
        "k": _visible(total_spread),
        "w": (g_rows * lags * spread).sum((0, 1)),
        "u": (g_y * own * spread).sum((0, 1)),
    }
    if case.weights is not None:
        reduced = {1: (0, 1, 3), 2: (0, 1), 3: (3,)}[case.weights.ndim]
        conditions["weights"] = (g * size).expand(*case.k.shape[:2], *case.w.shape).sum(reduced)
    if case.initial_state is not None:
        conditions["initial_state"] = _initial_condition(case, g_rows, size)
    return conditions


def _visible(condition: Tensor) -> Tensor:
    """At least what makes `VANISHING_SHARE` of the channel's largest an error that is allowed."""
    floor = VANISHING_SHARE / (FLOAT32_ULPS * 2.0**-24) * condition.amax(1, keepdim=True)
    return torch.maximum(condition, floor)


def _initial_condition(case: WkvCase, g_rows: Tensor, size: Tensor) -> Tensor:
    """By the state's true sums: what a state of den = 1 and the same exponent would weigh, over the true weight."""
    if case.initial_state is None:
        raise ValueError("case: expected one with an initial state; got None")
    num, den, exp = case.initial_state.unbind(1)
    lacking = (den == 0) & (num == 0)
    probe = torch.stack([num, torch.where(lacking, 1.0, den), torch.where(lacking, exp - 100.0, exp)], dim=1)
    probing = WkvCase(case.w, case.u, case.k, case.v, None, probe, case.grad_output, None)
    by_num = (shares(probing)[:, :, 0] * g_rows).sum(1) / probe[:, 1]
    by_num = torch.where(lacking, by_num * torch.exp(torch.tensor(100.0, dtype=torch.float64)), by_num)
    by_den = by_num * 2 * size
    return torch.stack([by_num, by_den, num.abs() * by_num + den.abs() * by_den], dim=1)


def assert_accurate(name: str, actual: Tensor, truth: WkvTruth, *, truncates: bool = False) -> None:
    """Fails unless `actual` is within the tolerance of its dtype of the true value of that name.

    `truncates`: it comes from Triton's interpreter, which cuts float32 off where a GPU rounds it to bfloat16. Then
    every element may err by a whole unit in the last place, and their root mean square says nothing.
    """
    value = truth.values[name]
    if actual.shape != value.shape:
        raise AssertionError(f"{name}: expected shape {list(value.shape)}; got {list(actual.shape)}")
    if not torch.isfinite(actual).all():
        raise AssertionError(f"{name}: {int((~torch.isfinite(actual)).sum())} values are not finite")
    error = (actual.double().cpu() - value).abs()
    condition = truth.conditions[name].expand(value.shape)
    roundings = ROUNDINGS_TRUNCATED if truncates else ROUNDINGS
    allowed = allowed_error(value, condition, actual.dtype, roundings)
    if not (error <= allowed).all():
        worst = int((error / allowed.clamp(min=1e-300)).argmax())
        at = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), value.shape))
        raise AssertionError(
            f"{name}{list(at)}: got {actual[at].item():.9g}, true {value[at].item():.9g}: "
            f"error {error[at].item():.3g}, allowed {allowed[at].item():.3g} "
            f"(condition {condition[at].item():.3g})"
        )
    if not (truncates and actual.dtype == torch.bfloat16):
        _assert_channels(name, error, value, condition, actual.dtype)


def allowed_error(
    value: Tensor, condition: Tensor, dtype: torch.dtype, roundings: float = ROUNDINGS
) -> Tensor:
    """Largest error allowed for each element of a result computed in float32 (float64) and rounded to `dtype`."""
    if dtype == torch.float64:
        return FLOAT64_TOLERANCE * condition + 1e-300
    arithmetic = FLOAT32_ULPS * 2.0**-24 * condition + 1e-37
    if dtype == torch.float32:
        return arithmetic
    return arithmetic + roundings * half_ulp(value, dtype)


def half_ulp(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Largest error of rounding `value` to `dtype` once."""
    info = torch.finfo(dtype)
    exponent = torch.floor(torch.log2(value.abs().clamp(min=info.tiny)))
    return torch.exp2(exponent) * info.eps / 2


def _assert_channels(name: str, error: Tensor, value: Tensor, condition: Tensor, dtype: torch.dtype) -> None:
    """Root mean square over everything but the last axis, against a quarter of what a single element may err."""
    if value.ndim < 2 or value.numel() // value.shape[-1] < 32:
        return
    computed_in = torch.float64 if dtype == torch.float64 else torch.float32
    axes = tuple(range(value.ndim - 1))
    rounding = value.to(dtype).double() - value if dtype in (torch.bfloat16, torch.float16) else 0.0 * value
    arithmetic = allowed_error(value, condition, computed_in) / 4
    rms = error.square().mean(axes).sqrt()
    allowed = ((ROUNDINGS * rounding).square() + arithmetic.square()).mean(axes).sqrt()
    if not (rms <= allowed).all():
        c = int((rms / allowed).argmax())
        raise AssertionError(
            f"{name}, channel {c}: root mean square error {rms[c].item():.3g}, allowed {allowed[c].item():.3g}"
        )


def fuse_interpreted_multiply_add() -> None:
    """Makes Triton's interpreter round `tl.fma` on float32 once, as every GPU does; as it comes it rounds twice.

    What a kernel adds below the last place (the defect of a slow decay) would be lost in the interpreter alone.
    """
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        if x.data.dtype != "float32":
            return TensorHandle(x.data * y.data + z.data, z.dtype.scalar)
        exact = x.data.astype("float64") * y.data + z.data  # the product exactly; the sum to float64
        return TensorHandle(exact.astype("float32"), z.dtype.scalar)

    InterpreterBuilder.create_fma = create_fma
