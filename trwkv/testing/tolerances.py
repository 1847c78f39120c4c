"""The only tolerances there are, and the truth that results are held against.

A float32 result is allowed an error of `FLOAT32_ULPS` half-ulps of its *condition*: the sum of the magnitudes of all
terms that make it up, the scale below which no float32 summation can promise anything. A result in a narrower type is
allowed 1.5 times one rounding to that type on top: of every element 1.5 times the largest rounding error there is, of
the root mean square of every channel 1.5 times that of rounding the true values (and a quarter of the float32 part).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

FLOAT32_ULPS = 32.0
FLOAT64_TOLERANCE = 1e-12
ROUNDINGS = 1.5
ROUNDINGS_TRUNCATED = 2.1  # Triton's interpreter truncates float32 to bfloat16 where a GPU rounds
VANISHING_SHARE = 2.0**-64  # gradients from tokens that weigh less than this everywhere may underflow to zero
VANISHED = VANISHING_SHARE / (FLOAT32_ULPS * 2.0**-24)
"""As a weight in a condition: what makes `VANISHING_SHARE` an error that is allowed."""


@dataclass
class Truth:
    """Float64 results of a case and their conditions, by name: "output", "state", and the inputs' gradients.

    `units` is what the results were made comparable with (see `OpContract`).
    """

    values: dict[str, Tensor]
    conditions: dict[str, Tensor]
    units: dict[str, Tensor]

    @property
    def exponent(self) -> Tensor:
        """Of a state (num, den, exp): the exponents, [B, P, C], in whose units its true sums are given."""
        return self.units["state"].squeeze(1)


def visible(condition: Tensor, axis: int) -> Tensor:
    """At least what makes `VANISHING_SHARE` of the largest along an axis an error that is allowed."""
    if not condition.numel():
        return condition
    return torch.maximum(condition, VANISHED * condition.amax(axis, keepdim=True))


def assert_accurate(name: str, actual: Tensor, truth: Truth, *, truncates: bool = False) -> None:
    """Fails unless `actual` is within the tolerance of its dtype of the true value of that name.

    `truncates`: it comes from Triton's interpreter, which cuts float32 off where a GPU rounds it to bfloat16. Then
    every element may err by a whole unit in the last place, and their root mean square says nothing.
    """
    value = truth.values[name]
    condition = truth.conditions[name].expand(value.shape)
    roundings = ROUNDINGS_TRUNCATED if truncates else ROUNDINGS
    error = assert_within(name, actual, value, allowed_error(value, condition, actual.dtype, roundings))
    if not (truncates and actual.dtype == torch.bfloat16):
        _assert_channels(name, error, value, condition, actual.dtype)


def assert_within(name: str, actual: Tensor, value: Tensor, allowed: Tensor) -> Tensor:
    """Fails unless every element is finite and errs by no more than allowed; returns the errors, float64."""
    if actual.shape != value.shape:
        raise AssertionError(f"{name}: expected shape {list(value.shape)}; got {list(actual.shape)}")
    if not torch.isfinite(actual).all():
        raise AssertionError(f"{name}: {int((~torch.isfinite(actual)).sum())} values are not finite")
    error = (actual.double().cpu() - value).abs()
    if not (error <= allowed).all():
        worst = int((error / allowed.clamp(min=1e-300)).argmax())
        at = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), value.shape))
        raise AssertionError(
            f"{name}{list(at)}: got {actual[at].item():.9g}, true {value[at].item():.9g}: "
            f"error {error[at].item():.3g}, allowed {allowed[at].item():.3g}"
        )
    return error


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
    if value.ndim < 2 or value.numel() // max(1, value.shape[-1]) < 32:
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
