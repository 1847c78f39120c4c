"""`token_shift_mix`: the kernel against the equation in float64, and what every op promises."""

import pytest
import torch

from trwkv.ops import token_shift_mix
from trwkv.testing import HAS_GPU
from trwkv.testing.contracts import assert_same
from trwkv.testing.memory import poisoned_allocations
from trwkv.testing.tolerances import half_ulp

DEVICE = "cuda" if HAS_GPU else "cpu"
BACKENDS = ["torch", "triton"]
SHAPES = {  # of x and the mixes
    "a decoding step": ((2, 1, 20), [(20,), (20,), (20,)]),
    "wider than a block": ((2, 5, 300), [(300,), (300,)]),
    "one block exactly": ((1, 3, 256), [(256,)]),
    "a mix per perspective": ((2, 3, 20), [(2, 20), (20,), (3, 20)]),
    "streams": ((2, 3, 2, 20), [(20,), (2, 20)]),
    "no token": ((2, 0, 20), [(20,), (2, 20)]),
    "no row": ((0, 2, 20), [(20,), (2, 20)]),
}


def inputs(name: str, dtype=torch.float32, previous=True):
    shape, mixes = SHAPES[name]
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE)

    x = draw(*shape).to(dtype)
    return x, [draw(*m) for m in mixes], draw(shape[0], *shape[2:]).to(dtype) if previous else None


def truth(x, mixes, previous):
    """The equation, one place at a time, in float64; and the sum of its terms' magnitudes."""
    wide = x.double()
    before = torch.zeros_like(wide[:, 0]) if previous is None else previous.double()
    results = []
    for mix in mixes:
        rows, mix64, last = [], mix.to(x.dtype).double(), before
        for t in range(x.shape[1]):
            here, old = (z.unsqueeze(1) if mix.ndim == 2 and x.ndim == 3 else z for z in (wide[:, t], last))
            rows.append(
                (mix64 * here + (1 - mix64) * old, (mix64 * here).abs() + ((1 + mix64.abs()) * old.abs()))
            )
            last = wide[:, t]
        results.append([torch.stack(z, dim=1) for z in zip(*rows, strict=True)])
    return results


