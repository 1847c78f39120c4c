"""The op among PyTorch's own tools: each a function of an implementation and a case."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from trwkv.testing.cases import Case
from trwkv.testing.contracts import assert_same
from trwkv.testing.ops import Implementation, Named, Result, Run, evaluate

NAMESPACE = "trwkv"


class RecordedOperators(TorchDispatchMode):
    """Every call of one of the library's operators, below autograd: (operator, arguments)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == NAMESPACE:
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def recorded(implementation: Implementation, case: Case) -> list[tuple[Any, tuple[Any, ...]]]:
    """The operators that one call and its backward use, with their arguments."""
    with RecordedOperators() as mode:
        evaluate(implementation.op, case, implementation.run)
    return mode.calls


def opcheck(operator: Any, arguments: tuple[Any, ...], *, differentiates: bool) -> None:
    """Schema, fakes, autograd registration, and tracing with symbolic shapes."""
    tests = ["test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic"]

    def leaf(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.detach().clone().requires_grad_(differentiates and x.is_floating_point())

    torch.library.opcheck(operator, tuple(map(leaf, arguments)), test_utils=tests)


def compiled(implementation: Implementation, cases: list[Case]) -> None:
    """`torch.compile(fullgraph=True, dynamic=True)`: one graph for all cases, forward and backward, the same bits."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(_plain(implementation, cases[0]), fullgraph=True, dynamic=True, backend=counter)
    for case in cases:
        for name, x in case.inputs.items():
            if case.axes[name].tokens is not None:
                torch._dynamo.mark_dynamic(x, case.axes[name].tokens)
        _assert_alike(implementation, case, lambda c: run(c.inputs, c.cu_seqlens))
    if counter.frame_count != 1:
        raise AssertionError(f"compile: expected one graph; got {counter.frame_count}")


def exported(implementation: Implementation, case: Case) -> None:
    """`torch.export`, with its own shapes, gives the same bits."""

    class Module(torch.nn.Module):
        def forward(self, inputs: Named, cu_seqlens: Tensor | None) -> Result:
            return _plain(implementation, case)(inputs, cu_seqlens)

    arguments = (case.inputs, case.cu_seqlens)
    program = torch.export.export(Module(), arguments).module()
    for name, a, b in zip(("output", "state"), program(*arguments), Module()(*arguments), strict=True):
        assert_same(name, a, b)


def checkpointed(implementation: Implementation, case: Case) -> None:
    """Activation checkpointing changes no bit."""

    def run(c: Case) -> Result:
        return checkpoint(_plain(implementation, c), c.inputs, c.cu_seqlens, use_reentrant=False)

    _assert_alike(implementation, case, run)


def hooked(implementation: Implementation, case: Case) -> int:
    """Whatever is saved for the backward passes saved-tensor hooks, which may move it; returns how many did."""
    packed: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        packed.append(x)
        return x.clone()

    def run(c: Case) -> Result:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            return implementation.run(c)

    _assert_alike(implementation, case, run)
    return len(packed)


def meta(implementation: Implementation, case: Case) -> None:
    """Meta tensors give shapes and dtypes, and compute nothing."""
    real = implementation.run(case)
    shapes = implementation.run(case.to("meta"))
    for a, b in zip(real, shapes, strict=True):
        if (a.shape, a.dtype) != (b.shape, b.dtype) or not b.is_meta:
            raise AssertionError(f"meta: expected {list(a.shape)} {a.dtype}; got {list(b.shape)} {b.dtype}")


def mapped(implementation: Implementation, case: Case, size: int) -> None:
    """`torch.func.vmap` over `size` copies of the case whose tokens differ is the op on each."""

    def run(tokens: Named) -> Result:
        return implementation.run(replace(case, inputs=case.inputs | tokens))

    per_token = [name for name in case.inputs if case.axes[name].tokens is not None]
    copies = {name: torch.stack([case.inputs[name] + i for i in range(size)]) for name in per_token}
    together = torch.func.vmap(run)(copies)
    for i in range(size):
        alone = run({name: x[i] for name, x in copies.items()})
        for name, a, b in zip(("output", "state"), together, alone, strict=True):
            assert_same(name, a[i], b)


def _plain(implementation: Implementation, case: Case) -> Callable[[Named, Tensor | None], Result]:
    """The op as a function of tensors alone."""
    options: dict[str, Any] = {} if implementation.backend is None else {"backend": implementation.backend}
    if case.reverse:
        options["reverse"] = True

    def run(inputs: Named, cu_seqlens: Tensor | None) -> Result:
        packed = {} if cu_seqlens is None else {"cu_seqlens": cu_seqlens}
        output, state = implementation.function(**inputs, **packed, **options, output_final_state=True)
        return output, state

    return run


def _assert_alike(implementation: Implementation, case: Case, run: Run) -> None:
    expected = evaluate(implementation.op, case, implementation.run)
    got = evaluate(implementation.op, case, run)
    for name in expected:
        assert_same(name, expected[name], got[name])
