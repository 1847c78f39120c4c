"""`gated_recurrent_wkv`: sigmoid(receptance) times the WKV, on every backend, rounded once."""

from dataclasses import replace

import pytest
import torch

from trwkv.ops import gated_recurrent_wkv, multi_perspective_wkv, recurrent_wkv
from trwkv.testing import HAS_GPU, WkvCase, assert_accurate, wkv_case, wkv_truth
from trwkv.testing.contracts import assert_same
from trwkv.testing.memory import poisoned_allocations

BACKENDS = ["reference", "torch", "triton"]
DEVICE = "cuda" if HAS_GPU else "cpu"
CASES = [
    {"T": 1, "P": 3, "weights": "BTP"},
    {"T": 1, "P": 2, "weights": "PC", "dtype": torch.bfloat16, "C": 33},
    {"T": 3, "P": 2, "weights": "none", "dtype": torch.float16},
    {"T": 1, "P": 2, "weights": "none", "shared": False},
    {"T": 2, "P": 2, "weights": "P", "shared": False, "dtype": torch.bfloat16},
    {"T": 5, "P": 1, "weights": "none", "k_range": 300.0},
    {"T": 0, "P": 2, "weights": "none"},
]


def inputs(C=20, **options) -> tuple[WkvCase, dict[str, torch.Tensor]]:
    case = wkv_case(B=3, C=C, state="random", **options).to(DEVICE)
    arguments = {name: x.detach() for name, x in case.inputs.items()}
    output = recurrent_wkv(**arguments, backend="reference").output
    generator = torch.Generator().manual_seed(1)
    receptance = 3 * torch.randn(output.shape, generator=generator)
    if receptance.numel():
        receptance.view(-1)[:4] = torch.tensor([-100.0, 100.0, -30.0, 0.0])
    return case, arguments | {"receptance": receptance.to(output)}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", CASES, ids=str)
def test_against_float64(backend: str, options: dict) -> None:
    case, arguments = inputs(**options)
    truth = wkv_truth(case.to("cpu"))
    gate = torch.sigmoid(arguments["receptance"].double().cpu())
    truth = replace(
        truth,
        values={"output": gate * truth.values["output"]},
        conditions={"output": gate * truth.conditions["output"]},
    )
    output, state = gated_recurrent_wkv(**arguments, backend=backend)
    assert output.dtype == arguments["v"].dtype
    assert_accurate("output", output, truth, truncates=backend == "triton" and not HAS_GPU)
    del arguments["receptance"]
    function = multi_perspective_wkv if backend == "torch" else recurrent_wkv
    expected = function(**arguments, output_final_state=True, backend=backend).final_state
    assert_same("state", state, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_single_perspective_form(backend: str) -> None:
    _, arguments = inputs(T=2, P=1, weights="none")
    output, state = gated_recurrent_wkv(**arguments, backend=backend)
    one = {name: arguments[name][0] for name in ("w", "u")}
    one |= {
        "initial_state": arguments["initial_state"][:, :, 0],
        "receptance": arguments["receptance"][:, :, 0],
    }
    single = gated_recurrent_wkv(**arguments | one, backend=backend)
    assert_same("output", single.output, output[:, :, 0])
    assert_same("state", single.final_state, state[:, :, 0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_and_memory(backend: str) -> None:
    """A receptance of any strides, alone in its memory or not, is read as it is, and nothing else is."""
    _, arguments = inputs(T=3, P=2, weights="BTP")
    expected, _ = gated_recurrent_wkv(**arguments, backend=backend)
    receptance = arguments.pop("receptance")
    for same in (
        receptance.mT.contiguous().mT,
        torch.stack([receptance, torch.full_like(receptance, torch.nan)])[0],
    ):
        with poisoned_allocations() as guard:
            output, _ = gated_recurrent_wkv(
                **arguments, receptance=guard.copy(same, "receptance"), backend=backend
            )
        assert_same("output", output, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_are_independent(backend: str) -> None:
    _, arguments = inputs(T=2, P=2, weights="PC")
    expected, _ = gated_recurrent_wkv(**arguments, backend=backend)
    arguments["receptance"][1, 0, 3] = torch.nan
    output, _ = gated_recurrent_wkv(**arguments, backend=backend)
    assert torch.isnan(output[1, 0, 3])
    expected[1, 0, 3] = output[1, 0, 3] = 0
    assert_same("output", output, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    _, a = inputs(T=1, P=2, weights="BTP")
    names = ("w", "u", "k", "v", "receptance", "weights", "initial_state")
    torch.library.opcheck(torch.ops.trwkv.wkv_gated, (*(a[name] for name in names), backend))


def test_compiles_to_one_graph() -> None:
    _, arguments = inputs(T=1, P=2, weights="BTP")

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(arguments):
        output, state = gated_recurrent_wkv(**arguments)
        return 2 * output, state

    expected, state = gated_recurrent_wkv(**arguments)
    output, same = step(arguments)
    assert_same("output", output, 2 * expected)
    assert_same("state", same, state)


WRONG = [
    ({"receptance": torch.ones(3, 1, 2, 19)}, ValueError, r"receptance: expected shape .*20\]; got .*19\]"),
    ({"receptance": torch.ones(3, 1, 20)}, ValueError, r"receptance: expected shape \[B, T, P, C\]"),
    (
        {"receptance": torch.ones(3, 1, 2, 20, dtype=torch.long)},
        TypeError,
        "receptance: expected one of float32",
    ),
    ({"receptance": None}, TypeError, "receptance: expected a tensor"),
    (
        {"receptance": torch.ones(3, 1, 2, 20, requires_grad=True)},
        RuntimeError,
        "gated_recurrent_wkv: expected no",
    ),
    ({"v": torch.ones(3, 1, 19)}, ValueError, "v: expected shape"),
    ({"backend": "cuda"}, ValueError, "backend:"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG, ids=lambda x: x if isinstance(x, str) else "")
def test_wrong_calls(change: dict, error: type, message: str) -> None:
    _, arguments = inputs(T=1, P=2, weights="none")
    change = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in change.items()}
    with pytest.raises(error, match=message):
        gated_recurrent_wkv(**arguments | change)
