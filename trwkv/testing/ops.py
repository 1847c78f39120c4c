"""Ops under contract: what a contract must know of an op, how to run it, and its truth.

A new op passes every contract by being registered: describe it with an `OpContract`, and `register` its
implementations.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trwkv.ops import _tuning
from trwkv.ops._dispatch import is_interpreting
from trwkv.testing.cases import Axes, Case, join, take
from trwkv.testing.tolerances import Truth, assert_accurate

HAS_GPU = torch.cuda.is_available()
SMALL = {"fwd_block_c": 16, "fwd_block_t": 4, "bwd_block_c": 16, "bwd_block_t": 4, "chunk_len": 64}
SMALL_COMPILED = SMALL | {"fwd_block_c": 32, "bwd_block_c": 32}  # with fewer, lanes of a warp share channels

Result = tuple[Tensor, Tensor]  # (output, final_state)
Run = Callable[[Case], Result]
Named = dict[str, Tensor]


@dataclass(frozen=True)
class OpContract:
    """What the contracts must know of an op.

    The op takes tensors by name, among them `initial_state`, and the options `output_final_state`, `cu_seqlens`,
    `reverse` and `backend`; it returns (output, final_state).
    """

    name: str
    case: Callable[..., Case]
    """Draws a case from plain keyword arguments, B, T, C, seed, dtype, cu_seqlens and reverse among them."""
    choices: Mapping[str, Sequence]
    """What each of these arguments may be, the simplest first; B, dtype, cu_seqlens and reverse need not be listed."""
    complete: Mapping[str, Any]
    """Those with which a case has every input there is."""
    adversarial: Mapping[str, Sequence]
    """The same for the arguments that make numbers hard."""
    dense_truth: Callable[[Case, bool], Truth]
    """Truth of a float64 case of rows, run forwards; the flag: with gradients."""
    units: Callable[[Result], Named]
    """From (output, final_state), that by which results must be multiplied to compare them: {} if they are unique."""
    comparable: Callable[[Result, Named], Named]
    """Differentiable "output" and "state", unique, from (output, final_state) and the units of the truth."""
    result_dtype: Callable[[Case], torch.dtype]
    """Of the output. That of the state is float32, or float64 for float64 inputs."""
    is_gradient_causal: bool = True
    """Whether tokens that receive no gradient leave the others' gradients as they are, to the bit."""
    error_bound: Callable[[Case], Tensor] | None = None
    """Proven bound of the float32 output's error, element by element, for a float64 case of rows, run forwards."""
    configurations: Sequence[Mapping[str, int]] = ()
    """All block sizes that ship with its kernels, as `pin_config` takes them."""

    def code(self, arguments: Mapping[str, Any]) -> str:
        """The expression that draws this case."""
        return f"{self.case.__name__}({', '.join(f'{name}={x!r}' for name, x in arguments.items())})"


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op."""

    op: OpContract
    name: str
    function: Callable[..., Any]
    backend: str | None = None  # passed on as `backend`, unless it is None
    is_token_loop: bool = False

    @property
    def key(self) -> str:
        return f"{self.op.name}/{self.name}"

    @property
    def is_kernel(self) -> bool:
        return self.backend == "triton"

    @property
    def device(self) -> str:
        return "cuda" if HAS_GPU and self.is_kernel else "cpu"

    @property
    def is_interpreted(self) -> bool:
        return self.is_kernel and is_interpreting()

    @property
    def speed(self) -> str:
        """ "fast"; "slow": a loop over the tokens; "interpreted": a hundred times slower still; "compiled": a kernel on
        a GPU, some seconds for every new combination of sizes, dtypes and options."""
        if self.is_kernel:
            return "interpreted" if is_interpreting() else "compiled"
        return "slow" if self.is_token_loop else "fast"

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Of k and v."""
        floats = (torch.float32, torch.bfloat16, torch.float16)
        return floats if self.backend == "triton" else (*floats, torch.float64)

    @contextmanager
    def configured(self, changes: Mapping[str, int] | None = None) -> Iterator[None]:
        """Small blocks for kernels, so that small cases meet every edge and compile soon; or blocks as given."""
        sizes = changes
        if changes is None and self.is_kernel:
            sizes = SMALL if self.is_interpreted else SMALL_COMPILED
        with nullcontext() if sizes is None else _tuning.pin_config(**sizes):
            yield

    def run(self, case: Case) -> Result:
        options = {} if self.backend is None else {"backend": self.backend}
        return case.call(self.function, **options)

    def assert_accurate(self, results: Named, truth: Truth) -> None:
        for name, x in results.items():
            assert_accurate(name, x, truth, truncates=self.is_interpreted)

    def check(self, case: Case, truth: Truth, run: Run | None = None, skip: Collection[str] = ()) -> None:
        """Types and accuracy of the output, the state and all gradients but those to skip."""
        self._check(case, evaluate(self.op, case, run or self.run, truth.units), truth, skip)

    def check_forward(self, case: Case, truth: Truth, run: Run | None = None) -> None:
        """Types and accuracy of the output and the state, when no gradient is wanted."""
        self._check(case, forward(case, run or self.run), truth)

    def _check(self, case: Case, results: Named, truth: Truth, skip: Collection[str] = ()) -> None:
        expected = {"output": self.op.result_dtype(case), "state": case.accumulator}
        expected |= {name: x.dtype for name, x in case.inputs.items()}
        for name, x in results.items():
            if x.dtype != expected[name]:
                raise AssertionError(f"{name}: expected {expected[name]}; got {x.dtype}")
        results = results | comparable(self.op, results, truth, case.accumulator)
        self.assert_accurate({name: x for name, x in results.items() if name not in skip}, truth)


