"""The tolerance passes one rounding and the noise of float32, and nothing more."""

import pytest
import torch

from trwkv.testing import FLOAT32_ULPS, Truth, allowed_error, assert_accurate, half_ulp


def truth(value: torch.Tensor) -> Truth:
    return Truth({"x": value}, {"x": torch.ones_like(value)}, {})


VALUES = torch.randn(64, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_one_rounding_passes(dtype: torch.dtype) -> None:
    assert_accurate("x", VALUES.to(dtype), truth(VALUES))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_two_roundings_to_a_narrow_type_do_not(dtype: torch.dtype) -> None:
    off = (VALUES + 2 * half_ulp(VALUES, dtype)).to(dtype)
    with pytest.raises(AssertionError, match=r"^x\[\d+, \d+\]: got .*, true .*: error .*, allowed"):
        assert_accurate("x", off, truth(VALUES))


def test_a_biased_rounding_shows_in_the_channel() -> None:
    """Truncating where a GPU rounds: every element passes alone."""
    cut = (VALUES.float().view(torch.int32) & -65536).view(torch.float32).bfloat16()
    with pytest.raises(AssertionError):
        assert_accurate("x", cut, truth(VALUES))
    assert_accurate("x", cut, truth(VALUES), truncates=True)


def test_float32_in_half_ulps_of_the_condition() -> None:
    step = FLOAT32_ULPS * 2.0**-24
    one = VALUES.clone()
    one[7, 2] += 0.9 * step
    assert_accurate("x", one.float(), truth(VALUES))
    one[7, 2] += 0.2 * step
    with pytest.raises(AssertionError, match=r"^x\[7, 2\]"):
        assert_accurate("x", one.float(), truth(VALUES))
    all_off = VALUES + 0.9 * step
    with pytest.raises(AssertionError, match=r"channel \d: root mean square"):
        assert_accurate("x", all_off.float(), truth(VALUES))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_accurate(value: float) -> None:
    x = VALUES.float()
    x[3, 1] = value
    with pytest.raises(AssertionError, match="1 values are not finite"):
        assert_accurate("x", x, truth(VALUES))


def test_shapes_must_be_equal() -> None:
    with pytest.raises(AssertionError, match=r"expected shape \[64, 5\]; got \[64, 1\]"):
        assert_accurate("x", VALUES[:, :1].float(), truth(VALUES))


def test_allowed_error_of_float64() -> None:
    assert (allowed_error(VALUES, torch.ones_like(VALUES), torch.float64) <= 1.01e-12).all()
