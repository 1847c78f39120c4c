"""Poison and guard bands show what they are there to show."""

import pytest
import torch

from trwkv.testing import Guard, poisoned_allocations


def whole(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_fresh_memory_is_nan_between_bands_of_nan(dtype: torch.dtype) -> None:
    with poisoned_allocations():
        made = [
            torch.empty(3, 4, dtype=dtype),
            torch.empty_like(torch.zeros(4, 3, dtype=dtype).T),
            torch.zeros(2, dtype=dtype).new_empty((3, 4)),
            torch.empty_strided((3, 4), (1, 3), dtype=dtype),
        ]
    for x in made:
        assert x.shape == (3, 4)
        assert x.dtype == dtype
        assert whole(x).isnan().all()
        assert x.data_ptr() % 16 == 0
    assert [x.stride() for x in made] == [(4, 1), (1, 3), (4, 1), (1, 3)]


def test_integers_hold_a_sentinel() -> None:
    with poisoned_allocations():
        assert (torch.empty(5, dtype=torch.int32) == -1).all()


@pytest.mark.parametrize(("at", "side"), [(-1, "before"), (12, "after")])
def test_a_write_outside_is_reported(at: int, side: str) -> None:
    message = rf"\[3, 4\] torch.float32: memory was written {side}"
    with pytest.raises(AssertionError, match=message), poisoned_allocations():
        x = torch.empty(3, 4)
        whole(x)[x.storage_offset() + at] = 0.0


def test_a_write_of_nan_outside_is_reported() -> None:
    with pytest.raises(AssertionError, match="memory was written after"), poisoned_allocations():
        x = torch.empty(3, 4)
        whole(x)[x.storage_offset() + 12] = float("nan")


def test_writes_inside_and_results_after_are_fine() -> None:
    with poisoned_allocations():
        x = torch.empty(3, 4).fill_(2.0)
    assert (x == 2).all()
    assert torch.empty(3).untyped_storage().nbytes() == 12  # and nothing is poisoned any more


def test_copies_keep_values_and_strides() -> None:
    guard = Guard()
    for x in (
        torch.randn(3, 4).T,
        torch.randn(3, 1, 4).expand(3, 5, 4),
        torch.randn(4, 6)[:, ::2],
        torch.tensor(3.0),
    ):
        copy = guard.copy(x, "x")
        assert torch.equal(copy, x)
        assert copy.stride() == x.stride()
    guard.check()
    whole(copy)[0] = 1.0
    with pytest.raises(AssertionError, match="x: memory was written before"):
        guard.check()
