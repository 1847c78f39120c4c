"""What is done to a case: layouts, slices, orders; and that it means the same as done to the results."""

import pytest
import torch

from trwkv.testing import IMPLEMENTATIONS, LAYOUTS, Axes, Case, laid_out, truth_of, wkv_case, wkv_states_case
from trwkv.testing.cases import on_device

X = torch.arange(2 * 3 * 4, dtype=torch.float32).reshape(2, 3, 4)
DRAWS = [wkv_case, wkv_states_case]


def assert_equal_cases(a: Case, b: Case) -> None:
    assert a.reverse == b.reverse
    assert a.bounds == b.bounds
    for first, second in ((a.inputs, b.inputs), (a.grads, b.grads)):
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("layout", ["contiguous", "sliced", "strided", "unaligned"])
def test_layouts_keep_values_among_nan(layout: str) -> None:
    view = laid_out(X, layout)
    assert torch.equal(view, X)
    assert view.is_contiguous() == (layout in ("contiguous", "unaligned"))
    memory = torch.empty(0).set_(view.untyped_storage())
    assert (memory.numel() == X.numel()) == (layout == "contiguous")
    assert int(memory.isnan().sum()) == memory.numel() - X.numel()
    assert (view.storage_offset() % 4 != 0) == (layout in ("unaligned", "sliced"))


def test_expanded_axes_have_stride_0() -> None:
    assert laid_out(X, "expanded", 1).stride() == (0, 4, 1)
    assert laid_out(X, "expanded", 0).stride() == (12, 4, 0)


def test_every_layout_is_mixed_in() -> None:
    strides = {laid_out(X, "mixed", i).stride() for i in range(len(LAYOUTS) - 1)}
    assert len(strides) >= len(LAYOUTS) - 2  # contiguous and unaligned share theirs


def test_moving_keeps_the_layout() -> None:
    view = laid_out(X, "strided")
    assert on_device(view, "cpu").stride() == view.stride()
    assert on_device(view, "meta").is_meta


@pytest.mark.parametrize("draw", DRAWS)
def test_turning_round_twice_changes_nothing(draw) -> None:
    for cu_seqlens in (None, (0, 2, 2, 7)):
        case = draw(B=1, T=7, P=2, C=3, state="random", cu_seqlens=cu_seqlens)
        assert case.flipped().reverse
        assert not torch.equal(case.flipped().k, case.k)
        assert_equal_cases(case.flipped().flipped(), case)


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("reverse", [False, True])
def test_parts_follow_the_running_order(draw, reverse: bool) -> None:
    case = draw(B=2, T=7, P=2, C=3, reverse=reverse)
    assert torch.equal(case.part(0, 3, None).k, case.k[:, 4:] if reverse else case.k[:, :3])
    assert case.positions().tolist() == ([6, 5, 4, 3, 2, 1, 0] if reverse else [0, 1, 2, 3, 4, 5, 6])


def test_positions_of_packed_sequences() -> None:
    case = wkv_case(B=1, T=5, P=1, C=1, cu_seqlens=(0, 2, 2, 5))
    assert case.positions().tolist() == [0, 1, 0, 1, 2]
    case.reverse = True
    assert case.positions().tolist() == [1, 0, 2, 1, 0]
    assert case.sequences == 3


@pytest.mark.parametrize("draw", DRAWS)
def test_another_order_of_packed_sequences(draw) -> None:
    case = draw(B=1, T=5, P=2, C=3, state="random", cu_seqlens=(0, 2, 2, 5))
    moved = case.permuted(torch.tensor([2, 0, 1]))
    assert moved.bounds == [0, 3, 5, 5]
    assert torch.equal(moved.k, torch.cat([case.k[:, 2:], case.k[:, :2]], dim=1))
    assert torch.equal(moved.initial_state, case.initial_state[[2, 0, 1]])
    assert_equal_cases(moved.permuted(torch.tensor([1, 2, 0])), case)


@pytest.mark.parametrize("draw", DRAWS)
def test_sequence_masks(draw) -> None:
    case = draw(B=1, T=5, P=2, C=3, state="random", cu_seqlens=(0, 2, 2, 5))
    marked = case.mapped(lambda x, a: case.sequence_mask(x, a, 2).expand(x.shape))
    assert marked.k[0, :, 0].tolist() == [False, False, True, True, True]
    assert marked.initial_state[:, 0, 0, 0].tolist() == [False, False, True]
    assert not marked.w.any()


@pytest.mark.parametrize("key", ["wkv/reference", "wkv_states/reference"])
def test_truth_of_packed_and_reversed_cases(key: str) -> None:
    """A packed sequence's truth is that of the same rows; gradients of what they share add up."""
    op = IMPLEMENTATIONS[key].op
    rows = op.case(B=2, T=4, P=2, C=3, state="random", reverse=True)

    def concatenated(x: torch.Tensor, axes: Axes) -> torch.Tensor:
        return x if axes.tokens is None else torch.cat(x.split(1), dim=axes.tokens)

    packed = rows.mapped(concatenated, cu_seqlens=torch.tensor([0, 4, 8]))
    a, b = truth_of(op, rows), truth_of(op, packed)
    for name, value in a.values.items():
        expected = concatenated(value, rows.axes[name])
        torch.testing.assert_close(b.values[name], expected, rtol=1e-12, atol=1e-13)


def test_names_that_are_no_input() -> None:
    case = wkv_case(B=1, T=2, P=1, C=1)
    assert case.weights is None
    with pytest.raises(AttributeError, match=r"expected one of w, u, k, v.*got 'q'"):
        _ = case.q
