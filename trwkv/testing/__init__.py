"""Tools for testing the ops: contracts that every implementation of every op must keep, and what they are made of.

`contracts` holds the promises, `IMPLEMENTATIONS` everything registered to keep them, `fuzz` draws cases until time is
up: `python -m trwkv.testing fuzz --help`. Tolerances are owned by `tolerances`, drawing needs hypothesis
(`strategies`, `fuzz`), nothing else does.
"""

from trwkv.testing.cases import LAYOUTS, Axes, Case, laid_out
from trwkv.testing.contracts import CONTRACTS, COUNTS, Contract
from trwkv.testing.interpreter import interpret_without_gpu
from trwkv.testing.memory import Guard, guarded_inputs, poisoned_allocations
from trwkv.testing.ops import (
    HAS_GPU,
    IMPLEMENTATIONS,
    SMALL,
    Implementation,
    OpContract,
    evaluate,
    register,
    truth_of,
)
from trwkv.testing.tolerances import (
    FLOAT32_ULPS,
    FLOAT64_TOLERANCE,
    ROUNDINGS,
    ROUNDINGS_TRUNCATED,
    VANISHING_SHARE,
    Truth,
    allowed_error,
    assert_accurate,
    half_ulp,
)
from trwkv.testing.wkv import gradients, shares, true_sums, wkv_case, wkv_truth
from trwkv.testing.wkv_states import wkv_states_case

WkvCase = Case
WkvTruth = Truth

__all__ = [
    "CONTRACTS",
    "COUNTS",
    "FLOAT32_ULPS",
    "FLOAT64_TOLERANCE",
    "HAS_GPU",
    "IMPLEMENTATIONS",
    "LAYOUTS",
    "ROUNDINGS",
    "ROUNDINGS_TRUNCATED",
    "SMALL",
    "VANISHING_SHARE",
    "Axes",
    "Case",
    "Contract",
    "Guard",
    "Implementation",
    "OpContract",
    "Truth",
    "WkvCase",
    "WkvTruth",
    "allowed_error",
    "assert_accurate",
    "evaluate",
    "gradients",
    "guarded_inputs",
    "half_ulp",
    "interpret_without_gpu",
    "laid_out",
    "poisoned_allocations",
    "register",
    "shares",
    "true_sums",
    "truth_of",
    "wkv_case",
    "wkv_states_case",
    "wkv_truth",
]
