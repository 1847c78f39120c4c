"""Implementations that are not ours: called as they want to be, with the meaning that they give to arguments."""

import dataclasses
import functools
import sys
import types

import pytest
import torch

import throughput
import throughput_contenders
from throughput_cases import LAYOUTS, Case, errors, exact_results, expected, make_inputs
from throughput_contenders import contenders, work
from throughput_official import find_sources, official
from throughput_plain import plain_wkv

pytest.importorskip("transformers", reason="the stub of flash-linear-attention calls transformers' loop")


def largest_error(contender, mode, layout="aggregated", P=3, dtype=torch.float32, shape=(2, 20, 32)):
    case = Case(mode, *shape, P, layout, dtype, "cpu")
    assert contender.refuses(case) is None
    inputs = make_inputs(case)
    right = expected(mode, exact_results(inputs, gradients=True))
    results = work(case, contender, inputs)()
    return max(errors(inputs, results, right, log_decay=contender.log_decay).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flash_linear_attention_is_called_by_its_signature(dtype, monkeypatch):
    from transformers.models.rwkv.modeling_rwkv import rwkv_linear_attention_cpu

    def fused_recurrent_rwkv4(w, u, k, v, state):
        """w is the time_decay; all five are needed; the state's new values are rounded to k's dtype."""
        assert state.shape == (k.shape[0], 3, 1, k.shape[2]) and state.dtype in (torch.float32, k.dtype)
        calls.append(k.shape)
        output, final = rwkv_linear_attention_cpu(
            w, u, k.float(), v.float(), state=state[:, :, 0].unbind(1), return_state=True
        )
        return output.to(k.dtype), torch.stack(final, 1).unsqueeze(2).to(k.dtype).to(state.dtype)

    calls = []
    module = types.ModuleType("fla.ops.rwkv4")
    module.fused_recurrent_rwkv4 = fused_recurrent_rwkv4
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "fla.ops.rwkv4", module)
    monkeypatch.setattr(throughput_contenders.importlib.util, "find_spec", lambda name: name)
    fla = contenders("cuda")["flash-linear-attention"]
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    for mode in ("forward", "backward", "forward+backward", "decode"):
        for layout in LAYOUTS:
            calls.clear()
            assert largest_error(fla, mode, layout, dtype=dtype) < limit
            if mode == "forward":  # k and v of their own are channels of one perspective
                assert calls == ([(2, 20, 3 * 32)] if layout == "own" else [(2, 20, 32)] * 3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_decoding_in_place(layout):
    contender = throughput_contenders.in_place("torch")
    assert largest_error(contender, "decode", layout) < 1e-5
    assert contender.refuses(Case("forward", 2, 20, 8, 1, "aggregated", torch.float32, "cpu"))


def test_a_decoded_token_is_contiguous():
    def run(w, u, k, v, weights, state):
        seen.extend([k.is_contiguous(), v.is_contiguous()])
        return right.run(w, u, k, v, weights, state)

    seen, right = [], contenders("cpu")["torch"]
    assert largest_error(dataclasses.replace(right, run=run), "decode", "own") < 1e-5
    assert seen == [True] * 2 * 20


def test_the_compiled_contender_is_compiled_for_every_case_and_differentiable_twice_over(monkeypatch):
    compiled = []

    def compile(fn, **options):
        compiled.append(options)
        return real(fn, **options)

    real = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", compile)
    contender = contenders("cpu")["torch-compiled"]
    for mode in ("forward", "backward", "forward+backward"):
        assert largest_error(contender, mode, P=1, shape=(1, 20, 8)) < 1e-5
    assert compiled == [{"fullgraph": True, "dynamic": False}] * 2  # with and without gradients
    case = Case("backward", 1, 20, 8, 1, "aggregated", torch.float32, "cpu")
    again = work(case, contender, make_inputs(case))
    for name, x in again().items():
        assert torch.equal(x, again()[name])


@pytest.mark.parametrize("chunk", [1, 3, 4, 100])
def test_the_plain_formulation_carries_over_many_chunks(chunk):
    inputs = make_inputs(Case("forward", 2, 70, 8, 3, "aggregated", torch.float64, "cpu"))
    found = plain_wkv(inputs.w, inputs.u, inputs.k, inputs.v, inputs.weights, chunk=chunk)
    exact = exact_results(inputs, gradients=False)["output"]
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6)  # w and u are float32


def official_folder(path, tensors, *, threads=32, suffixes=("",)):
    """Files with what the adapter reads in the sources: the backward's parameters and a block's threads."""
    path.mkdir(exist_ok=True)
    parameters = ", ".join(["int64_t B, int64_t T, int64_t C", *(f"torch::Tensor &{x}" for x in tensors)])
    for suffix in suffixes:
        (path / f"wkv_op{suffix}.cpp").write_text(
            f"void forward(...) {{}}\nvoid cuda_backward(int B, float *w);\nvoid backward(\n {parameters}) {{}}\n"
        )
        (path / f"wkv_cuda{suffix}.cu").write_text(f"dim3 threadsPerBlock( min(C, {threads}) );")
    return path


