"""What is particular to the chunked PyTorch backend: its bounds and fallback, chunk edges, bitwise promises, memory."""

import math

import pytest
import torch
from torch import Tensor

from trwkv.ops import chunk_wkv
from trwkv.ops.wkv import torch_chunk, torch_chunk_block, torch_chunk_bwd
from trwkv.ops.wkv.torch_chunk import CHUNK, chunk_backward, chunk_forward, empty_checkpoint
from trwkv.testing import FLOAT32_ULPS, WkvCase, assert_accurate, gradients, true_sums, wkv_case, wkv_truth

ALL_PARTS = ("w", "u", "k", "v", "weights", "initial_state")


def check(case: WkvCase) -> None:
    truth = wkv_truth(case)
    output, state = case.call(chunk_wkv, backend="torch")
    assert_accurate("output", output, truth)
    assert_accurate("state", true_sums(state, truth.exponent).to(state.dtype), truth)
    for name, grad in gradients(case, lambda c: c.call(chunk_wkv, backend="torch"), truth.exponent).items():
        assert_accurate(name, grad, truth)


def raw(case: WkvCase) -> tuple[Tensor, ...]:
    return tuple(getattr(case, name) for name in ALL_PARTS)


def run(case: WkvCase) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
    output, state, checkpoint = chunk_forward(*raw(case))
    return output, state, chunk_backward(case.grad_output, None, *raw(case), checkpoint)


@pytest.fixture
def exact_columns(monkeypatch) -> list[int]:
    """How many columns each call of the exact path got."""
    counts = []
    original = torch_chunk.walk

    def counting(k, *rest):
        counts.append(k.shape[1])
        return original(k, *rest)

    monkeypatch.setattr(torch_chunk, "walk", counting)
    monkeypatch.setattr(torch_chunk_bwd, "walk", counting)
    return counts


@pytest.mark.parametrize("T", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 5 * CHUNK + 3])
@pytest.mark.parametrize("shared", [True, False])
def test_chunk_edges(T: int, shared: bool, exact_columns: list[int]) -> None:
    check(wkv_case(2, T, 3, 5, shared=shared, weights="BTP", state="random", seed=T))
    assert exact_columns == []


@pytest.mark.parametrize("elements", [1, 40, 200])
def test_blocks_of_any_size(elements: int, monkeypatch) -> None:
    case = wkv_case(2, 4 * CHUNK + 5, 2, 5, weights="PC", state="random")
    whole = run(case)
    monkeypatch.setattr(torch_chunk_block, "BLOCK_ELEMENTS", elements)
    parts = run(case)
    assert torch.equal(whole[0], parts[0])
    assert all(torch.equal(a, b) for a, b in zip(whole[2][2:4], parts[2][2:4], strict=True))
    check(case)


def spike(case: WkvCase, at: int, height: float) -> WkvCase:
    case.k[0, at, 1] += height
    return case


def raised(case: WkvCase, name: str, value: float) -> WkvCase:
    getattr(case, name)[..., 2] = value
    return case


def long_ago(case: WkvCase) -> WkvCase:
    case.w[:] = -1e-3  # a first token that outweighs all others for good
    case.k[:, 0] = 200.0
    return case


OUT_OF_BOUNDS = {
    "rise": lambda c: spike(c, CHUNK + 3, 100.0),
    "first of a chunk": lambda c: spike(c, CHUNK, 100.0),
    "fall": lambda c: spike(c, CHUNK + 3, -100.0),
    "last": lambda c: spike(c, 2 * CHUNK - 1, 290.0),
    "carried": long_ago,
    "large u": lambda c: raised(c, "u", 290.0),
    "small u": lambda c: raised(c, "u", -290.0),
    "growth": lambda c: raised(c, "w", 2.5),
    "large v": lambda c: raised(c, "v", 1e30),
}


@pytest.mark.parametrize("name", OUT_OF_BOUNDS)
@pytest.mark.parametrize("shared", [True, False])
def test_out_of_bounds(name: str, shared: bool, exact_columns: list[int]) -> None:
    case = wkv_case(1, 3 * CHUNK + 1, 2, 4, shared=shared, weights="P", log_decays=(-4.0, 3.0), seed=3)
    if name == "large v":  # some gradients would leave float32's range
        case = wkv_case(1, 3 * CHUNK + 1, 2, 4, shared=shared, final_gradient=False, seed=3)
        case.grad_output *= 1e-30
    check(OUT_OF_BOUNDS[name](case))
    assert exact_columns
    assert max(exact_columns) <= 4 * case.k.numel() // case.k.shape[1]  # the channels concerned, not all


