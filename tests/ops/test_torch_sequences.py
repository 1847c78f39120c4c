"""What is particular to sequences, direction and states on the chunked PyTorch backend: bits, groups, slots, units."""

import math
import random
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from trwkv.ops.wkv import torch_chunk, torch_chunk_block, torch_sequences, torch_states
from trwkv.ops.wkv.reference import EMPTY_EXP
from trwkv.ops.wkv.torch_chunk import CHUNK
from trwkv.ops.wkv.torch_sequences import chunk_backward, chunk_forward, chunk_states, empty_checkpoint
from trwkv.testing import FLOAT32_ULPS, IMPLEMENTATIONS, Case, truth_of, wkv_case, wkv_states_case

PARTS = ("w", "u", "k", "v", "weights", "initial_state")
BOUNDS = {
    "one": (0, 37),
    "a chunk each": (0, CHUNK, 2 * CHUNK),
    "equal, adjacent": (0, 19, 38, 57),
    "equal, apart": (0, 19, 24, 43, 43, 62),
    "empty at both ends": (0, 0, 3, 20, 20),
    "single tokens": (0, 1, 2, 3, 35, 36),
}


def raw(case: Case) -> tuple[Tensor | None, ...]:
    return tuple(getattr(case, name) for name in PARTS)


def run(case: Case, bounds: list[int] | None, reverse: bool) -> dict[str, Tensor]:
    """All results by name, and the gradients by what they are of; the final state's exponent is ignored."""
    inputs = raw(case)
    output, state, checkpoint = chunk_forward(*inputs, bounds, reverse, save=True)
    silent, _, _ = chunk_forward(*inputs, bounds, reverse, save=False)
    assert torch.equal(silent.isnan(), output.isnan())
    assert torch.equal(silent.nan_to_num(), output.nan_to_num())
    grad_state = torch.cat([case.grad_state, case.grad_state[:, :1]], dim=1)
    grads = chunk_backward(case.grad_output, grad_state, *inputs, bounds, reverse, checkpoint)
    states, last = chunk_states(case.w, case.k, case.v, case.initial_state, bounds, reverse)
    results = {"output": output, "final state": state, "states": states, "last": last}
    return results | {name: x for name, x in zip(PARTS, grads, strict=True) if x is not None}


def separately(case: Case, reverse: bool) -> dict[str, Tensor]:
    """Every sequence alone, flipped by hand, with the dense functions."""
    parts = []
    for alone in case.unpacked():
        parts.append(run(alone.flipped() if reverse else alone, None, False))
    axes = dict.fromkeys(("output", "k", "v", "weights"), 1) | {"states": 2}
    joined = {}
    for name in parts[0]:
        pieces = [part[name] for part in parts]
        axis = axes.get(name)
        if name == "weights" and case.weights.ndim < 3:
            axis = None
        if axis is not None and reverse:
            pieces = [x.flip(axis) for x in pieces]
        joined[name] = torch.cat(pieces, dim=axis or 0)
    return joined


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("P, C", [(1, 1), (6, 1), (3, 5), (6, 17)])
def test_packed_is_separate_to_the_bit(name: str, reverse: bool, P: int, C: int) -> None:
    """Also with six perspectives, whose sum has an order, and few columns, which change what `Tensor.sum` does."""
    for seed, (weights, shared, k_range, state, dtype) in enumerate((
        ("none", True, 4.0, "random", torch.float32),
        ("BTP", True, 60.0, "none", torch.bfloat16),
        ("PC", False, 60.0, "zero", torch.float64),
    )):  # fmt: skip
        bounds = BOUNDS[name]
        case = wkv_case(
            1, bounds[-1], P, C, seed=seed, weights=weights, shared=shared, k_range=k_range, state=state,
            dtype=dtype, growing=0.2, cu_seqlens=bounds, reverse=reverse,
        )  # fmt: skip
        packed, alone = run(case, list(bounds), reverse), separately(case, reverse)
        for part, x in alone.items():
            is_shared = part in ("w", "u") or (part == "weights" and case.weights.ndim < 3)
            assert is_shared or torch.equal(packed[part], x), part


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("options", [{}, {"k_range": 60.0, "log_decays": (-13.8, 4.4), "growing": 0.5}])
def test_several_blocks(reverse: bool, options: dict) -> None:
    """Blocks end at other chunks when sequences share a batch: no bit may depend on that."""
    bounds = (0, 100, 140, 240, 340, 340, 345)
    case = wkv_case(
        1, 345, 3, 50, weights="BTP", state="random", cu_seqlens=bounds, reverse=reverse, **options
    )
    alone = separately(case, reverse)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_chunk_block, "BLOCK_ELEMENTS", 1000)
        packed = run(case, list(bounds), reverse)
    for part in ("output", "final state", "states", "last", "k", "v", "weights", "initial_state"):
        assert torch.equal(packed[part], alone[part]), part


