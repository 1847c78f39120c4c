"""The promises of every op, each as a function of an implementation and a case (docs/testing.md lists them).

`at` is a whole number from which a contract takes what it must choose: a cut, a neighbour, an order.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from trwkv.testing.cases import Axes, Case, along, join, take
from trwkv.testing.memory import guarded_inputs, poisoned_allocations
from trwkv.testing.ops import Implementation, Result, evaluate, truth_of
from trwkv.testing.tolerances import assert_within, half_ulp

COUNTS: Counter[tuple[str, str]] = Counter()
"""Cases checked in this process, by (contract, implementation)."""


@dataclass(frozen=True)
class Contract:
    """A promise: its check, and what cases it needs."""

    name: str
    check: Callable[[Implementation, Case, int], None]
    is_adversarial: bool = False
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Values of the case's arguments; `packed` and `several` say whether it has cu_seqlens, and many sequences."""

    starts_process: bool = False

    def applies_to(self, implementation: Implementation) -> bool:
        if self.check is every_configuration:
            return implementation.backend == "triton" and bool(implementation.op.configurations)
        return self.check is not error_bound or implementation.op.error_bound is not None

    def __call__(self, implementation: Implementation, case: Case, at: int = 0) -> None:
        COUNTS[self.name, implementation.key] += 1
        with implementation.configured():
            self.check(implementation, case.to(implementation.device), at)


def agreement(implementation: Implementation, case: Case, at: int = 0) -> None:
    """Output, state and gradients are the float64 truth to within the tolerance; without gradients too."""
    truth = truth_of(implementation.op, case)
    implementation.check(case, truth)
    implementation.check_forward(case, truth)


def forward_accuracy(implementation: Implementation, case: Case, at: int = 0) -> None:
    """The forward part of `agreement`, whose cost grows with T alone."""
    truth = truth_of(implementation.op, case, backward=False)
    implementation.check_forward(case, truth)


def partial_gradients(implementation: Implementation, case: Case, at: int = 0) -> None:
    """Gradients are right when only some inputs want them, and when only the output or only the state sends any."""
    sources = [name for i, name in enumerate(("output", "state")) if (at % 3 + 1) >> i & 1]
    case = replace(case, grads={name: x for name, x in case.grads.items() if name in sources})
    wanted = [name for i, name in enumerate(case.inputs) if (at + 1) >> i & 1] or list(case.inputs)
    truth = truth_of(implementation.op, case)

    def run(c: Case) -> Result:
        inputs = {name: x if name in wanted else x.detach() for name, x in c.inputs.items()}
        return implementation.run(replace(c, inputs=inputs))

    results = evaluate(implementation.op, case, run, truth.units)
    implementation.assert_accurate({name: results[name] for name in wanted}, truth)


def causality(implementation: Implementation, case: Case, at: int = 0) -> None:
    """Whatever the tokens from one on hold, outputs before it keep their bits. A loss on these outputs gives the later
    tokens gradients of zero, and (`OpContract.is_gradient_causal`) all others the same bits.
    """
    op, positions = implementation.op, case.positions()
    is_later = positions >= 1 + at % max(1, int(positions.max()))

    def later(name: str, x: Tensor) -> Tensor:
        return along(x, case.axes[name].tokens, is_later).expand(x.shape)

    grad = case.grads["output"]
    case = replace(case, grads={"output": grad.masked_fill(later("output", grad), 0.0)})
    per_token = [name for name in case.inputs if case.axes[name].tokens is not None]
    other = {
        name: torch.where(later(name, case.inputs[name]), 3 - 7 * case.inputs[name], case.inputs[name])
        for name in per_token
    }
    first, second = (
        evaluate(op, c, implementation.run) for c in (case, replace(case, inputs=case.inputs | other))
    )
    is_earlier = ~later("output", first["output"])
    assert_same("earlier output", first["output"][is_earlier], second["output"][is_earlier])
    for name in per_token:
        own = first[name][later(name, first[name])]
        assert_same(f"gradient of later {name}", own, torch.zeros_like(own))
    for name in case.inputs if op.is_gradient_causal else ():
        assert_same(f"gradient of {name}", first[name], second[name])


def neighbours(implementation: Implementation, case: Case, at: int = 0) -> None:
    """Sequences in another order give the same bits in that order; one of NaN leaves the others as they were."""
    op, n = implementation.op, case.sequences
    alone = [name for name in ("output", "state", *case.inputs) if not case.is_shared(name)]
    order = torch.arange(n).roll(1 + at % max(1, n - 1))
    change = case.permutation(order)
    first = evaluate(op, case, implementation.run)
    second = evaluate(op, case.permuted(order), implementation.run)
    for name in alone:
        assert_same(f"{name}, reordered", change(first[name], case.axes[name]), second[name])
    poisoned = case.mapped(lambda x, a: x.masked_fill(case.sequence_mask(x, a, at % n), float("nan")))
    third = evaluate(op, poisoned, implementation.run)
    for name in alone:
        others = ~case.sequence_mask(first[name], case.axes[name], at % n).expand(first[name].shape)
        assert_same(f"{name} beside NaN", first[name][others], third[name][others])


