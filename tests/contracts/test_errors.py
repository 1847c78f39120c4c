"""Bad input: an exception that names the argument, what was expected and what came."""

from collections.abc import Callable

import pytest
import torch

from tests.contracts.implementations import GPU, TRITON_CHUNK, TRITON_RECURRENT, Implementation
from trwkv.ops import chunk_wkv, multi_perspective_wkv, recurrent_wkv, reference_wkv
from trwkv.testing import wkv_case

B, T, P, C = 2, 5, 3, 4


def arguments() -> dict:
    return {"w": -torch.rand(P, C), "u": torch.rand(P, C), "k": torch.rand(B, T, C), "v": torch.rand(B, T, C)}


def single() -> dict:
    return arguments() | {"w": -torch.rand(C), "u": torch.rand(C)}


half, double, whole = torch.float16, torch.float64, torch.int64
WRONG: list[tuple[str, Callable[[], dict], type[Exception], tuple[str, ...]]] = [
    ("w a list", lambda: {"w": [1.0]}, TypeError, ("w:", "tensor", "list")),
    ("u None", lambda: {"u": None}, TypeError, ("u:", "tensor", "NoneType")),
    ("k a float", lambda: {"k": 1.0}, TypeError, ("k:", "tensor", "float")),
    ("v a string", lambda: {"v": "v"}, TypeError, ("v:", "tensor", "str")),
    ("w of integers", lambda: {"w": torch.ones(P, C, dtype=whole)}, TypeError, ("w:", "float32", "int64")),
    ("u of integers", lambda: {"u": torch.ones(P, C, dtype=whole)}, TypeError, ("u:", "float32", "int64")),
    ("k of integers", lambda: {"k": torch.ones(B, T, C, dtype=whole)}, TypeError, ("k:", "int64")),
    ("v of booleans", lambda: {"v": torch.ones(B, T, C, dtype=torch.bool)}, TypeError, ("v:", "bool")),
    ("k complex", lambda: {"k": torch.ones(B, T, C, dtype=torch.complex64)}, TypeError, ("k:", "complex64")),
    ("only k float64", lambda: {"k": torch.ones(B, T, C, dtype=double)}, TypeError, ("k, v:", "float64")),
    ("only v float64", lambda: {"v": torch.ones(B, T, C, dtype=double)}, TypeError, ("k, v:", "float64")),
    ("w of three axes", lambda: {"w": torch.ones(1, P, C)}, ValueError, ("w:", "[P, C]", "[1, 3, 4]")),
    ("w a scalar", lambda: {"w": torch.ones(())}, ValueError, ("w:", "[]")),
    ("w without perspectives", lambda: {"w": torch.ones(0, C)}, ValueError, ("w:", "[0, 4]")),
    ("u of another P", lambda: {"u": torch.ones(P + 1, C)}, ValueError, ("u:", "[3, 4]", "[4, 4]")),
    ("u of another C", lambda: {"u": torch.ones(P, C + 1)}, ValueError, ("u:", "[3, 5]")),
    ("u of [C]", lambda: {"u": torch.ones(C)}, ValueError, ("u:", "[P, C]", "[4]")),
    ("k of two axes", lambda: {"k": torch.ones(T, C)}, ValueError, ("k:", "[B, T, C]", "[5, 4]")),
    ("k of five axes", lambda: {"k": torch.ones(1, 1, 1, 1, C)}, ValueError, ("k:", "[B, T, P, C]")),
    ("k of another C", lambda: {"k": torch.ones(B, T, C + 1)}, ValueError, ("k:", "[2, 5, 4]", "[2, 5, 5]")),
    ("k of another P", lambda: {"k": torch.ones(B, T, P + 1, C)}, ValueError, ("k:", "[2, 5, 3, 4]")),
    ("v of another T", lambda: {"v": torch.ones(B, T + 1, C)}, ValueError, ("v:", "[2, 5, 4]", "[2, 6, 4]")),
    ("v of another B", lambda: {"v": torch.ones(B + 1, T, C)}, ValueError, ("v:", "[3, 5, 4]")),
    ("v per perspective, k shared", lambda: {"v": torch.ones(B, T, P, C)}, ValueError, ("v:", "k")),
    ("weights a list", lambda: {"weights": [1.0]}, TypeError, ("weights:", "list")),
    ("weights of integers", lambda: {"weights": torch.ones(P, dtype=whole)}, TypeError, ("weights:", "int64")),
    ("weights of another P", lambda: {"weights": torch.ones(P + 1)}, ValueError, ("weights:", "[3]", "[4]")),
    ("weights [C, P]", lambda: {"weights": torch.ones(C, P)}, ValueError, ("weights:", "[P, C]", "[4, 3]")),
    ("weights [B, T, C]", lambda: {"weights": torch.ones(B, T, C)}, ValueError, ("weights:", "[B, T, P]")),
    ("weights of four axes", lambda: {"weights": torch.ones(B, T, P, C)}, ValueError, ("weights:", "[P]")),
    ("weights a scalar", lambda: {"weights": torch.ones(())}, ValueError, ("weights:", "[]")),
    ("state a tuple", lambda: {"initial_state": (1, 2, 3)}, TypeError, ("initial_state:", "tuple")),
    ("state in float16", lambda: {"initial_state": torch.ones(B, 3, P, C, dtype=half)}, TypeError,
     ("initial_state:", "float32", "float16")),
    ("state in float64", lambda: {"initial_state": torch.ones(B, 3, P, C, dtype=double)}, TypeError,
     ("initial_state:", "float32", "float64")),
    ("state of another B", lambda: {"initial_state": torch.ones(B + 1, 3, P, C)}, ValueError,
     ("initial_state:", "[2, 3, 3, 4]", "[3, 3, 3, 4]")),
    ("state without exp", lambda: {"initial_state": torch.ones(B, 2, P, C)}, ValueError, ("initial_state:",)),
    ("state without P", lambda: {"initial_state": torch.ones(B, 3, C)}, ValueError, ("initial_state:",)),
    ("flag an int", lambda: {"output_final_state": 1}, TypeError, ("output_final_state:", "True or False")),
    ("backend unknown", lambda: {"backend": "cuda"}, ValueError, ("backend:", "torch", "triton", "'cuda'")),
    ("backend None", lambda: {"backend": None}, ValueError, ("backend:", "None")),
    ("triton in float64", lambda: {"k": torch.ones(B, T, C, dtype=double), "v": torch.ones(B, T, C, dtype=double),
     "backend": "triton"}, TypeError, ("float64", "triton")),
    ("k on another device", lambda: {"k": torch.ones(B, T, C, device="meta")}, ValueError, ("k on meta",)),
    ("[C], k per perspective", lambda: single() | {"k": torch.ones(B, T, 1, C)}, ValueError, ("k:", "[B, T, C]")),
    ("[C], u [P, C]", lambda: single() | {"u": torch.ones(1, C)}, ValueError, ("u:", "[C]")),
    ("[C], weights [B, T, 1]", lambda: single() | {"weights": torch.ones(B, T, 1)}, ValueError, ("weights:",)),
    ("[C], state with P", lambda: single() | {"initial_state": torch.ones(B, 3, 1, C)}, ValueError,
     ("initial_state:", "[B, 3, C]")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "error", "says"), WRONG, ids=[row[0] for row in WRONG])
