"""What only a GPU can show: streams, devices, CUDA graphs, waiting, inductor, a model as it is used there."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from trwkv.ops import multi_perspective_wkv
from trwkv.testing import HAS_GPU
from trwkv.testing.contracts import assert_same

pytestmark = pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")

CHUNKS = {"B": 2, "T": 300, "P": 2, "C": 64}
"""T is divided: three launches forward and three back."""


def inputs(B: int, T: int, P: int, C: int, device: str = "cuda") -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g)

    given = {"w": -torch.exp(normal(P, C) - 2), "u": normal(P, C), "k": normal(B, T, C), "v": normal(B, T, C)}
    given["weights"] = normal(B, T, P).softmax(-1)
    return {name: x.to(device).requires_grad_() for name, x in given.items()}


def step(given: dict[str, Tensor], **options: Tensor) -> list[Tensor]:
    """Output and all gradients."""
    output = multi_perspective_wkv(**given, **options).output
    return [output.detach(), *torch.autograd.grad(output.sum(), list(given.values()))]


def assert_all_same(results: list[Tensor], expected: list[Tensor]) -> None:
    for i, (x, y) in enumerate(zip(results, expected, strict=True)):
        assert_same(f"result {i}", x, y)


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("is_packed", [False, True])
def test_a_step_waits_for_nothing(is_packed: bool) -> None:
    """But for the first look at bounds that are on the GPU."""
    given = inputs(**CHUNKS | {"B": 1})
    options = {"cu_seqlens": torch.tensor([0, 70, 70, 300], device="cuda")} if is_packed else {}
    expected = step(given, **options)
    with no_waiting():
        again = step(given, **options)
    assert_all_same(again, expected)


def test_on_another_stream() -> None:
    given = inputs(**CHUNKS)
    expected = step(given)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # whatever runs on the other stream is done before this
        mine = {name: (x.detach() * 1).requires_grad_() for name, x in given.items()}
        results = step(mine)
    torch.cuda.current_stream().wait_stream(stream)
    assert_all_same(results, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_another_device_than_the_current() -> None:
    expected = step(inputs(**CHUNKS))
    results = step(inputs(**CHUNKS, device="cuda:1"))
    assert torch.cuda.current_device() == 0
    assert_all_same([x.to("cuda:0") for x in results], expected)


@pytest.mark.parametrize("is_packed", [False, True])
def test_a_training_step_in_a_cuda_graph(is_packed: bool) -> None:
    given = inputs(**CHUNKS | {"B": 1})
    options = {"cu_seqlens": torch.tensor([0, 70, 70, 300], device="cuda")} if is_packed else {}
    expected = step(given, **options)
    options = {name: x.clone() for name, x in options.items()}  # whose values nobody has looked at
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(given)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(given, **options)
    for x in results:
        x.zero_()
    graph.replay()
    assert_all_same(results, expected)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_by_inductor(mode: str) -> None:
    given = inputs(**CHUNKS)

    def layer(w, u, k, v, weights):
        return torch.sigmoid(k) * multi_perspective_wkv(w, u, 2 * k, v.tanh(), weights=weights).output

    expected = layer(**given)
    grads = torch.autograd.grad(expected.sum(), list(given.values()))
    compiled = torch.compile(layer, fullgraph=True, mode=mode)
    for _ in range(3):  # a CUDA graph is replayed from the third call on
        output = compiled(**given)
        gradients = torch.autograd.grad(output.sum(), list(given.values()))
        results = [x.detach().clone() for x in (output, *gradients)]
    for x, y in zip(results, [expected.detach(), *grads], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shared", [True, False])
def test_the_weights_gradient_beside_neighbours(shared: bool) -> None:
    """A sum over 64 blocks of channels, in one order for two tokens and for two thousand."""
    given = inputs(B=2, T=1000, P=2, C=4096)
    if not shared:
        for name in ("k", "v"):
            given[name] = given[name].detach().unsqueeze(2).repeat(1, 1, 2, 1).requires_grad_()
    alone = {name: x if x.ndim == 2 else x[1:, :1] for name, x in given.items()}
    alone = {name: x.detach().contiguous().requires_grad_() for name, x in alone.items()}
    given = {**given, **{name: alone[name] for name in ("w", "u")}}
    gradient = torch.randn(2, 1000, 4096, generator=torch.Generator().manual_seed(1)).cuda()
    gradients = [
        torch.autograd.grad(multi_perspective_wkv(**x).output, x["weights"], g)[0]
        for x, g in ((given, gradient), (alone, gradient[1:, :1]))
    ]
    assert_same("weights", gradients[0][1:, :1], gradients[1])


def small_model(**options):
    from trwkv.models import TemporalRwkvConfig, TemporalRwkvForCausalLM

    torch.manual_seed(0)
    settings = {
        "vocab_size": 64,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "n_perspectives": 3,
        "eos_token_id": None,
    }
    model = TemporalRwkvForCausalLM(TemporalRwkvConfig(**settings | options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_computes_what_it_does_on_a_cpu(dtype: torch.dtype) -> None:
    model, tokens = small_model(), torch.randint(64, (2, 300), generator=torch.Generator().manual_seed(1))
    other = copy.deepcopy(model).to("cuda", dtype)
    losses = []
    for x in (model, other):
        ids = tokens.to(x.device)
        losses.append(x(ids, labels=ids).loss)
        losses[-1].backward()
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.05}
    torch.testing.assert_close(losses[1].float().cpu(), losses[0], **tolerance)
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        size = a.grad.abs().max()
        assert (b.grad.float().cpu() - a.grad).abs().max() <= tolerance["rtol"] * size + 1e-5, name


def test_generation_with_a_static_cache_is_generation() -> None:
    """Its step is compiled, and held by a CUDA graph."""
    model = small_model().cuda()
    tokens = torch.randint(64, (2, 20), generator=torch.Generator().manual_seed(1)).cuda()
    options = {
        "do_sample": False,
        "max_new_tokens": 12,
        "attention_mask": torch.ones_like(tokens),
        "pad_token_id": 0,
    }
    expected = model.generate(tokens, **options)
    assert torch.equal(model.generate(tokens, cache_implementation="static", **options), expected)
    assert torch.equal(expected, copy.deepcopy(model).cpu().generate(tokens.cpu(), **options | {
        "attention_mask": torch.ones_like(tokens).cpu()
    }).cuda())  # fmt: skip