def lanes(implementation: Implementation, case: Case, at: int = 0) -> None:
    """NaN in one lane (channel, head) leaves the others as they were: to the bit, but for what sequences share, whose
    sums over the tokens may be grouped otherwise.
    """
    op, truth = implementation.op, truth_of(implementation.op, case)

    def hit(x: Tensor, axes: Axes) -> Tensor:
        if axes.lane is None:
            return torch.zeros_like(x, dtype=torch.bool)
        n = x.shape[axes.lane]
        return along(x, axes.lane, torch.arange(n) == at % n).expand(x.shape)

    poisoned = case.mapped(lambda x, a: x.masked_fill(hit(x, a), float("nan")))
    first, second = (evaluate(op, c, implementation.run, truth.units) for c in (case, poisoned))
    for name in ("output", "state", *case.inputs):
        if case.axes[name].lane is None:
            continue
        here = hit(first[name], case.axes[name])
        if case.is_shared(name):
            true = truth.values[name].to(second[name])
            implementation.assert_accurate({name: torch.where(here, true, second[name])}, truth)
        else:
            assert_same(f"{name} beside NaN", first[name][~here], second[name][~here])


def split(implementation: Implementation, case: Case, at: int = 0) -> None:
    """[0, t) and then [t, T) from the state is one run, forward and backward."""
    truth = truth_of(implementation.op, case)
    cut = at % (case.tokens + 1)
    # of these autograd adds the parts' gradients, each rounded
    rounded_twice = [name for name, x in case.inputs.items() if case.is_shared(name) and x.itemsize < 4]
    implementation.check(case, truth, lambda c: in_parts(implementation, c, [cut]), skip=rounded_twice)


def decoding(implementation: Implementation, case: Case, at: int = 0) -> None:
    """Tokens one by one are one call."""
    truth = truth_of(implementation.op, case, backward=False)
    implementation.check_forward(case, truth, lambda c: in_parts(implementation, c, range(1, c.tokens)))


def in_parts(implementation: Implementation, case: Case, cuts: Sequence[int]) -> Result:
    """Runs a case in several calls, each from the state of the one before."""
    rows: list[Tensor] = []
    state = case.initial_state
    for begin, end in pairwise((0, *cuts, case.tokens)):
        output, state = implementation.run(case.part(begin, end, state))
        rows.append(output)
    return join(rows[::-1] if case.reverse else rows, case.axes["output"].tokens), state


def packed_is_separate(implementation: Implementation, case: Case, at: int = 0) -> None:
    """`cu_seqlens` gives the bits that each sequence gives alone."""
    together = evaluate(implementation.op, case, implementation.run)
    alone = [evaluate(implementation.op, c, implementation.run) for c in case.unpacked()]
    for name in together:
        if not case.is_shared(name):
            assert_same(name, together[name], join([x[name] for x in alone], case.axes[name].sequence_axis))


def reverse_is_flipped(implementation: Implementation, case: Case, at: int = 0) -> None:
    """`reverse` gives the bits of the flipped sequences, flipped back; where they share an input, up to the order of
    sums.
    """
    index = case.flip_index()
    backwards = evaluate(implementation.op, case, implementation.run)
    forwards = evaluate(implementation.op, case.flipped(), implementation.run)
    for name in backwards:
        if not case.is_shared(name):
            assert_same(name, backwards[name], take(forwards[name], case.axes[name].tokens, index))


def repetition(implementation: Implementation, case: Case, at: int = 0) -> None:
    """A second run gives the same bits, also after runs with other block sizes."""
    first = evaluate(implementation.op, case, implementation.run)
    if implementation.backend == "triton" and implementation.op.configurations:
        sizes = implementation.op.configurations
        with implementation.configured(sizes[at % len(sizes)]):
            implementation.run(case)
    second = evaluate(implementation.op, case, implementation.run)
    for name in first:
        assert_same(name, first[name], second[name])