@pytest.mark.parametrize("bounds", [None, (0, 30, 33, 63, 63, 80)])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("key", ["wkv/torch-chunk", "wkv_states/torch"])
def test_against_the_truth(bounds, reverse: bool, key: str) -> None:
    implementation = IMPLEMENTATIONS[key]
    for seed, options in enumerate((
        {"state": "random"},
        {"shared": False, "dtype": torch.bfloat16, "mixed_dtypes": True},
        {"state": "zero", "dtype": torch.float64, "growing": 0.5},
        {"k_range": 300.0, "log_decays": (-13.8, 4.4), "growing": 0.5, "state": "random"},
    )):  # fmt: skip
        more = {"weights": ("none", "P", "PC", "BTP")[seed]} if key.startswith("wkv/") else {}
        case = implementation.op.case(
            1 if bounds else 2, 80, 2, 5, seed=seed, cu_seqlens=bounds, reverse=reverse, **options, **more
        )
        implementation.check(case, truth_of(implementation.op, case))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("bounds", [(0, 20, 40, 43, 63), (0, 21, 42, 63)])
def test_nan_stays_in_its_sequence(reverse: bool, bounds: tuple[int, ...]) -> None:
    case = wkv_case(1, 63, 2, 9, weights="BTP", state="random", cu_seqlens=bounds, reverse=reverse)
    whole = run(case, list(bounds), reverse)
    hit = slice(*bounds[1:3])
    for name in ("k", "v", "weights", "grad_output"):
        getattr(case, name)[:, hit] = float("nan")
    case.initial_state[1] = float("nan")
    case.grad_state[1] = float("nan")
    poisoned = run(case, list(bounds), reverse)
    tokens = [t for t in range(63) if t not in range(*bounds[1:3])]
    others = [n for n in range(len(bounds) - 1) if n != 1]
    for name in ("output", "k", "v", "weights"):
        assert torch.equal(poisoned[name][:, tokens], whole[name][:, tokens]), name
        assert poisoned[name][:, hit].isnan().all(), name
    assert torch.equal(poisoned["states"][:, :, tokens], whole["states"][:, :, tokens])
    for name in ("final state", "last", "initial_state"):
        assert torch.equal(poisoned[name][others], whole[name][others]), name


@pytest.mark.parametrize("reverse", [False, True])
def test_work_grows_with_the_number_of_lengths(reverse: bool, monkeypatch) -> None:
    """800 sequences of three lengths: three dense calls, and no more operations than for 8 sequences."""
    batches = []
    original = torch_chunk.chunk_forward

    def counting(w, u, k, *rest, **options):
        batches.append(tuple(k.shape[:2]))
        return original(w, u, k, *rest, **options)

    monkeypatch.setattr(torch_chunk, "chunk_forward", counting)
    operations = []
    for N in (8, 800):
        lengths = ([2, 3, 3, 1] * N)[:N]
        bounds = [0]
        for length in lengths:
            bounds.append(bounds[-1] + length)
        case = wkv_case(1, bounds[-1], 2, 3, state="random", cu_seqlens=tuple(bounds), reverse=reverse)
        with Operations() as counter:
            run(case, bounds, reverse)
        operations.append(counter.calls)
    assert batches[6:] == [(200, 1), (200, 2), (400, 3)] * 2  # with and without a checkpoint
    assert operations[0] == operations[1]