IMPLEMENTATIONS: dict[str, Implementation] = {}
"""Everything registered, by "op/implementation"."""


def register(*implementations: Implementation) -> None:
    IMPLEMENTATIONS.update({x.key: x for x in implementations})


def evaluate(op: OpContract, case: Case, run: Run, units: Named | None = None) -> Named:
    """Results as they are, "output" and "state", and the gradients by the inputs' names.

    The incoming gradients are those of the comparable results; without `units`, in units of these very results.
    """
    leaves = {name: x.detach().requires_grad_() for name, x in case.inputs.items()}
    result = run(replace(case, inputs=leaves))
    if units is None:
        units = op.units((result[0].detach(), result[1].detach()))
    unique = op.comparable(result, {name: x.to(result[0].device) for name, x in units.items()})
    outputs = {name: unique[name] for name in case.grads if unique[name].requires_grad}
    sent = [case.grads[name].to(x.dtype) for name, x in outputs.items()]
    grads = tuple(torch.zeros_like(x) for x in leaves.values())
    if outputs:
        grads = torch.autograd.grad(
            list(outputs.values()), list(leaves.values()), sent, materialize_grads=True
        )
    results = {"output": result[0].detach(), "state": result[1].detach()}
    return results | dict(zip(leaves, grads, strict=True))


def forward(case: Case, run: Run) -> Named:
    """The first part of `evaluate`."""
    with torch.no_grad():
        output, state = run(case)
    return {"output": output, "state": state}


def comparable(op: OpContract, results: Named, truth: Truth, dtype: torch.dtype) -> Named:
    """`forward`'s results as the truth has them, in `dtype` where they were multiplied by units."""
    result = results["output"], results["state"]
    unique = op.comparable(result, {name: x.to(result[0].device) for name, x in truth.units.items()})
    return {name: x.to(dtype) if name in truth.units else x for name, x in unique.items()}


def truth_of(op: OpContract, case: Case, *, backward: bool = True) -> Truth:
    """Float64 results of any case. Sequences are cut out and turned round here, not by an oracle's options."""
    case = case.to("cpu").to(torch.float64)
    if case.reverse:
        index = case.flip_index()
        truth = truth_of(op, case.flipped(), backward=backward)
        return _each(truth, case.axes, lambda x, a: take(x, a.tokens, index))
    if case.cu_seqlens is None:
        return op.dense_truth(case, backward)
    return _joined([op.dense_truth(alone, backward) for alone in case.unpacked()], case.axes)


def _each(truth: Truth, axes: Mapping[str, Axes], change: Callable[[Tensor, Axes], Tensor]) -> Truth:
    def changed(tensors: Named) -> Named:
        return {name: change(x, axes[name]) for name, x in tensors.items()}

    return Truth(changed(truth.values), changed(truth.conditions), changed(truth.units))


def _joined(truths: Sequence[Truth], axes: Mapping[str, Axes]) -> Truth:
    """Results of packed sequences from those of each alone; what they share, such as decays, adds up."""

    def all_of(parts: Sequence[Named]) -> Named:
        return {name: join([part[name] for part in parts], axes[name].sequence_axis) for name in parts[0]}

    return Truth(
        all_of([t.values for t in truths]),
        all_of([t.conditions for t in truths]),
        all_of([t.units for t in truths]),
    )