def test_only_the_column_concerned(exact_columns: list[int]) -> None:
    case = wkv_case(2, 4 * CHUNK, 2, 8, log_decays=(1.0, 1.5))
    run(spike(case, CHUNK + 3, 100.0))
    assert exact_columns == [
        1,
        2,
        2,
    ]  # its own chunk; for outputs and gradients also the next, not those after


def test_a_spike_that_fits_the_carried_state_costs_one_column(exact_columns: list[int]) -> None:
    case = wkv_case(2, 4 * CHUNK, 2, 8, log_decays=(-6.0, -5.0))
    run(spike(case, CHUNK + 3, 40.0))
    assert exact_columns == [1, 1, 1]


def test_at_the_edge_of_the_fast_path() -> None:
    """Found by fuzzing when |k - s| went to 30: its rounding alone, 2^-20, was half of what is allowed."""
    check(wkv_case(B=1, T=128, P=4, C=16, weights="P", final_gradient=False, k_range=40.0))


@pytest.mark.parametrize("k_range", [10.0, 60.0, 300.0])
@pytest.mark.parametrize("u_range", [1.0, 300.0])
def test_mixed_ranges(k_range: float, u_range: float) -> None:
    case = wkv_case(
        1, 150, 2, 24, k_range=k_range, u_range=u_range, log_decays=(-13.8, 4.4), weights="PC", state="random"
    )
    check(case)


@pytest.mark.parametrize("T", [1, CHUNK + 1, 150, 300])
@pytest.mark.parametrize("log_decays", [(-6.0, -1.0), (-13.8, 4.4), (3.0, 4.38)])
@pytest.mark.parametrize("growing", [0.5, 1.0])
def test_growing_sums(T: int, log_decays: tuple[float, float], growing: float) -> None:
    """Decays above zero, up to 80: old tokens gain weight, by up to e^24000."""
    for seed, (k_range, u_range, weights, state, dtype) in enumerate((
        (4.0, 1.0, "none", "random", torch.float32),
        (300.0, 300.0, "PC", "zero", torch.bfloat16),
        (60.0, 60.0, "BTP", "random", torch.float64),
    )):  # fmt: skip
        case = wkv_case(
            2, T, 2, 3, seed=seed, growing=growing, log_decays=log_decays, k_range=k_range, u_range=u_range,
            weights=weights, state=state, dtype=dtype, shared=seed != 1,
        )  # fmt: skip
        check(case)


@pytest.mark.parametrize("decay", [-1e-4, -1e-6, 0.0, 1e-6, 1e-3])
def test_slow_decay_over_many_chunks(decay: float) -> None:
    """w near zero, of which e^w in float32 misses 3 % at 1e-6, k near 300, whose ulp is 3e-5, and 65536 tokens."""
    T, C = 1 << 16, 2
    g = torch.Generator().manual_seed(0)
    w, u = decay * torch.tensor([[1.0, 1.37]]), torch.zeros(1, C)
    k = 295 + torch.rand(1, T, C, generator=g)
    v = torch.randn(1, T, C, generator=g) + torch.linspace(-1, 1, T)[None, :, None]
    grad_output, grad_state = torch.randn(1, T, 1, C, generator=g), torch.randn(1, 2, 1, C, generator=g)
    output, state, checkpoint = chunk_forward(w, u, k, v, None, None)

    leaves = [x.double().requires_grad_() for x in (w, u, k, v)]
    true, sums = by_cumulated_sums(*leaves)  # sums in units of e^295
    unit = state[:, 2].double() - 295
    scale = sums[:, 1:].detach() * torch.exp(-unit)
    error = (state[:, :2] - sums * torch.exp(-unit)).abs()
    assert (error <= FLOAT32_ULPS * 2.0**-24 * scale * v.abs().max()).all()
    grads = torch.autograd.grad(
        [true, sums / scale * torch.exp(-unit)], leaves, [grad_output.double(), grad_state.double()]
    )
    assert (output - true).abs().max() <= 1e-6 * v.abs().max()
    sent = torch.cat([grad_state / scale.float(), grad_state[:, :1]], dim=1)
    got = chunk_backward(grad_output, sent, w, u, k, v, None, None, checkpoint)
    sizes = [x.abs().max() for x in grads]
    sizes[0] = T * grad_state.abs().sum(1).max() * v.abs().max()  # num's and den's parts nearly cancel
    for x, y, size in zip(got, grads, sizes, strict=False):
        assert (x - y).abs().max() <= FLOAT32_ULPS * 2.0**-24 * size


