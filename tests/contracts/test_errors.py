"""Bad input: an exception that names the argument, what was expected and what came, before anything is computed."""

import pytest
import torch

from tests.contracts.support import everywhere
from trwkv.ops import merge_wkv_states, multi_perspective_wkv
from trwkv.testing import HAS_GPU, Implementation
from trwkv.testing.errors import WrongCall, right_call, wrong, wrong_calls


@everywhere()
def test_wrong_calls(implementation: Implementation) -> None:
    """The same table for every op, made from its arguments."""
    rows = list(wrong_calls(implementation))
    assert len(rows) >= 40
    for row in rows:
        arguments = right_call(implementation) | row.change
        if implementation.backend is not None:
            arguments.setdefault("backend", implementation.backend)
        wrong(lambda arguments=arguments: implementation.function(**arguments), row)


P, C = 3, 4


def arguments() -> dict:
    return {"w": -torch.rand(P, C), "u": torch.rand(P, C), "k": torch.rand(2, 5, C), "v": torch.rand(2, 5, C)}


def single() -> dict:
    return arguments() | {"w": -torch.rand(C), "u": torch.rand(C)}


half, double = torch.float16, torch.float64
OF_THE_WKV = [
    ("only k in float64", {"k": torch.ones(2, 5, C, dtype=double)}, TypeError, ("k, v:", "float64")),
    ("only v in float64", {"v": torch.ones(2, 5, C, dtype=double)}, TypeError, ("k, v:", "float64")),
    ("w without perspectives", {"w": torch.ones(0, C)}, ValueError, ("w:", "[0, 4]")),
    ("u of [C]", {"u": torch.ones(C)}, ValueError, ("u:", "[P, C]", "[4]")),
    ("k of another P", {"k": torch.ones(2, 5, P + 1, C)}, ValueError, ("k:", "[2, 5, 3, 4]", "[2, 5, 4, 4]")),
    ("v of another T", {"v": torch.ones(2, 6, C)}, ValueError, ("v:", "[2, 5, 4]", "[2, 6, 4]")),
    ("v per perspective, k shared", {"v": torch.ones(2, 5, P, C)}, ValueError, ("v:", "k")),
    ("weights of another P", {"weights": torch.ones(P + 1)}, ValueError, ("weights:", "[3]", "[4]")),
    ("weights [C, P]", {"weights": torch.ones(C, P)}, ValueError, ("weights:", "[P, C]", "[4, 3]")),
    ("weights [B, T, C]", {"weights": torch.ones(2, 5, C)}, ValueError, ("weights:", "[B, T, P]")),
    ("state in float16", {"initial_state": torch.ones(2, 3, P, C, dtype=half)}, TypeError,
     ("initial_state:", "float32", "float16")),
    ("state in float64", {"initial_state": torch.ones(2, 3, P, C, dtype=double)}, TypeError,
     ("initial_state:", "float32", "float64")),
    ("state of another B", {"initial_state": torch.ones(3, 3, P, C)}, ValueError,
     ("initial_state:", "[2, 3, 3, 4]", "[3, 3, 3, 4]")),
    ("state without exp", {"initial_state": torch.ones(2, 2, P, C)}, ValueError, ("initial_state:",)),
    ("triton in float64", {"k": torch.ones(2, 5, C, dtype=double), "v": torch.ones(2, 5, C, dtype=double),
     "backend": "triton"}, TypeError, ("float64", "triton")),
    ("[C], k per perspective", single() | {"k": torch.ones(2, 5, 1, C)}, ValueError, ("k:", "[B, T, C]")),
    ("[C], u [P, C]", single() | {"u": torch.ones(1, C)}, ValueError, ("u:", "[C]")),
    ("[C], weights [B, T, 1]", single() | {"weights": torch.ones(2, 5, 1)}, ValueError, ("weights:",)),
    ("[C], state with P", single() | {"initial_state": torch.ones(2, 3, 1, C)}, ValueError,
     ("initial_state:", "[B, 3, C]")),
]  # fmt: skip


@pytest.mark.parametrize("row", OF_THE_WKV, ids=lambda row: row[0])
def test_wrong_calls_of_the_wkv(row: tuple) -> None:
    wrong(lambda: multi_perspective_wkv(**(arguments() | row[1])), WrongCall(*row))


state = torch.ones(2, 3, P, C)
MERGES = [
    ("nothing", (), TypeError, ("states: expected at least one tensor",)),
    ("a list", ([state, state],), TypeError, ("states[0]: expected a tensor", "list")),
    ("a state in float16", (state.half(),), TypeError, ("states[0]:", "float32", "float16")),
    (
        "two axes",
        (state[0, 0],),
        ValueError,
        ("states[0]: expected shape [B, 3, ...]", "[3, 4]"),
    ),
    (
        "two numbers",
        (state, state[:, :2]),
        ValueError,
        ("states[1]: expected shape [B, 3, ...]", "[2, 2, 3, 4]"),
    ),
    ("another C", (state, state[..., 1:]), ValueError, ("states[1]:", "[2, 3, 3, 4]", "[2, 3, 3, 3]")),
    ("another dtype", (state, state.double()), TypeError, ("states[1]:", "float32", "float64")),
    ("another device", (state, state.to("meta")), ValueError, ("states[1] on meta",)),
]


@pytest.mark.parametrize("row", MERGES, ids=lambda row: row[0])
def test_wrong_merges(row: tuple) -> None:
    wrong(lambda: merge_wkv_states(*row[1]), WrongCall(row[0], {}, *row[2:]))


@everywhere(backend="triton")
def test_too_many_perspectives_for_the_kernels(implementation: Implementation) -> None:
    case = implementation.op.case(B=1, T=2, P=9, C=4).to(implementation.device)
    with pytest.raises(ValueError, match=r"at most 8 perspectives.*P = 9.*torch"):
        implementation.run(case)


@pytest.mark.skipif(HAS_GPU, reason="needs a machine without a GPU")
@everywhere(backend="triton")
def test_triton_on_the_cpu_says_what_to_do(
    implementation: Implementation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(
        ValueError, match=r"backend: 'triton' needs tensors on a GPU.*TRITON_INTERPRET=1.*'cpu'"
    ):
        implementation.run(implementation.op.case(B=1, T=2, P=1, C=4))
