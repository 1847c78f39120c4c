"""Hypothesis strategies: the arguments of a case, all drawn together, for any op, implementation and contract."""

from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st

from trwkv.testing.contracts import Contract
from trwkv.testing.ops import Implementation

EDGES = (1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 130)
LIMITS = {
    "fast": {"T": 140},
    "slow": {"T": 33},
    "interpreted": {"T": 20, "P": 3},
    "compiled": {"T": 130, "P": 3},
}
"""Largest sizes, by the speed of the implementation."""


@st.composite
def arguments(
    draw: st.DrawFn,
    /,
    implementation: Implementation,
    contract: Contract,
    limits: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """What to draw a case from, for `implementation.op.case`."""
    fixed, op = contract.fixed, implementation.op
    limits = LIMITS[implementation.speed] if limits is None else limits

    def one(name: str, strategy: st.SearchStrategy) -> Any:
        return fixed[name] if name in fixed else draw(strategy)

    at_least = 2 if fixed.get("several") else 1
    T = one("T", token_counts(limits["T"]))
    drawn: dict[str, Any] = {"B": 1, "T": T}
    if one("packed", st.booleans()):
        cuts = st.lists(st.integers(0, T), min_size=at_least - 1, max_size=4)
        drawn["cu_seqlens"] = (0, *sorted(draw(cuts)), T)
    else:
        drawn["B"] = one("B", st.integers(at_least, at_least + 1))
    drawn["reverse"] = one("reverse", st.booleans())
    drawn["dtype"] = one("dtype", st.sampled_from(implementation.dtypes))
    choices = {**op.choices, **(op.adversarial if contract.is_adversarial else {})}
    for name, values in choices.items():
        values = [x for x in values if name not in limits or x <= limits[name]]
        drawn[name] = one(name, st.sampled_from(values))
    drawn["seed"] = draw(st.integers(0, 10**6))
    return drawn


def token_counts(longest: int) -> st.SearchStrategy[int]:
    return st.one_of(st.sampled_from([T for T in EDGES if T <= longest]), st.integers(1, longest))


def choosers() -> st.SearchStrategy[int]:
    """The `at` of a contract."""
    return st.integers(0, 2**20)
