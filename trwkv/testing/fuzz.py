"""Draws contract cases until time is up, and turns the smallest failing one into a test."""

import importlib
import inspect
import math
import random
import textwrap
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import hypothesis
import torch
from hypothesis import HealthCheck, Phase

from trwkv.testing.contracts import CONTRACTS, COUNTS, Contract
from trwkv.testing.ops import IMPLEMENTATIONS, Implementation
from trwkv.testing.ptx import emulated_launches
from trwkv.testing.strategies import arguments, choosers

EXAMPLES = {"fast": 25, "slow": 10, "interpreted": 2, "compiled": 4}
"""Cases of each contract in a round, by the speed of the implementation."""


@dataclass
class Failure:
    """The smallest case found that breaks a contract."""

    contract: Contract
    implementation: Implementation
    arguments: dict[str, Any]
    at: int
    error: Exception

    def as_test(self, modules: Sequence[str] = (), emulate: int | None = None) -> str:
        """A complete test module that fails while the contract is broken (with `emulate`, in a process of its own)."""
        op = self.implementation.op
        ours = ["CONTRACTS", "IMPLEMENTATIONS"]
        imports = [f"import {name}  # noqa: F401 (registers it)" for name in modules]
        if op.case.__module__.startswith("trwkv.testing."):
            ours.append(op.case.__name__)
        else:
            imports.append(f"from {op.case.__module__} import {op.case.__name__}")
        start = ""
        if emulate is not None:
            imports.append("from trwkv.testing.ptx import emulated_launches")
        elif self.implementation.backend == "triton":
            ours.append("interpret_without_gpu")
            start = "interpret_without_gpu()\n\n\n"
        code = _without_defaults(self)
        if "torch." in code:
            imports.insert(0, "import torch")
        imports.append(f"from trwkv.testing import {', '.join(ours)}")
        body = [
            f"case = {code}",
            f'CONTRACTS["{self.contract.name}"](IMPLEMENTATIONS["{self.implementation.key}"], case, at={self.at})',
        ]
        if emulate is not None:
            body = [
                f"with emulated_launches({emulate}):",
                *textwrap.indent("\n".join(body), "    ").split("\n"),
            ]
        message = textwrap.shorten(f"{type(self.error).__name__}: {self.error}", 100)
        return (
            "\n".join(imports) + f"\n\n{start or chr(10)}def test_found_by_fuzzing() -> None:\n"
            f"    # {message}\n" + textwrap.indent("\n".join(body), "    ") + "\n"
        )


def _without_defaults(failure: Failure) -> str:
    op = failure.implementation.op
    defaults = {name: p.default for name, p in inspect.signature(op.case).parameters.items()}
    return op.code({name: x for name, x in failure.arguments.items() if defaults.get(name) != x})


def find_failure(
    implementation: Implementation,
    contract: Contract,
    examples: int,
    seed: int,
    *,
    deadline: float = math.inf,
    shrinks: bool = True,
    limits: Mapping[str, int] | None = None,
) -> Failure | None:
    """Draws `examples` cases of at most some size, fewer when the clock (`time.monotonic`) passes `deadline`.

    The first case is the simplest there is. A failing one is made as small as it can be if `shrinks`.
    """
    last: list[Failure] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples,
        database=None,
        deadline=None,
        print_blob=False,
        report_multiple_bugs=False,
        phases=(Phase.generate, Phase.shrink) if shrinks else (Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(arguments(implementation, contract, limits), choosers())
    def check(drawn: dict[str, Any], at: int) -> None:
        if not last and time.monotonic() > deadline:
            return
        try:
            contract(implementation, implementation.op.case(**drawn), at)
        except Exception as error:
            last[:] = [Failure(contract, implementation, drawn, at, error)]
            raise

    try:
        check()
    except Exception:
        if not last:
            raise
    return last[0] if last else None


def fuzz(
    minutes: float,
    backend: str,
    op: str,
    seed: int,
    modules: Sequence[str] = (),
    *,
    emulate: int | None = None,
) -> int:
    """Rounds over all implementations and contracts until time is up or one fails; returns the exit status.

    `emulate`: kernels as they are compiled for this compute capability, by `trwkv.testing.ptx`.
    """
    for name in modules:
        importlib.import_module(name)
    torch.set_num_threads(1)
    chosen = [
        x
        for x in IMPLEMENTATIONS.values()
        if backend in ("all", x.backend or "reference") and op in ("all", x.op.name)
    ]
    if not chosen:
        raise ValueError(f"backend, op: expected some of {', '.join(IMPLEMENTATIONS)}; got {backend}, {op}")
    begin = time.monotonic()
    deadline = begin + 60 * minutes
    failure = None
    rounds = 0
    contracts = [c for c in CONTRACTS.values() if emulate is None or not c.starts_process]
    with nullcontext() if emulate is None else emulated_launches(emulate):
        while failure is None and time.monotonic() < deadline:
            failure = _round(chosen, contracts, f"{seed}/{rounds}", deadline)
            rounds += 1
    print_counts(chosen)
    total = sum(COUNTS.values())
    print(f"{total} cases, seed {seed}, {rounds} rounds, {(time.monotonic() - begin) / 60:.1f} minutes")
    if failure is None:
        print("no failure")
        return 0
    print(
        f"\n{failure.implementation.key} breaks {failure.contract.name!r}. The smallest case found, as a test:\n"
    )
    print(failure.as_test(modules, emulate))
    return 1


def _round(
    chosen: Sequence[Implementation], contracts: Sequence[Contract], seed: str, deadline: float
) -> Failure | None:
    pairs = [(x, c) for x in chosen for c in contracts if c.applies_to(x)]
    order = random.Random(seed)
    order.shuffle(pairs)
    for implementation, contract in pairs:
        if time.monotonic() > deadline:
            return None
        examples = 1 if contract.starts_process else EXAMPLES[implementation.speed]
        failure = find_failure(implementation, contract, examples, order.randrange(2**32), deadline=deadline)
        if failure is not None:
            return failure
    return None


def print_counts(chosen: Sequence[Implementation]) -> None:
    """Cases by contract and implementation."""
    width = max(len(name) for name in CONTRACTS)
    print(" " * width, *(x.key for x in chosen), sep="  ")
    for name in CONTRACTS:
        row = (f"{COUNTS[name, x.key] or '-':>{len(x.key)}}" for x in chosen)
        print(f"{name:{width}}", *row, sep="  ")