@pytest.mark.parametrize("previous", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [n for n in SHAPES if not n.startswith("no ")])
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_float64(backend: str, name: str, dtype: torch.dtype, previous: bool) -> None:
    """Two roundings: of the difference, times the mix, and of the result. The interpreter truncates bfloat16."""
    x, mixes, before = inputs(name, dtype, previous)
    mixes = [mix.to(dtype) for mix in mixes]
    truncates = backend == "triton" and not HAS_GPU and dtype == torch.bfloat16
    for mix, output, (value, scale) in zip(
        mixes, token_shift_mix(x, mixes, before, backend=backend), truth(x, mixes, before), strict=True
    ):
        assert output.dtype == dtype and output.shape == value.shape
        rounding = half_ulp(value, dtype) + half_ulp(scale, dtype) * (1 + mix.abs().double())
        assert ((output.double() - value).abs() <= rounding * (2.1 if truncates else 1.1)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", SHAPES)
def test_kernel_rounds_as_pytorch(name: str, dtype: torch.dtype) -> None:
    """bfloat16 too on a GPU; the interpreter truncates there."""
    x, mixes, before = inputs(name, dtype)
    for kernel, plain in zip(
        token_shift_mix(x, mixes, before, backend="triton"),
        token_shift_mix(x, mixes, before, backend="torch"),
        strict=True,
    ):
        assert_same("output", kernel, plain)


def test_causality_and_independence_of_rows() -> None:
    x, mixes, before = inputs("wider than a block")
    expected = token_shift_mix(x, mixes, before, backend="triton")
    x[0, 3:] = torch.nan
    before[1, 7] = torch.inf
    for output, same in zip(token_shift_mix(x, mixes, before, backend="triton"), expected, strict=True):
        assert_same("row 0", output[0, :3], same[0, :3])
        assert torch.isnan(output[0, 3:]).all()
        assert_same("row 1", output[1, 1:], same[1, 1:])
        assert_same("row 1", output[1, 0, 8:], same[1, 0, 8:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_token_by_token(backend: str) -> None:
    x, mixes, before = inputs("wider than a block")
    whole = token_shift_mix(x, mixes, before, backend=backend)
    for t in range(x.shape[1]):
        last = x[:, t - 1] if t else before
        for output, same in zip(
            token_shift_mix(x[:, t : t + 1], mixes, last, backend=backend), whole, strict=True
        ):
            assert_same("output", output[:, 0], same[:, t])


@pytest.mark.parametrize("name", ["a mix per perspective", "streams", "wider than a block"])
def test_strides_and_memory(name: str) -> None:
    x, mixes, before = inputs(name)
    expected = token_shift_mix(x, mixes, before, backend="triton")
    with poisoned_allocations() as guard:
        outputs = token_shift_mix(
            guard.copy(x.mT.contiguous().mT, "x"),
            [guard.copy(m, "mix") for m in mixes],
            guard.copy(before.mT.contiguous().mT, "previous"),
            backend="triton",
        )
    for output, same in zip(outputs, expected, strict=True):
        assert_same("output", output, same)


@pytest.mark.parametrize("previous", [True, False])
def test_gradients_of_the_plain_form(previous: bool) -> None:
    x, mixes, before = inputs("a mix per perspective", torch.float64, previous)
    leaves = [z.double().requires_grad_() for z in (x, *mixes, *([before] if previous else []))]

    def function(x, a, b, c, before=None):
        return token_shift_mix(x, [a, b, c], before)

    assert torch.autograd.gradcheck(function, leaves)


def test_kernel_has_no_gradient() -> None:
    x, mixes, before = inputs("a decoding step")
    x.requires_grad_()
    with pytest.raises(RuntimeError, match="token_shift_mix: expected no argument that requires"):
        token_shift_mix(x, mixes, before, backend="triton")
    assert token_shift_mix(x, mixes, before)[0].requires_grad


@pytest.mark.parametrize("name", SHAPES)
def test_opcheck(name: str) -> None:
    torch.library.opcheck(torch.ops.trwkv.token_shift_mix, inputs(name))


WRONG = [
    ({"x": torch.ones(2, 20)}, ValueError, r"x: expected shape \[B, T, C\]"),
    ({"x": torch.ones(2, 1, 20).long()}, TypeError, "x: expected one of float32"),
    (
        {"mixes": torch.ones(3, 20)},
        ValueError,
        "mixes: expected a sequence of one to 3 tensors; got a tensor",
    ),
    ({"mixes": []}, ValueError, "mixes: expected a sequence of one to 3 tensors; got 0"),
    ({"mixes": [torch.ones(20)] * 4}, ValueError, "mixes: expected a sequence of one to 3 tensors; got 4"),
    (
        {"mixes": [torch.ones(19)]},
        ValueError,
        r"mixes\[0\]: expected shape \[C\] or \[P, C\] = \[20\]; got \[19\]",
    ),
    ({"mixes": [torch.ones(2, 19)]}, ValueError, r"mixes\[0\]: expected shape \[P, C\] = \[2, 20\]"),
    ({"mixes": ["half"]}, TypeError, r"mixes\[0\]: expected a tensor; got str 'half'"),
    ({"previous": torch.ones(2, 19)}, ValueError, "previous: expected shape"),
    ({"previous": torch.ones(2, 20).half()}, TypeError, "previous: expected one of float32"),
    ({"backend": "cuda"}, ValueError, "backend:"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG, ids=lambda x: x if isinstance(x, str) else "")
def test_wrong_calls(change: dict, error: type, message: str) -> None:
    x, mixes, before = inputs("a decoding step")
    arguments = {"x": x, "mixes": mixes, "previous": before} | change
    with pytest.raises(error, match=message):
        token_shift_mix(
            **{n: z.to(DEVICE) if isinstance(z, torch.Tensor) else z for n, z in arguments.items()}
        )
