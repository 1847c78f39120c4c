"""`recurrent_wkv_`: the same numbers as `recurrent_wkv`, and the state in the memory that was given."""

import pytest
import torch

from trwkv.ops import multi_perspective_wkv, recurrent_wkv, recurrent_wkv_
from trwkv.testing import HAS_GPU, wkv_case
from trwkv.testing.contracts import assert_same

BACKENDS = ["reference", "torch", "triton"]
DEVICE = "cuda" if HAS_GPU else "cpu"
CASES = [
    {"T": 1, "P": 2, "weights": "BTP"},
    {"T": 1, "P": 1, "weights": "none", "dtype": torch.bfloat16},
    {"T": 3, "P": 2, "weights": "PC", "dtype": torch.float16},
    {"T": 2, "P": 2, "weights": "P", "shared": False},
    {"T": 0, "P": 2, "weights": "none"},
]


def inputs(**options):
    case = wkv_case(B=3, C=20, state="random", **options).to(DEVICE)
    arguments = {name: x.detach() for name, x in case.inputs.items()}
    return arguments.pop("initial_state"), arguments


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", CASES, ids=str)
def test_as_recurrent_wkv(backend: str, options: dict) -> None:
    state, arguments = inputs(**options)
    function = multi_perspective_wkv if backend == "torch" else recurrent_wkv
    expected = function(**arguments, initial_state=state, output_final_state=True, backend=backend)
    address = state.data_ptr()
    output = recurrent_wkv_(state, **arguments, backend=backend)
    assert_same("output", output, expected.output)
    assert_same("state", state, expected.final_state)
    assert state.data_ptr() == address


@pytest.mark.parametrize("backend", BACKENDS)
def test_single_perspective_form(backend: str) -> None:
    state, arguments = inputs(T=2, P=1, weights="none")
    one = state[:, :, 0].clone()
    output = recurrent_wkv_(state, **arguments, backend=backend)
    single = arguments | {"w": arguments["w"][0], "u": arguments["u"][0]}
    assert_same("output", recurrent_wkv_(one, **single, backend=backend), output[:, :, 0])
    assert_same("state", one, state[:, :, 0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    state, arguments = inputs(T=1, P=2, weights="BTP")
    torch.library.opcheck(torch.ops.trwkv.wkv_recurrent_, (state, *arguments.values(), backend))


def test_compiles_to_one_graph() -> None:
    state, arguments = inputs(T=1, P=2, weights="BTP")
    other = state.clone()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(state, arguments):
        return 2 * recurrent_wkv_(state, **arguments), state.sum()

    output, total = step(state, arguments)
    assert_same("output", output, 2 * recurrent_wkv_(other, **arguments))
    assert_same("state", state, other)
    assert_same("sum", total, other.sum())


WRONG = [
    ({"state": torch.ones(3, 3, 2, 20).transpose(0, 1)}, ValueError, "state: expected a contiguous"),
    ({"state": torch.ones(3, 3, 2, 19)}, ValueError, r"state: expected shape .*20\]; got .*19\]"),
    ({"state": torch.ones(3, 3, 2, 20).half()}, TypeError, "state: expected one of float32"),
    ({"state": None}, TypeError, "state: expected a tensor"),
    ({"k": torch.ones(3, 1, 20, requires_grad=True)}, RuntimeError, "recurrent_wkv_: expected no argument"),
    ({"weights": torch.ones(2, 19)}, ValueError, "weights:"),
    ({"backend": "cuda"}, ValueError, "backend:"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG, ids=lambda x: x if isinstance(x, str) else "")
def test_wrong_calls(change: dict, error: type, message: str) -> None:
    state, arguments = inputs(T=1, P=2, weights="none")
    before = state.clone()
    change = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in change.items()}
    with pytest.raises(error, match=message):
        recurrent_wkv_(**{"state": state} | arguments | change)
    assert_same("state", state, before)


@pytest.mark.skipif(not HAS_GPU, reason="a CUDA graph needs a GPU")
def test_in_a_cuda_graph() -> None:
    state, arguments = inputs(T=1, P=2, weights="BTP")
    expected = state.clone()
    recurrent_wkv_(state.clone(), **arguments)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = recurrent_wkv_(state, **arguments)
    for _ in range(3):
        graph.replay()
        assert_same("output", output, recurrent_wkv_(expected, **arguments))
    assert_same("state", state, expected)