def other_process(implementation: Implementation, case: Case, at: int = 0) -> None:
    """Another process, whose caches are cold, computes the same bits."""
    code = (
        "import importlib, sys, torch; from trwkv.testing import IMPLEMENTATIONS, interpret_without_gpu\n"
        "from trwkv.testing.contracts import digest\n"
        "interpret_without_gpu(); importlib.import_module(sys.argv[3])\n"
        "print(digest(IMPLEMENTATIONS[sys.argv[1]], torch.load(sys.argv[2], weights_only=False)))"
    )
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "case.pt")
        torch.save(case.to("cpu"), path)
        environment = os.environ | {"TRITON_CACHE_DIR": os.path.join(folder, "cache")}
        command = [sys.executable, "-c", code, implementation.key, path, implementation.function.__module__]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise AssertionError(f"the other process failed:\n{done.stderr}")
    here, there = digest(implementation, case), done.stdout.strip()
    if here != there:
        raise AssertionError(f"results: expected the same bits in another process; got {here} and {there}")


def digest(implementation: Implementation, case: Case) -> str:
    """Hash of all results and gradients of a case, computed by one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with implementation.configured():
            results = evaluate(implementation.op, case.to(implementation.device), implementation.run)
    finally:
        torch.set_num_threads(threads)
    summary = hashlib.sha256()
    for x in results.values():
        summary.update(x.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return summary.hexdigest()


def every_configuration(implementation: Implementation, case: Case, at: int = 0) -> None:
    """Every configuration of block sizes is right, not just the one that would be chosen."""
    truth = truth_of(implementation.op, case)
    for sizes in implementation.op.configurations:
        with implementation.configured(sizes):
            implementation.check(case, truth)


def memory(implementation: Implementation, case: Case, at: int = 0) -> None:
    """Nothing unwritten is read and nothing foreign is touched: results are true although all memory around inputs and
    results, and in fresh memory, is NaN; the bands around it and the inputs stay as they were.
    """
    truth = truth_of(implementation.op, case)
    before = case.mapped(lambda x, _: x.clone())
    with poisoned_allocations() as guard:
        guarded = guarded_inputs(case, guard)
        implementation.check(guarded, truth)
    for name, x in guarded.inputs.items():
        assert_same(f"{name} after the call", x, before.inputs[name])


def layouts(implementation: Implementation, case: Case, at: int = 0) -> None:
    """Inputs in any layout give the bits of contiguous ones; what sequences share, up to the order of sums."""
    first = evaluate(implementation.op, case, implementation.run)
    second = evaluate(implementation.op, case.contiguous(), implementation.run)
    for name in first:
        if not case.is_shared(name):
            assert_same(name, first[name], second[name])


def error_bound(implementation: Implementation, case: Case, at: int = 0) -> None:
    """Every element of a float32 output keeps the proven bound of the op, half an ulp of its own rounding added."""
    truth = truth_of(implementation.op, case, backward=False)
    bound = implementation.op.error_bound
    if bound is None:
        raise ValueError(f"op: expected one with an error bound; got {implementation.op.name}")
    allowed = bound(case.to("cpu").to(torch.float64))
    with torch.no_grad():
        output, _ = implementation.run(case)
    value = truth.values["output"]
    assert_within("output", output, value, allowed + half_ulp(value, torch.float32))


def assert_same(name: str, first: Tensor, second: Tensor) -> None:
    """Fails unless two tensors are equal to the bit."""
    if first.shape != second.shape:
        raise AssertionError(f"{name}: expected one shape; got {list(first.shape)} and {list(second.shape)}")
    differs = first != second
    if differs.any():
        at = tuple(int(i) for i in differs.nonzero()[0])
        raise AssertionError(
            f"{name}{list(at)}: expected the same bits; got {first[at].item():.9g} and {second[at].item():.9g} "
            f"({int(differs.sum())} of {differs.numel()} differ)"
        )


def _by_name(*contracts: Contract) -> dict[str, Contract]:
    return {contract.name: contract for contract in contracts}


CONTRACTS = _by_name(
    Contract("agreement", agreement),
    Contract("any finite input", agreement, is_adversarial=True),
    Contract("partial gradients", partial_gradients),
    Contract("causality", causality, is_adversarial=True),
    Contract("neighbours", neighbours, is_adversarial=True, fixed={"several": True}),
    Contract("lanes", lanes, is_adversarial=True),
    Contract("split", split, is_adversarial=True, fixed={"packed": False}),
    Contract("decoding", decoding, fixed={"packed": False}),
    Contract("packed is separate", packed_is_separate, is_adversarial=True, fixed={"packed": True}),
    Contract("reverse is flipped", reverse_is_flipped, is_adversarial=True, fixed={"reverse": True}),
    Contract("repetition", repetition, is_adversarial=True),
    Contract("other process", other_process, starts_process=True),
    Contract("every configuration", every_configuration),
    Contract("memory", memory),
    Contract("layouts", layouts),
    Contract(
        "error bound",
        error_bound,
        is_adversarial=True,
        fixed={
            "packed": False,
            "reverse": False,
            "dtype": torch.float32,
            "mixed_dtypes": False,
            "weights": "none",
        },
    ),
)