class Extension:
    """What the built kernel promises, in PyTorch: w is negative; gradients of w (that of its log) and u are [B, C]."""

    def __init__(self, dtype, takes_output, adds):
        self.dtype, self.takes_output, self.adds = dtype, takes_output, adds

    def checked(self, B, T, C, w, tensors):
        assert isinstance(B, int) and w.dtype == torch.float32 and (w < 0).all() and w.shape == (C,)
        for x in (w, *tensors):
            assert x.is_contiguous()
        for x in tensors:
            assert x.dtype == self.dtype and x.shape in ((B, T, C), (B, C), (C,))

    def forward(self, B, T, C, w, u, k, v, y):
        self.checked(B, T, C, w, (u, k, v, y))
        y.copy_(plain_wkv(w, u.float(), k.float(), v.float()))

    def backward(self, B, T, C, w, u, k, v, *rest):
        y, grad, grad_w, grad_u, grad_k, grad_v = rest if self.takes_output else (None, *rest)
        self.checked(B, T, C, w, (u, k, v, *rest))
        assert grad_w.shape == grad_u.shape == (B, C)
        for b in range(B):
            leaves = [x.float().clone().requires_grad_() for x in (w, u, k[b : b + 1], v[b : b + 1])]
            with torch.enable_grad():
                output = plain_wkv(*leaves)
            if y is not None:
                torch.testing.assert_close(y[b : b + 1].float(), output, rtol=1e-2, atol=1e-2)
            dw, du, dk, dv = torch.autograd.grad(output, leaves, grad[b : b + 1].float())
            grad_w[b].mul_(self.adds).add_(dw * w)
            grad_u[b].mul_(self.adds).add_(du)
            grad_k[b], grad_v[b] = dk[0], dv[0]


WITHOUT_OUTPUT = ("w", "u", "k", "v", "gy", "gw", "gu", "gk", "gv")
WITH_OUTPUT = ("w", "u", "k", "v", "y", "gy", "gw", "gu", "gk", "gv")


@pytest.mark.parametrize("tensors", [WITHOUT_OUTPUT, WITH_OUTPUT])
@pytest.mark.parametrize(
    ("dtype", "suffixes"),
    [(torch.float32, ("", "_bf16")), (torch.bfloat16, ("",)), (torch.bfloat16, ("", "_bf16"))],
)
def test_the_official_kernel_gets_what_it_expects(tensors, dtype, suffixes, tmp_path, monkeypatch):
    from torch.utils import cpp_extension

    sources = find_sources(official_folder(tmp_path, tensors, suffixes=suffixes), dtype)
    assert sources.backward_takes_output == ("y" in tensors) and sources.threads == 32
    assert sources.dtype == (
        torch.bfloat16 if len(suffixes) == 2 and dtype == torch.bfloat16 else torch.float32
    )
    built = []

    def load(name, sources, extra_cuda_cflags):
        built.append((name, sources, extra_cuda_cflags))
        return Extension(found.dtype, found.backward_takes_output, adds="y" not in tensors)

    found = sources
    monkeypatch.setattr(cpp_extension, "load", load)
    contender = official(sources, 20)
    ((_, files, flags),) = built
    assert files == [str(path) for path in sources.files] and "-DTmax=20" in flags
    limit = 1e-5 if dtype == torch.float32 else 1.5e-2
    for mode in ("forward", "backward", "forward+backward"):
        for layout in LAYOUTS:
            assert largest_error(contender, mode, layout, dtype=dtype) < limit

    def refused(*shape, mode="forward"):
        return contender.refuses(Case(mode, *shape, 1, "aggregated", dtype, "cpu"))

    assert refused(1, 21, 32) == "built for at most 20 tokens"
    assert refused(1, 20, 40) == "it needs B * C in multiples of 32"
    assert refused(4, 20, 40) is None and refused(3, 20, 8) is None
    assert refused(1, 1, 32, mode="decode") == "it has no state"


def test_a_folder_that_is_not_the_official_kernels(tmp_path, monkeypatch, capsys):
    (tmp_path / "wkv6_op.cpp").write_text("")
    with pytest.raises(FileNotFoundError, match=r"expected wkv_op.cpp and wkv_cuda.cu.*found wkv6_op.cpp"):
        find_sources(tmp_path, torch.float32)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit):
        throughput.parse(["--official-cuda", str(tmp_path)])
    assert "--official-cuda: expected wkv_op.cpp" in capsys.readouterr().err
    folder = official_folder(tmp_path / "other", WITH_OUTPUT[1:-2])
    with pytest.raises(ValueError, match="found 7 tensors"):
        find_sources(folder, torch.float32)
    options = throughput.parse(["--official-cuda", str(official_folder(folder, WITH_OUTPUT))])
    assert options.backends[-1] == "official-cuda" and options.dtypes == ["bfloat16"]
    assert options.set == "main" and "decode-graph" in options.modes