class Operations(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts operations and the largest tensor any of them makes."""

    calls = largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls += 1
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("bounds", [(0, 40), (0, 5, 25, 45, 48), (0, 7, 7, 14, 21)])
def test_adjacent_sequences_are_not_copied(bounds: tuple[int, ...], monkeypatch) -> None:
    seen = {}
    original = torch_chunk.chunk_forward

    def looking(w, u, k, *rest, **options):
        seen[k.shape[1]] = k
        return original(w, u, k, *rest, **options)

    monkeypatch.setattr(torch_chunk, "chunk_forward", looking)
    case = wkv_case(1, bounds[-1], 1, 3)
    chunk_forward(*raw(case), list(bounds), False, save=False)
    for begin, end in pairwise(bounds):
        if end > begin:
            part = seen[end - begin]
            assert part.untyped_storage().data_ptr() == case.k.untyped_storage().data_ptr()


def test_dense_calls_go_straight_through(monkeypatch) -> None:
    """Neither copies nor operations of their own: decoding is made of such calls."""
    case = wkv_case(2, 3, 1, 4)
    calls = []
    for name in ("chunk_forward", "chunk_backward", "empty_checkpoint"):
        monkeypatch.setattr(torch_chunk, name, lambda *x, name=name, **options: calls.append((name, x)))
    monkeypatch.setattr(torch_states, "chunk_states", lambda *x: calls.append(("chunk_states", x)))
    with Operations() as counter:
        chunk_forward(*raw(case), None, False, save=False)
        chunk_backward(case.grad_output, None, *raw(case), None, False, case.k)
        empty_checkpoint(case.w, case.k, None)
        chunk_states(case.w, case.k, case.v, None, None, False)
    assert counter.calls == 0
    expected = [
        ("chunk_forward", raw(case)), ("chunk_backward", (case.grad_output, None, *raw(case), case.k)),
        ("empty_checkpoint", (case.w, case.k)), ("chunk_states", (case.w, case.k, case.v, None)),
    ]  # fmt: skip
    for (name, got), (expected_name, given) in zip(calls, expected, strict=True):
        assert name == expected_name and all(a is b for a, b in zip(got, given, strict=True))


def test_checkpoint_slots_do_not_overlap() -> None:
    draw = random.Random(0)
    for _ in range(200):
        bounds = [0]
        for _ in range(draw.randint(1, 12)):
            bounds.append(bounds[-1] + draw.choice((0, 1, CHUNK - 1, CHUNK, CHUNK + 1, draw.randint(0, 70))))
        slots = [None] * (bounds[-1] // CHUNK + 2 * (len(bounds) - 1))
        for group in torch_sequences._groups(bounds, False, torch.device("cpu")):
            for n, row in zip(group.which.tolist(), group.slots.tolist(), strict=True):
                begin, end = bounds[n : n + 2]
                first = begin // CHUNK + 2 * n
                assert row == list(range(first, first + math.ceil((end - begin) / CHUNK) + 1))
                assert slots[first : row[-1] + 1] == [None] * len(row)
                slots[first : row[-1] + 1] = [n] * len(row)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_checkpoint(shared: bool, dtype: torch.dtype) -> None:
    bounds = (0, 40, 40, 45, 85)
    case = wkv_case(1, 85, 3, 5, shared=shared, dtype=dtype, cu_seqlens=bounds)
    declared = empty_checkpoint(case.w, case.k, 4)
    for reverse in (False, True):
        _, _, checkpoint = chunk_forward(*raw(case), list(bounds), reverse, save=True)
        assert (checkpoint.shape, checkpoint.dtype) == (declared.shape, declared.dtype)
        assert torch.isfinite(checkpoint).all()  # what is not used, too: runs can be compared
        again = checkpoint.clone()
        arguments = (case.grad_output, None, *raw(case), list(bounds), reverse, checkpoint)
        first, second = chunk_backward(*arguments), chunk_backward(*arguments)
        assert torch.equal(checkpoint, again)
        assert all(torch.equal(a, b) for a, b in zip(first[:4], second[:4], strict=True))
        assert chunk_forward(*raw(case), list(bounds), reverse, save=False)[2].numel() == 0
    assert empty_checkpoint(case.w, case.k, None).shape == torch_chunk.empty_checkpoint(case.w, case.k).shape


@pytest.mark.parametrize("weights", ["P", "PC"])
def test_shared_gradients_are_rounded_once(weights: str) -> None:
    """What many groups add up is rounded to bfloat16 at the end: as if it had been asked for in float64."""
    bounds = [0]
    for length in range(1, 30):
        bounds.append(bounds[-1] + length)
    case = wkv_case(1, bounds[-1], 2, 5, weights=weights, mixed_dtypes=True, cu_seqlens=tuple(bounds))
    narrow = [getattr(case, name).bfloat16() for name in ("w", "u", "weights")]
    for name, x in zip(("w", "u", "weights"), narrow, strict=True):
        setattr(case, name, x)
    rounded = run(case, bounds, False)
    for name, x in zip(("w", "u", "weights"), narrow, strict=True):
        setattr(case, name, x.double())
    exact = run(case, bounds, False)
    for name in ("w", "u", "weights"):
        assert exact[name].dtype == torch.float64
        assert torch.equal(rounded[name], exact[name].bfloat16()), name


def test_without_final_gradient() -> None:
    bounds = (0, 20, 23, 43)
    case = wkv_case(1, 43, 2, 3, state="random", cu_seqlens=bounds)
    _, state, checkpoint = chunk_forward(*raw(case), list(bounds), False, save=True)
    none = chunk_backward(case.grad_output, None, *raw(case), list(bounds), False, checkpoint)
    zero = chunk_backward(case.grad_output, 0 * state, *raw(case), list(bounds), False, checkpoint)
    assert all(a is b or torch.equal(a, b) for a, b in zip(none, zero, strict=True))


# States.


@pytest.mark.parametrize("k_range", [4.0, 300.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_units_of_states(k_range: float, dtype: torch.dtype) -> None:
    case = wkv_states_case(2, 50, 3, 7, dtype=dtype, k_range=k_range, log_decays=(-13.8, 4.4), growing=0.5)
    states, last = chunk_states(case.w, case.k, case.v, None, None, False)
    for reverse, bounds in ((False, None), (True, None), (False, [0, 100])):
        rows = case.k if bounds is None else case.k.flatten(0, 1).unsqueeze(0)
        result, _ = chunk_states(case.w, rows, rows, None, bounds, reverse)
        assert result.movedim(1, 0).is_contiguous()
    for state in (states[:, :, 1:], last):
        assert (state[:, 1] > math.exp(-1.001)).all() and (state[:, 1] <= 1).all()
        assert torch.equal(state[:, 2], state[:, 2].round())
    empty = states[:, :, 0].movedim(1, 0)
    assert not empty[:2].any() and (empty[2] == torch.tensor(EMPTY_EXP, dtype=states.dtype)).all()


@pytest.mark.parametrize("reverse", [False, True])
def test_first_state_is_the_initial_one_as_given(reverse: bool) -> None:
    """With its own exponent even if it is empty: in any other unit its gradient could not be expressed."""
    case = wkv_states_case(1, 40, 2, 3, cu_seqlens=(0, 18, 18, 40), state="random", reverse=reverse)
    case.initial_state[0, :2] = 0.0
    case.initial_state[2, 1] = 1e35
    states, last = chunk_states(case.w, case.k, case.v, case.initial_state, [0, 18, 18, 40], reverse)
    first = [17, 39] if reverse else [0, 18]
    assert torch.equal(states[0].movedim(1, 0)[first], case.initial_state[[0, 2]])
    assert torch.equal(last[1], case.initial_state[1])
    states, last = chunk_states(case.w, case.k, case.v, None, [0, 18, 18, 40], reverse)
    assert not states[:, :2, first].any() and (states[:, 2, first] <= -9e37).all()
    assert not last[1, :2].any() and (last[1, 2] <= -9e37).all()


@pytest.mark.parametrize("w", [-80.0, -79.3, -1e-6, 0.0, 1e-6, 79.3, 80.0])
def test_states_of_long_sequences(w: float) -> None:
    """65536 tokens: values near the largest there are stay finite, and constant k have den = e^k sum_i e^(i w)."""
    T = 1 << 16
    g = torch.Generator().manual_seed(0)
    k, v = 300 - 600 * torch.rand(1, T, 2, generator=g), 3.4e38 * (1 - 2 * torch.rand(1, T, 2, generator=g))
    states, last = chunk_states(torch.full((1, 2), w), k, v, None, None, False)
    assert torch.isfinite(states).all() and torch.isfinite(last).all()
    assert (states[:, 1, 1:] >= 1e-30).all() and (states[:, 1] <= 1).all()

    _, last = chunk_states(
        torch.full((1, 2), w), torch.full_like(k, 250.3), torch.ones_like(v), None, None, False
    )
    exact = torch.tensor(w).double()  # what float32 makes of it
    i = torch.arange(T, dtype=torch.float64)
    k64 = torch.tensor(250.3).double()
    log_den = k64 + torch.logsumexp(i * exact, 0)
    num, den, exp = last.double().unbind(1)
    assert torch.equal(num, den)
    assert (torch.log(den) + exp - log_den).abs().max() <= FLOAT32_ULPS * 2.0**-24


def test_absurd_logits() -> None:
    """Masked tokens, and tokens that outweigh everything: no NaN, and each has the weight it asked for."""
    g = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 1, 60, 3, generator=g).unbind(0)
    w = -torch.ones(2, 3)
    plain, _ = chunk_states(w, k, v, None, None, False)
    k[:, 20], v[:, 20], k[:, 40], v[:, 40] = -1e38, 0.0, 1e38, 0.0
    states, last = chunk_states(w, k, v, None, None, False)
    assert torch.isfinite(states).all() and torch.isfinite(last).all()
    assert torch.equal(states[:, :, :21], plain[:, :, :21])
    assert (states[:, 1, 41:] > 0).all() and not states[:, 0, 41:].any() and (states[:, 2, 41:] > 9e37).all()


def test_states_of_any_sign() -> None:
    """An adjoint is a state without the meaning: den of any sign or zero, num of any size."""
    w, k = -torch.full((1, 1), 0.5), torch.zeros(1, 20, 1)
    for num, den, exp in (
        (3.0, 0.0, 2.0), (1e30, 1e-30, 2.0), (3e38, 0.0, 2.0), (0.0, -1.0, 2.0), (-2.0, -1e3, -7.0),
        (-1.0, -1.0, 0.5),  # the first token cancels it, exactly
    ):  # fmt: skip
        initial = torch.tensor([num, den, exp]).view(1, 3, 1, 1)
        states, _ = chunk_states(w, k, torch.ones_like(k), initial, None, False)
        assert torch.isfinite(states).all()
        t = torch.arange(20, dtype=torch.float64)
        weight = torch.exp(exp - 0.5 * t)
        own = torch.cat([torch.zeros(1), torch.exp(-0.5 * t[:-1]).cumsum(0)]).double()
        got = states.double()[0, :, :, 0, 0]
        for row, start in ((0, num), (1, den)):
            true = start * weight + own
            error = (got[row] * torch.exp(got[2]) - true).abs()
            assert (error <= FLOAT32_ULPS * 2.0**-24 * (abs(start) * weight + own)).all(), (num, den, exp)


@pytest.mark.parametrize("k_range", [4.0, 300.0])
def test_states_are_causal_to_the_bit(k_range: float) -> None:
    case = wkv_states_case(2, 3 * CHUNK + 5, 2, 9, k_range=k_range, log_decays=(-8.0, 3.0), growing=0.3)
    states, _ = chunk_states(case.w, case.k, case.v, None, None, False)
    for cut in range(1, case.tokens, 5):
        short, _ = chunk_states(case.w, case.k[:, :cut], case.v[:, :cut], None, None, False)
        assert torch.equal(short, states[:, :, :cut])


def test_states_need_no_more_than_a_block() -> None:
    """No temporary grows with T, and no loop goes token by token."""
    case = wkv_states_case(1, 4096, 3, 64)
    with Operations() as counter:
        states, _ = chunk_states(case.w, case.k, case.v, None, None, False)
    assert counter.largest == states.nbytes
    with Operations() as counter:
        chunk_states(case.w[:, :1], case.k[..., :1], case.v[..., :1], None, None, False)
    assert counter.calls < 4096 // 2
