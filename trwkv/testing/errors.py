"""Wrong calls that every op must refuse, made from any case of it."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trwkv.testing.ops import Implementation


@dataclass(frozen=True)
class WrongCall:
    """Arguments to replace in a call that is right, and what the exception must be and say."""

    name: str
    change: dict[str, Any]
    error: type[Exception]
    says: tuple[str, ...]


def right_call(implementation: Implementation, **arguments: Any) -> dict[str, Any]:
    """Arguments of a call with every input there is."""
    op = implementation.op
    case = op.case(**{"B": 2, "T": 5, "P": 3, "C": 4, **op.complete, **arguments}).to(implementation.device)
    packed = {} if case.cu_seqlens is None else {"cu_seqlens": case.cu_seqlens}
    return case.inputs | packed


def wrong_calls(implementation: Implementation) -> Iterator[WrongCall]:
    """Wrong types, shapes, devices and options, for each argument the op has."""
    parameters = inspect.signature(implementation.function).parameters
    given = right_call(implementation)
    first = next(iter(given))  # its shape tells what the others must be
    for name, x in given.items():
        yield WrongCall(f"{name} a list", {name: [1.0]}, TypeError, (f"{name}: expected a tensor", "list"))
        yield WrongCall(f"{name} a number", {name: 1.0}, TypeError, (f"{name}: expected a tensor", "float"))
        if parameters[name].default is inspect.Parameter.empty:
            yield WrongCall(
                f"{name} None", {name: None}, TypeError, (f"{name}: expected a tensor", "NoneType")
            )
        for dtype in (torch.int64, torch.bool, torch.complex64):
            says = (f"{name}: expected", str(dtype).removeprefix("torch."))
            yield WrongCall(f"{name} in {dtype}", {name: x.to(dtype)}, TypeError, says)
        yield WrongCall(f"{name} elsewhere", {name: x.to("meta")}, ValueError, (f"{name} on meta",))
        subject = "expected shape" if name == first else f"{name}: expected shape"
        more = torch.cat([x, x[..., :1]], dim=-1)
        for shape, other in (
            ("longer", more),
            ("scalar", x.flatten()[0]),
            ("with two axes more", x[None, None]),
        ):
            got = "got" if name == first else f"got {list(other.shape)}"
            yield WrongCall(f"{name} {shape}", {name: other}, ValueError, (subject, got))
    yield from _wrong_options(parameters)
    yield from _wrong_sequences(implementation)


def _wrong_options(parameters: Any) -> Iterator[WrongCall]:
    for name in ("output_final_state", "reverse"):
        for value in (1, "yes", None):
            yield WrongCall(
                f"{name} {value!r}", {name: value}, TypeError, (f"{name}: expected True or False",)
            )
    if "backend" in parameters:
        for value in ("cuda", None, 1):
            says = ("backend: expected one of", "triton", "torch", repr(value))
            yield WrongCall(f"backend {value!r}", {"backend": value}, ValueError, says)
    yield WrongCall("an unknown option", {"cu_seqlen": None}, TypeError, ("cu_seqlen",))


def _wrong_sequences(implementation: Implementation) -> Iterator[WrongCall]:
    def packed(value: Any, **arguments: Any) -> dict[str, Any]:
        arguments = {"B": 1, "cu_seqlens": (0, 2, 5), **arguments}
        return right_call(implementation, **arguments) | {"cu_seqlens": value}

    def bounds(*values: int) -> Tensor:
        return torch.tensor(values)

    right = bounds(0, 2, 5)
    rows: list[tuple[str, dict[str, Any], type[Exception], tuple[str, ...]]] = [
        ("a list", packed([0, 2, 5]), TypeError, ("cu_seqlens: expected a tensor", "list")),
        ("of floats", packed(right.float()), TypeError, ("cu_seqlens: expected", "int32", "float32")),
        ("of bytes", packed(right.to(torch.uint8)), TypeError, ("cu_seqlens: expected", "uint8")),
        ("of two axes", packed(right[None]), ValueError, ("cu_seqlens: expected shape [N + 1]", "[1, 3]")),
        ("of one value", packed(bounds(0)), ValueError, ("cu_seqlens: expected shape [N + 1]", "[1]")),
        ("empty", packed(bounds().long()), ValueError, ("cu_seqlens: expected shape [N + 1]", "[0]")),
        (
            "from 1",
            packed(bounds(1, 2, 5)),
            ValueError,
            ("cu_seqlens: expected", "from 0 to T = 5", "[1, 2, 5]"),
        ),
        ("beyond T", packed(bounds(0, 2, 6)), ValueError, ("cu_seqlens: expected", "T = 5", "[0, 2, 6]")),
        ("short of T", packed(bounds(0, 2, 4)), ValueError, ("cu_seqlens: expected", "T = 5", "[0, 2, 4]")),
        (
            "falling",
            packed(bounds(0, 4, 2, 5), cu_seqlens=(0, 2, 4, 5)),
            ValueError,
            ("cu_seqlens:", "[0, 4, 2, 5]"),
        ),
        ("negative", packed(bounds(0, -1, 5)), ValueError, ("cu_seqlens: expected", "[0, -1, 5]")),
        (
            "with two rows",
            right_call(implementation) | {"cu_seqlens": right},
            ValueError,
            ("B = 1", "cu_seqlens"),
        ),
        (
            "of one more than states",
            packed(bounds(0, 2, 3, 5)),
            ValueError,
            ("initial_state: expected shape [N,",),
        ),
    ]
    for name, change, error, says in rows:
        yield WrongCall(f"cu_seqlens {name}", change, error, says)


def wrong(call: Callable[[], Any], expected: WrongCall) -> None:
    """Fails unless the call raises what is expected."""
    try:
        call()
    except Exception as error:
        missing = [words for words in expected.says if words not in str(error)]
        if type(error) is expected.error and not missing:
            return
        raise AssertionError(f"{expected}: got {type(error).__name__}: {error}") from error
    raise AssertionError(f"{expected}: no exception")
