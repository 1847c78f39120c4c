"""The op among PyTorch's own tools: opcheck, compile, export, checkpointing, autocast, hooks, second order."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from trwkv.ops import multi_perspective_wkv
from trwkv.testing import WkvCase, assert_accurate, wkv_case, wkv_truth


def inputs(case: WkvCase) -> tuple:
    return case.w, case.u, case.k, case.v, case.weights, case.initial_state


CASES = {
    "separate": lambda: wkv_case(2, 9, 2, 3),
    "own, bfloat16": lambda: wkv_case(1, 70, 2, 3, shared=False, weights="P", dtype=torch.bfloat16),
    "per token, state": lambda: wkv_case(1, 5, 3, 4, weights="BTP", state="random"),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("algorithm", ["chunk", "recurrent"])
def test_opcheck(name: str, algorithm: str) -> None:
    """Schema, fakes, autograd registration and tracing with symbolic shapes."""
    leaves = [x if x is None else x.requires_grad_() for x in inputs(CASES[name]())]
    torch.library.opcheck(
        torch.ops.trwkv.wkv_forward, (*leaves, "torch", algorithm, True),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic"),
    )  # fmt: skip


def test_compiles_to_one_graph() -> None:
    """fullgraph, with a T that changes, forward and backward."""
    torch._dynamo.reset()

    def run(w, u, k, v, weights):
        return multi_perspective_wkv(w, u, torch.tanh(k), v, weights=weights, output_final_state=True)

    counted = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=counted)
    for T in (7, 40, 130):
        case = wkv_case(1, T, 2, 3, weights="P")
        plain = [x.clone().requires_grad_() for x in inputs(case)[:5]]
        traced = [x.clone().requires_grad_() for x in inputs(case)[:5]]
        expected, got = run(*plain), compiled(*traced)
        assert torch.equal(expected.output, got.output)
        expected.output.sum().backward()
        got.output.sum().backward()
        for a, b in zip(plain, traced, strict=True):
            torch.testing.assert_close(a.grad, b.grad)
    assert counted.frame_count == 1


def test_exports() -> None:
    class Mixer(torch.nn.Module):
        def forward(self, w, u, k, v):
            return multi_perspective_wkv(w, u, k, v).output

    case = wkv_case(1, 9, 2, 3)
    exported = torch.export.export(Mixer(), inputs(case)[:4]).module()
    assert torch.equal(exported(*inputs(case)[:4]), Mixer()(*inputs(case)[:4]))


def test_activation_checkpointing() -> None:
    case = wkv_case(1, 9, 2, 3)
    plain = [x.clone().requires_grad_() for x in inputs(case)[:4]]
    saved = [x.clone().requires_grad_() for x in inputs(case)[:4]]
    multi_perspective_wkv(*plain).output.sum().backward()
    checkpoint(lambda *x: multi_perspective_wkv(*x).output, *saved, use_reentrant=False).sum().backward()
    for a, b in zip(plain, saved, strict=True):
        assert torch.equal(a.grad, b.grad)


def test_saved_tensor_hooks() -> None:
    case = wkv_case(1, 9, 2, 3)
    leaves = [x.clone().requires_grad_() for x in inputs(case)[:4]]
    moved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: moved.append(x.shape) or x.clone(), lambda x: x):
        output = multi_perspective_wkv(*leaves).output
    output.sum().backward()
    assert moved
    assert all(x.grad is not None for x in leaves)


def test_autocast_computes_in_float32() -> None:
    """Autocast hands the op bfloat16 k and v; sums and state stay float32."""
    case = wkv_case(1, 40, 2, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, state = case.call(multi_perspective_wkv)
    assert_accurate("output", output, wkv_truth(case))
    assert state.dtype == torch.float32


def test_mixed_types() -> None:
    """k and v may differ in type; the output has v's, each gradient its input's."""
    case = wkv_case(1, 9, 2, 3, final_gradient=False)
    k, v = case.k.clone().requires_grad_(), case.v.to(torch.bfloat16).requires_grad_()
    output = multi_perspective_wkv(case.w, case.u, k, v).output
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    assert (k.grad.dtype, v.grad.dtype) == (torch.float32, torch.bfloat16)


def test_second_order_is_refused_but_by_the_reference() -> None:
    case = wkv_case(1, 4, 2, 3)
    leaves = [x.clone().requires_grad_() for x in inputs(case)[:4]]
    (first,) = torch.autograd.grad(multi_perspective_wkv(*leaves).output.sum(), leaves[2], create_graph=True)
    with pytest.raises(NotImplementedError, match=r"second-order.*reference"):
        first.sum().backward()
    output = multi_perspective_wkv(*leaves, backend="reference").output
    (first,) = torch.autograd.grad(output.square().sum(), leaves[2], create_graph=True)
    first.sum().backward()
    assert torch.isfinite(leaves[2].grad).all()


def test_meta_tensors_give_shapes() -> None:
    case = wkv_case(2, 9, 2, 3, weights="P").to("meta")
    output, state = case.call(multi_perspective_wkv)
    assert output.shape == (2, 9, 3)
    assert state.shape == (2, 3, 2, 3)
