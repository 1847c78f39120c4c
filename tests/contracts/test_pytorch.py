"""The ops among PyTorch's own tools: opcheck, compile, export, checkpointing, hooks, autocast, vmap, meta tensors."""

from dataclasses import replace

import pytest
import torch
from torch.autograd import forward_ad

from tests.contracts.support import case_of, everywhere
from trwkv.testing import CONTRACTS, HAS_GPU, IMPLEMENTATIONS, Case, Implementation, evaluate, pytorch
from trwkv.testing.contracts import assert_same

OPTIONS = {
    "rows": {},
    "own k, v": {"shared": False, "state": "none", "dtype": torch.float16},
    "packed, reverse": {"B": 1, "cu_seqlens": (0, 4, 4, 9), "reverse": True},
    "mixed types": {"dtype": torch.bfloat16, "mixed_dtypes": True, "layout": "strided"},
    "no tokens": {"T": 0},
}

EVERYWHERE = everywhere() if HAS_GPU else everywhere(is_kernel=False)
"""Kernels, too, but where they are interpreted, which takes too long."""


def check_operators(implementation: Implementation, case: Case) -> None:
    calls = pytorch.recorded(implementation, case)
    assert len(calls) == 2  # a forward and a backward
    for operator, arguments in calls:
        differentiates = "backward" not in operator._schema.name  # of its own gradient there is none
        pytorch.opcheck(operator, arguments, differentiates=differentiates)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", ["wkv/torch-chunk", "wkv_states/torch"])
def test_opcheck(name: str, options: str) -> None:
    implementation = IMPLEMENTATIONS[name]
    check_operators(implementation, case_of(implementation, **OPTIONS[options]))


@pytest.mark.parametrize("name", ["wkv/torch-recurrent", "wkv/triton-chunk", "wkv_states/triton"])
def test_opcheck_of_other_backends(name: str) -> None:
    implementation = IMPLEMENTATIONS[name]
    options = OPTIONS["packed, reverse"] | {"T": 3, "P": 1, "cu_seqlens": (0, 1, 1, 3)}
    with implementation.configured():
        check_operators(implementation, case_of(implementation, **options).to(implementation.device))


def test_opcheck_of_sums_over_groups() -> None:
    """Own k and v in whole blocks of channels: the kernels sum the perspectives, in an order of their own."""
    implementation = IMPLEMENTATIONS["wkv/triton-chunk"]
    case = case_of(implementation, B=2, T=5, P=3, C=32, shared=False, weights="BTP")
    with implementation.configured():
        check_operators(implementation, case.to(implementation.device))


def lengths(options: str, Ts: tuple[int, ...]) -> list[dict]:
    """The options for several T."""
    packed = "cu_seqlens" in OPTIONS[options]
    return [OPTIONS[options] | {"T": T} | ({"cu_seqlens": (0, 3, 3, T)} if packed else {}) for T in Ts]


@pytest.mark.parametrize("options", ["rows", "packed, reverse", "mixed types"])
@everywhere(speed="fast")
def test_compiles_to_one_graph(implementation: Implementation, options: str) -> None:
    cases = [case_of(implementation, **x) for x in lengths(options, (7, 40, 130))]
    pytorch.compiled(implementation, cases)


@everywhere(is_kernel=True)
def test_kernels_in_one_graph(implementation: Implementation) -> None:
    with implementation.configured():
        cases = [case_of(implementation, P=1, T=T).to(implementation.device) for T in (4, 6)]
        pytorch.compiled(implementation, cases)


@pytest.mark.parametrize("options", ["rows", "own k, v", "packed, reverse", "mixed types"])
@everywhere(backend="torch")
def test_exports(implementation: Implementation, options: str) -> None:
    pytorch.exported(implementation, case_of(implementation, **OPTIONS[options]))


@pytest.mark.parametrize("options", OPTIONS)
@EVERYWHERE
def test_saved_tensors(implementation: Implementation, options: str) -> None:
    """Activation checkpointing and saved-tensor hooks."""
    case = case_of(implementation, **OPTIONS[options]).to(implementation.device)
    with implementation.configured():
        pytorch.checkpointed(implementation, case)
        assert pytorch.hooked(implementation, case) > 0 or not case.tokens


@pytest.mark.parametrize("options", ["rows", "packed, reverse", "mixed types"])
@EVERYWHERE
def test_autocast_changes_nothing(implementation: Implementation, options: str) -> None:
    """It hands the op whatever types it has made; sums and state stay float32."""
    case = case_of(implementation, **OPTIONS[options]).to(implementation.device)
    with implementation.configured():
        expected = evaluate(implementation.op, case, implementation.run)
        with torch.autocast(implementation.device, dtype=torch.bfloat16):
            got = evaluate(implementation.op, case, implementation.run)
            CONTRACTS["agreement"](implementation, case)
    for name in expected:
        assert got[name].dtype == expected[name].dtype
        assert_same(name, got[name], expected[name])


@pytest.mark.parametrize("options", ["rows", "own k, v", "packed, reverse"])
@EVERYWHERE
def test_vmap(implementation: Implementation, options: str) -> None:
    case = case_of(implementation, **OPTIONS[options]).to(implementation.device)
    with implementation.configured():
        pytorch.mapped(implementation, case, 3)


@pytest.mark.parametrize("options", OPTIONS)
@everywhere(backend="torch")
def test_meta_tensors_give_shapes(implementation: Implementation, options: str) -> None:
    pytorch.meta(implementation, case_of(implementation, **OPTIONS[options]))


@pytest.mark.parametrize("name", ["wkv/torch-chunk", "wkv/torch-recurrent", "wkv/triton-chunk"])
def test_second_order_is_refused_but_by_the_reference(name: str) -> None:
    implementation = IMPLEMENTATIONS[name]
    case = case_of(implementation, T=4).to(implementation.device)
    leaves = [x.requires_grad_() for x in case.inputs.values()]
    with implementation.configured():
        output, _ = implementation.run(case)
        first = torch.autograd.grad(output.sum(), leaves[2], create_graph=True)[0]
        with pytest.raises(NotImplementedError, match=r"second-order.*reference"):
            first.sum().backward()


@pytest.mark.parametrize("name", ["wkv/torch-chunk", "wkv/torch-recurrent", "wkv_states/torch"])
def test_forward_mode_is_refused_but_by_the_reference(name: str) -> None:
    implementation = IMPLEMENTATIONS[name]
    case = case_of(implementation, T=4)

    def run(v: torch.Tensor) -> torch.Tensor:
        return implementation.run(replace(case, inputs=case.inputs | {"v": v}))[0]

    v = case.inputs["v"]
    message = r"trwkv::wkv_\w+: forward-mode derivatives .*'reference' only"
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jvp(run, (v,), (v,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=message):
        run(forward_ad.make_dual(v, v))
