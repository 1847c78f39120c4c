"""Unnormalised access: adding states, what is built from them, and derivatives of any order."""

import pytest
import torch

from trwkv.ops import merge_wkv_states, wkv_states
from trwkv.ops.wkv.reference import EMPTY_EXP
from trwkv.testing import allowed_error
from trwkv.testing.tolerances import assert_within

BACKENDS = ["torch", "triton", "reference"]


def inputs(
    T: int = 9, P: int = 2, C: int = 3, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    w, u = -torch.rand(P, C, generator=g, dtype=dtype), torch.randn(P, C, generator=g, dtype=dtype)
    k, v = torch.randn(2, 2, T, C, generator=g, dtype=dtype) * torch.tensor([3.0, 1.0]).view(2, 1, 1, 1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return tuple(x.to(device, dtype) for x in (w, u, k, v))


def bidirectional(w, u, k, v, backend):
    """As the docstring of `wkv_states` shows it."""
    P = w.shape[0]
    left = wkv_states(w, k, v, backend=backend).states
    right = wkv_states(w, k, v, reverse=True, backend=backend).states
    k, v = (x.unsqueeze(2).expand(-1, -1, P, -1) for x in (k, v))
    own = torch.stack([v, torch.ones_like(v), u + k], dim=1)
    num, den, _ = merge_wkv_states(left, right, own).unbind(1)
    return num / den


def written_out(w, u, k, v, weight):
    """The same in float64, as one softmax over all tokens: y, its gradients for `weight`, and their conditions."""
    w, u, k, v = (x.detach().double().requires_grad_() for x in (w, u, k, v))
    t = torch.arange(k.shape[1], device=k.device)
    lag = (t[:, None] - t[None]).abs()[..., None, None] - 1  # [T, T, 1, 1]
    share = (torch.where(lag < 0, u, lag * w) + k[:, None, :, None]).softmax(2)  # [B, T, T, P, C]
    y = (share * v[:, None, :, None]).sum(2)
    grads = torch.autograd.grad((y * weight).sum(), (w, u, k, v))
    size = v.detach().abs().max()
    pull = share.detach() * weight.abs()[:, :, None]  # of token i on what y_t hands back
    conditions = [
        (pull * lag.clamp(min=0)).sum((0, 1, 2)) * 2 * size,
        (pull * (lag < 0)).sum((0, 1, 2)) * 2 * size,
        pull.sum((1, 3)) * 2 * size,
        pull.sum((1, 3)),
    ]
    return [y.detach(), *grads], [size.expand(y.shape), *conditions]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1, 100])
def test_a_bidirectional_wkv(backend: str, scale: int) -> None:
    w, u, k, v = inputs()
    u, k = ((4 * x).round() / 4 * scale for x in (u, k))  # so that u + k is exact
    leaves = [x.detach().requires_grad_() for x in (w, u, k, v)]
    y = bidirectional(*leaves, backend)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.device)
    results = [y.detach(), *torch.autograd.grad((y * weight).sum(), leaves)]
    for name, got, value, condition in zip(
        "ywukv", results, *written_out(*leaves, weight.double()), strict=True
    ):
        value, condition = value.cpu(), condition.cpu()
        assert_within(name, got, value, allowed_error(value, condition, torch.float32))


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("reverse", [False, True])
def test_first_and_second_derivatives(backend: str, reverse: bool) -> None:
    w, _, k, v = (x.requires_grad_() for x in inputs(T=3, C=2, dtype=torch.float64))
    state = torch.tensor([0.5, 0.7, -0.3], dtype=torch.float64)[:, None, None].expand(2, 3, 2, 2)
    state = state.to(k.device).contiguous().requires_grad_()

    def run(w, k, v, state):
        out = wkv_states(
            w, k, v, initial_state=state, output_final_state=True, reverse=reverse, backend=backend
        )
        return tuple(x[:, :2] * x[:, 2:].exp() for x in out)

    assert torch.autograd.gradcheck(run, (w, k, v, state))
    assert torch.autograd.gradgradcheck(run, (w, k, v, state))


def test_packed_derivatives() -> None:
    w, _, k, v = inputs(T=5, dtype=torch.float64)
    k, v = k[:1].requires_grad_(), v[:1].requires_grad_()
    state = torch.rand(3, 3, 2, 3, dtype=torch.float64, device=k.device, requires_grad=True)
    cu_seqlens = torch.tensor([0, 2, 2, 5])

    def run(w, k, v, state):
        out = wkv_states(w, k, v, initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens)
        return tuple(x[:, :2] * x[:, 2:].exp() for x in out)

    assert torch.autograd.gradcheck(run, (w.requires_grad_(), k, v, state))


def test_merging_adds_the_sums() -> None:
    g = torch.Generator().manual_seed(0)
    states = torch.randn(4, 2, 3, 5, 3, generator=g, dtype=torch.float64)
    states[:, :, 1].abs_()
    states.requires_grad_()
    merged = merge_wkv_states(*states)

    def sums(x):
        return x[:, :2] * x[:, 2:].exp()

    torch.testing.assert_close(sums(merged), sum(sums(x) for x in states))
    assert torch.autograd.gradcheck(lambda *x: sums(merge_wkv_states(*x)), tuple(states.unbind(0)))


def test_merging_in_float32_is_accurate_whatever_the_units() -> None:
    """The same sums in units 1e-38 to 1e38, mantissas down to the smallest normal number."""
    unit = torch.tensor([0.0, 87.0, -87.0, 300.0])
    exact = torch.tensor([[0.3, 1.0], [-0.2, 0.5]], dtype=torch.float64)  # (num, den) of two states
    for shift in unit.tolist():
        for low in (0.0, 87.0):
            a = torch.tensor([*(exact[0] * torch.exp(torch.tensor(-low).double())), shift + low])
            b = torch.tensor([*exact[1], shift])
            num, den, exp = (
                merge_wkv_states(a.float().view(1, 3, 1), b.float().view(1, 3, 1)).flatten().double()
            )
            got = (torch.stack([num, den]) * torch.exp(exp - shift)).float()
            limit = allowed_error(exact.sum(0), exact.abs().sum(0), torch.float32)
            assert_within("sums", got, exact.sum(0), limit)


def test_merging_with_nothing() -> None:
    state = torch.tensor([0.3, 0.5, -200.0]).view(1, 3, 1)
    empty = torch.tensor([0.0, 0.0, 300.0]).view(1, 3, 1).requires_grad_()
    num, den, exp = merge_wkv_states(state, empty).detach().flatten().double()
    assert abs(float(num / den) - 0.6) < 1e-6
    assert abs(float(den.log() + exp - torch.tensor(0.5).log() + 200)) < 1e-4
    nothing = merge_wkv_states(empty, empty)
    assert (nothing[:, :2] == 0).all()
    assert nothing[0, 2].item() == pytest.approx(EMPTY_EXP)
    nothing.sum().backward()
    assert torch.isfinite(empty.grad).all()
    torch.testing.assert_close(
        merge_wkv_states(state)[:, 0] / merge_wkv_states(state)[:, 1], state[:, 0] / state[:, 1]
    )
