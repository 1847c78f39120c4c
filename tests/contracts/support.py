"""How the contracts are run under pytest: on every implementation registered, with so many cases drawn for each."""

from typing import Any

import pytest

from trwkv.testing import CONTRACTS, IMPLEMENTATIONS, Case, Implementation
from trwkv.testing.fuzz import find_failure

EXAMPLES = {"fast": 50, "slow": 8, "interpreted": 2, "compiled": 4}
"""Cases of each contract, by the speed of the implementation; the first is always the simplest there is."""
CHUNKED = ["wkv/torch-chunk", "wkv/triton-chunk", "wkv_states/torch", "wkv_states/triton"]
"""Those that cut T into chunks: one algorithm each, forward and backward, with scratch memory and scans."""
SIZES = {"T": 9, "P": 2}
"""Sizes at which the interpreter finishes; with its blocks of 4 tokens, two full tiles and a ragged one."""


def everywhere(contract: str = "agreement", **wanted: Any) -> pytest.MarkDecorator:
    """The test's argument `implementation`: all to which the contract applies, and whose attributes are as wanted."""
    chosen = [
        x
        for x in IMPLEMENTATIONS.values()
        if CONTRACTS[contract].applies_to(x)
        and all(getattr(x, name) == value for name, value in wanted.items())
    ]
    return pytest.mark.parametrize("implementation", chosen, ids=lambda x: x.key)


def hold(contract: str, implementation: Implementation, *, times: int = 1) -> None:
    """Draws cases, the same in every run, and checks the contract on each."""
    failure = find_failure(
        implementation, CONTRACTS[contract], times * EXAMPLES[implementation.speed], seed=0,
        shrinks=not implementation.is_kernel,  # which takes too long to search for a smaller failure
        limits=SIZES if implementation.is_interpreted else None,
    )  # fmt: skip
    if failure is not None:
        raise AssertionError(f"{failure.error}\n\n{failure.as_test()}") from failure.error


def case_of(implementation: Implementation, **arguments: Any) -> Case:
    """A case with every input the op has, on the CPU."""
    usual = {"B": 2, "T": 9, "P": 2, "C": 3}
    return implementation.op.case(**(usual | dict(implementation.op.complete) | arguments))
