"""What a layer launches for one token on the kernels, and that it computes what plain PyTorch does."""

from collections import Counter
from collections.abc import Iterable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trwkv.modules import ChannelMixing, PerspectiveSelector, TimeMixing
from trwkv.testing import HAS_GPU, true_sums

B, C, P = 2, 20, 3
DEVICE = "cuda" if HAS_GPU else "cpu"

TIME = {  # options, and what cannot be fused
    "rwkv4": {},
    "layer": {"n_perspectives": P, "perspective_vectors": ("time_decay", "time_first"), "selector": True},
    "layer, own keys": {"n_perspectives": P, "perspective_vectors": ("time_mix_k",), "selector": True},
    "layer, own receptance": {"n_perspectives": P, "perspective_vectors": ("time_mix_r",), "selector": True},
    "streams": {"n_perspectives": P, "perspective_vectors": ("time_decay", "time_mix_v")},
}


class Launches(TorchDispatchMode):
    """Counts the operators that run on data; views do not."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        if not func.is_view and name != "_unsafe_view":
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


def randomize(module: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return module.to(DEVICE)


def time_mixing(options: dict, backend: str) -> TimeMixing:
    options = dict(options)
    if options.pop("selector", False):
        options["selector"] = PerspectiveSelector(C, P)
    return randomize(TimeMixing(C, **options, backend=backend))


def channel_mixing(name: str, backend: str) -> ChannelMixing:
    if name != "streams":
        return randomize(ChannelMixing(C, backend=backend))
    vectors = ("channel_mix_r",)
    return randomize(ChannelMixing(C, n_perspectives=P, perspective_vectors=vectors, backend=backend))


def tokens(name: str, T: int = 1) -> torch.Tensor:
    shape = (B, T, P, C) if name == "streams" else (B, T, C)
    return torch.randn(shape, generator=torch.Generator().manual_seed(T)).to(DEVICE)


def assert_close(results: Iterable[torch.Tensor], expected: Iterable[torch.Tensor]) -> None:
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", TIME)
@torch.no_grad()
def test_time_mixing(name: str) -> None:
    kernels, plain = (time_mixing(TIME[name], backend) for backend in ("triton", "torch"))
    _, shift, wkv = plain(tokens(name, 4), output_state=True)
    state = {"shift_state": shift, "wkv_state": wkv, "output_state": True}
    expected = plain(tokens(name), **state)
    with Launches() as launches:
        output = kernels(tokens(name), **state)
    assert_close(output[:2], expected[:2])
    unit = expected.wkv_state[:, 2].double()
    assert_close(*([true_sums(x.wkv_state.double(), unit)] for x in (output, expected)))
    assert launches.names["token_shift_mix"] == 1
    assert launches.names["wkv_gated"] == (name != "layer, own receptance")
    assert {"cat", "sub", "addcmul"}.isdisjoint(launches.names)
    if launches.names["wkv_gated"]:
        assert {"sigmoid", "mul", "wkv_forward"}.isdisjoint(launches.names)


@pytest.mark.parametrize("name", ["rwkv4", "streams"])
@torch.no_grad()
def test_channel_mixing(name: str) -> None:
    kernels, plain = (channel_mixing(name, backend) for backend in ("triton", "torch"))
    state = {"shift_state": tokens(name)[:, 0], "output_state": True}
    expected = plain(tokens(name, 2), **state)
    with Launches() as launches:
        output = kernels(tokens(name, 2), **state)
    assert_close(output, expected)
    assert launches.names["token_shift_mix"] == 1 and launches.names["addcmul"] == 0


def test_a_decoding_step_launches_a_third_less() -> None:
    """As docs/performance.md counts them."""
    counts = {}
    for backend in ("triton", "torch"):
        time, channel = time_mixing(TIME["layer"], backend), channel_mixing("layer", backend)
        x = tokens("layer")
        with torch.no_grad(), Launches() as launches:
            _, shift, wkv = time(x, output_state=True)
            channel(x, output_state=True)
        with torch.no_grad(), Launches() as launches:
            time(x, shift_state=shift, wkv_state=wkv, output_state=True)
            channel(x, shift_state=shift, output_state=True)
        counts[backend] = sum(launches.names.values())
    assert counts == {"torch": 29, "triton": 20}


@pytest.mark.parametrize("T", [1, 20])
def test_gradients_and_long_inputs_take_the_differentiable_ops(T: int) -> None:
    module = time_mixing(TIME["layer"], "triton")
    x = tokens("layer", T)
    with Launches() as launches:
        module(x).output.sum().backward()
    assert {"wkv_gated", "token_shift_mix"}.isdisjoint(launches.names)
    with torch.no_grad(), Launches() as launches:
        module(x)
    assert launches.names["wkv_gated"] == (T == 1)