def test_wrong_call(name: str, change: Callable, error: type[Exception], says: tuple[str, ...]) -> None:
    with pytest.raises(error) as caught:
        multi_perspective_wkv(**(arguments() | change()))
    for words in says:
        assert words in str(caught.value), f"{words!r} is not in {str(caught.value)!r}"


@pytest.mark.parametrize("op", [chunk_wkv, recurrent_wkv, reference_wkv])
def test_every_function_validates(op: Callable) -> None:
    with pytest.raises(ValueError, match=r"^k: expected shape"):
        op(**(arguments() | {"k": torch.ones(B, T, C + 1)}))


def test_unknown_options_are_refused() -> None:
    with pytest.raises(TypeError, match="cu_seqlens"):
        multi_perspective_wkv(**arguments(), cu_seqlens=None)


@pytest.mark.parametrize("implementation", [TRITON_CHUNK, TRITON_RECURRENT], ids=lambda i: i.name)
def test_too_many_perspectives_for_the_kernels(implementation: Implementation) -> None:
    case = wkv_case(1, 2, 9, 4).to(implementation.device)
    with pytest.raises(ValueError, match=r"at most 8 perspectives.*P = 9.*torch"):
        case.call(implementation.op, backend="triton")


@pytest.mark.skipif(GPU, reason="needs a machine without a GPU")
def test_triton_on_the_cpu_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(
        ValueError, match=r"backend: 'triton' needs tensors on a GPU.*TRITON_INTERPRET=1.*'cpu'"
    ):
        multi_perspective_wkv(**arguments(), backend="triton")
