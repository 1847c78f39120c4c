"""Packed sequences in the layers: each as if it were alone, and to be continued."""

import pytest
import torch
from test_modules import C, P, randomize, sequence

from trwkv.modules import ChannelMixing, PerspectiveSelector, TimeMixing, token_shift
from trwkv.testing import HAS_GPU

DEVICE = "cuda" if HAS_GPU else "cpu"
LENGTHS = [3, 0, 1, 5, 0]
T, N = sum(LENGTHS), len(LENGTHS)
LAYERS = ["merged", "streams", "channel mixing", "channel mixing of streams"]


def bounds(lengths=LENGTHS) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def layer_and_input(name: str, backend: str) -> tuple[torch.nn.Module, torch.Tensor]:
    """In float64, or for the kernels in float32."""
    if name == "merged":
        options = {"perspective_vectors": ["time_decay"], "selector": PerspectiveSelector(C, P)}
        layer = TimeMixing(C, n_perspectives=P, **options, backend=backend)
    elif name == "streams":
        vectors = ["time_decay", "time_mix_k"]
        layer = TimeMixing(C, n_perspectives=P, perspective_vectors=vectors, backend=backend)
    else:
        layer = ChannelMixing(C, backend=backend)
    x = sequence(1, T, P, C) if "streams" in name else sequence(1, T, C)
    dtype = torch.float32 if backend == "triton" else torch.float64
    return randomize(layer).to(DEVICE, dtype), x.to(DEVICE, dtype)


def assert_near(x: torch.Tensor, expected: torch.Tensor) -> None:
    """Within a few roundings of the largest value: matrices sum in an order that depends on the number of rows."""
    largest = expected.abs().max().item() if expected.numel() else 0.0
    atol = 32 * torch.finfo(x.dtype).eps * largest
    torch.testing.assert_close(x, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("n_axes", [1, 2])
@pytest.mark.parametrize("with_previous", [False, True])
def test_token_shift(with_previous, n_axes):
    x = sequence(1, T, *[2, C][-n_axes:])
    previous = sequence(N, *[2, C][-n_axes:], seed=2) if with_previous else None
    shifted = token_shift(x, previous, bounds()).split(LENGTHS, dim=1)
    for n, piece in enumerate(x.split(LENGTHS, dim=1)):
        before = None if previous is None else previous[n : n + 1]
        assert torch.equal(shifted[n], token_shift(piece, before))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_packed_is_separate(name, backend):
    """With states and without; so few tokens also that the kernels for decoding would take a whole row."""
    layer, x = layer_and_input(name, backend)
    states: dict = {}
    for _ in range(2):
        packed = layer(x, **states, cu_seqlens=bounds(), output_state=True)
        for n, piece in enumerate(x.split(LENGTHS, dim=1)):
            own = {key: state[n : n + 1] for key, state in states.items()}
            alone = layer(piece, **own, output_state=True)
            assert_near(packed.output.split(LENGTHS, dim=1)[n], alone.output)
            for key, state in alone._asdict().items():
                if key != "output":
                    assert_near(getattr(packed, key)[n : n + 1], state)
        states = {key: state for key, state in packed._asdict().items() if key != "output"}


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_no_token(name):
    layer, x = layer_and_input(name, "torch")
    x = x[:, :0]
    first = layer(x, cu_seqlens=bounds([0] * N), output_state=True)
    assert first.shift_state.shape == (N, *x.shape[2:]) and not first.shift_state.any()
    states = {"shift_state": torch.randn_like(first.shift_state)}
    second = layer(x, **states, cu_seqlens=bounds([0] * N), output_state=True)
    assert torch.equal(second.shift_state, states["shift_state"])


@pytest.mark.parametrize("name", LAYERS)
def test_what_does_not_fit_is_refused(name):
    layer, x = layer_and_input(name, "torch")
    with pytest.raises(ValueError, match="mask, cu_seqlens: expected at most one of them"):
        layer(x, mask=torch.ones(1, T, dtype=torch.bool), cu_seqlens=bounds())
    with pytest.raises(ValueError, match="x: expected B = 1 with cu_seqlens; got shape"):
        layer(x.expand(2, *x.shape[1:]), cu_seqlens=bounds())
    with pytest.raises(ValueError, match=r"cu_seqlens: expected values that rise from 0 to T = 9"):
        layer(x, cu_seqlens=bounds([T + 1]))
    with pytest.raises(TypeError, match="cu_seqlens: expected one of int32, int64"):
        layer(x, cu_seqlens=bounds().double())
    with pytest.raises(ValueError, match=r"shift_state: expected shape \[N, .*C\] = \[5, .*; got \[1,"):
        layer(x, cu_seqlens=bounds(), shift_state=x.new_zeros(1, *x.shape[2:]))
    with pytest.raises(ValueError, match=r"shift_state: expected shape \[B, .*C\] = \[1, .*; got \[2,"):
        layer(x, shift_state=x.new_zeros(2, *x.shape[2:]))
    with pytest.raises(ValueError, match=r"mask: expected shape \[B, T\] = \[1, 9\]; got \[1, 8\]"):
        layer(x, mask=torch.ones(1, T - 1, dtype=torch.bool))


@pytest.mark.parametrize("name", LAYERS)
def test_without_values(name):
    """Where there are none to look at."""
    layer, x = layer_and_input(name, "torch")
    output = layer.to("meta")(x.to("meta"), cu_seqlens=bounds().to("meta"), output_state=True)
    assert output.output.shape == x.shape and output.shift_state.shape == (N, *x.shape[2:])