def by_cumulated_sums(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs and final (num, den) in units of e^295, in float64; for |T w| below 100."""
    T = k.shape[1]
    t = torch.arange(T, dtype=torch.float64)[:, None, None]
    k, v = k[:, :, None] - 295, v[:, :, None]
    weight, own = torch.exp(k - (t + 1) * w), torch.exp(u + k - t * w)
    num, den = (torch.cat([torch.zeros_like(x[:, :1]), x.cumsum(1)], dim=1) for x in (weight * v, weight))
    y = (num[:, :-1] + own * v) / (den[:, :-1] + own)
    return y, torch.stack([num[:, -1], den[:, -1]], dim=1) * torch.exp(T * w)


@pytest.mark.parametrize("k_range", [4.0, 40.0, 300.0])
def test_causality_is_bitwise(k_range: float) -> None:
    case = wkv_case(
        2, 2 * CHUNK + 5, 2, 9, k_range=k_range, log_decays=(-8.0, 3.0), weights="PC", final_gradient=False
    )
    output, _, _ = run(case)
    for cut in range(1, case.k.shape[1], 3):
        silent = wkv_case(
            **_shape(case), k_range=k_range, log_decays=(-8.0, 3.0), weights="PC", final_gradient=False
        )
        silent.grad_output[:, cut:] = 0
        before = run(silent)
        silent.k[:, cut:] = 250 * torch.randn(
            silent.k[:, cut:].shape, generator=torch.Generator().manual_seed(cut)
        )
        silent.v[:, cut:] *= -1000
        after = run(silent)
        assert torch.equal(after[0][:, :cut], output[:, :cut])
        for name, a, b in zip(ALL_PARTS, before[2], after[2], strict=True):
            if name in ("k", "v"):
                assert torch.equal(a[:, :cut], b[:, :cut])
                assert not b[:, cut:].any()
            elif a is not None:
                assert torch.equal(a, b), name
        short = chunk_forward(
            case.w, case.u, case.k[:, :cut], case.v[:, :cut], case.weights, None, save=False
        )
        assert torch.equal(short[0], output[:, :cut])


def _shape(case: WkvCase) -> dict[str, int]:
    B, T, C = case.k.shape
    return {"B": B, "T": T, "P": case.w.shape[0], "C": C}


@pytest.mark.parametrize("k_range", [4.0, 60.0])
def test_neighbours_are_bitwise_irrelevant(k_range: float) -> None:
    case = wkv_case(3, 4 * CHUNK + 1, 2, 33, k_range=k_range, weights="PC", final_gradient=False)
    output, state, grads = run(case)
    case.k[1:], case.v[1:] = float("nan"), float("nan")
    poisoned = run(case)
    assert torch.equal(poisoned[0][0], output[0])
    assert torch.equal(poisoned[1][0], state[0])
    assert all(torch.equal(a[0], b[0]) for a, b in zip(grads[2:4], poisoned[2][2:4], strict=True))
    half = slice(17, None)
    alone, _, _ = chunk_forward(
        case.w[:, half],
        case.u[:, half],
        case.k[:1, :, half],
        case.v[:1, :, half],
        case.weights[:, half],
        None,
    )
    assert torch.equal(alone, output[:1, :, half])


@pytest.mark.parametrize("k_range", [4.0, 300.0])
def test_lone_columns_are_not_summed_differently(k_range: float) -> None:
    """A single row of a single channel, of more perspectives than `Tensor.sum` takes one by one."""
    case = wkv_case(3, CHUNK + 1, 7, 1, k_range=k_range, weights="PC", final_gradient=False)
    whole = run(case)
    for b in range(3):
        alone = case.mapped(lambda x, axes, b=b: x if axes.batch is None else x[b : b + 1])
        output, state, grads = run(alone)
        assert torch.equal(output, whole[0][b : b + 1]) and torch.equal(state, whole[1][b : b + 1])
        assert all(torch.equal(x, y[b : b + 1]) for x, y in zip(grads[2:4], whole[2][2:4], strict=True))


def test_backward_can_be_repeated() -> None:
    """It leaves the checkpoint as it is, also in float64, and where an empty state has a huge exponent."""
    case = wkv_case(2, 40, 2, 3, dtype=torch.float64, state="zero")
    case.initial_state[:, 2] = 1e30
    _, _, checkpoint = chunk_forward(*raw(case))
    kept = checkpoint.clone()
    first = chunk_backward(case.grad_output, None, *raw(case), checkpoint)
    assert torch.equal(checkpoint, kept)
    second = chunk_backward(case.grad_output, None, *raw(case), checkpoint)
    assert all(x is y or torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_runs_are_bitwise_repeatable() -> None:
    case = wkv_case(2, 500, 3, 40, weights="BTP", state="random", k_range=40.0)
    first, second = run(case), run(case)
    assert all(
        torch.equal(a, b) for a, b in zip((*first[:2], *first[2]), (*second[:2], *second[2]), strict=True)
    )


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("weights", ["none", "P", "PC", "BTP"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("state", ["none", "random"])
def test_single_token(shared: bool, weights: str, dtype: torch.dtype, state: str) -> None:
    """The step for decoding equals a chunk's first token bitwise, and its state that of the chunked path."""
    case = wkv_case(2, 1, 3, 5, shared=shared, weights=weights, dtype=dtype, state=state)
    with torch.no_grad():
        alone = case.call(chunk_wkv, backend="torch")
    output, final_state, _ = chunk_forward(*raw(case))
    assert torch.equal(alone.output, output)
    assert alone.final_state.shape == final_state.shape and alone.final_state.dtype == final_state.dtype
    sums = true_sums(final_state, final_state[:, 2].double())
    torch.testing.assert_close(
        true_sums(alone.final_state, final_state[:, 2].double()), sums, rtol=1e-6, atol=0
    )


def test_decoding_in_bfloat16_keeps_its_state() -> None:
    case = wkv_case(1, 300, 2, 6, dtype=torch.bfloat16, log_decays=(-8.0, -2.0))
    whole = case.call(chunk_wkv, backend="torch")
    state = None
    for t in range(300):
        _, state = chunk_wkv(
            case.w, case.u, case.k[:, t : t + 1], case.v[:, t : t + 1],
            initial_state=state, output_final_state=True, backend="torch",
        )  # fmt: skip
    exp = whole.final_state[:, 2].double()
    torch.testing.assert_close(true_sums(state, exp), true_sums(whole.final_state, exp), rtol=3e-5, atol=1e-6)


def test_no_tokens() -> None:
    case = wkv_case(2, 0, 3, 5, weights="PC", state="random")
    output, state, checkpoint = chunk_forward(*raw(case))
    assert output.shape == (2, 0, 5)
    assert torch.equal(state, case.initial_state) and state is not case.initial_state
    grads = chunk_backward(case.grad_output, torch.ones_like(state), *raw(case), checkpoint)
    assert grads[2].shape == case.k.shape
    assert not any(x.any() for x in grads[:5])
    num, den, _ = case.initial_state.unbind(1)
    assert torch.equal(grads[5][:, :2], torch.ones_like(grads[5][:, :2]))
    torch.testing.assert_close(grads[5][:, 2], num + den)


@pytest.mark.parametrize("T", [1, CHUNK + 1])
@pytest.mark.parametrize("shared", [True, False])
def test_no_rows(T: int, shared: bool) -> None:
    case = wkv_case(0, T, 3, 5, shared=shared, weights="BTP", state="random")
    output, state, grads = run(case)
    assert output.shape == (0, T, 5) and state.shape == (0, 3, 3, 5)
    assert [x.shape for x in grads] == [x.shape for x in raw(case)]
    assert not any(x.any() for x in grads)
    assert chunk_forward(*raw(case), save=False)[0].shape == (0, T, 5)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_checkpoint(shared: bool, dtype: torch.dtype) -> None:
    for T in (0, 1, CHUNK, CHUNK + 1, 40 * CHUNK):
        case = wkv_case(2, T, 3, 5, shared=shared, dtype=dtype)
        _, state, checkpoint = chunk_forward(*raw(case))
        declared = empty_checkpoint(case.w, case.k)
        assert (checkpoint.shape, checkpoint.dtype) == (declared.shape, declared.dtype)
        assert checkpoint.numel() <= (math.ceil(T / 16) + 1) * state.numel()
        assert torch.isfinite(checkpoint).all()
        assert chunk_forward(*raw(case), save=False)[2].numel() == 0


class _Peak(torch.utils._python_dispatch.TorchDispatchMode):
    """Largest tensor made by any operation."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return result


def test_memory_is_bounded() -> None:
    """No temporary grows with T: beyond inputs, results and checkpoint, only what one block needs."""
    case = wkv_case(1, 4096, 3, 64, weights="PC", final_gradient=False)
    block = 2 * CHUNK * torch_chunk_block.block_elements(3) * 4  # bytes of (num, den) of a block's tokens
    with _Peak() as forward:
        _, _, checkpoint = chunk_forward(*raw(case))
    with _Peak() as backward:
        chunk_backward(case.grad_output, None, *raw(case), checkpoint)
    assert max(forward.largest, backward.largest) <= max(block, case.k.nbytes)
