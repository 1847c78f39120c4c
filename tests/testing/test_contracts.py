"""Each contract catches what it is there for, and passes what keeps it."""

import pytest

from tests.testing.broken import BROKEN, as_implementation
from trwkv.testing import CONTRACTS, IMPLEMENTATIONS

CHUNKED = IMPLEMENTATIONS["wkv/triton-chunk"]


@pytest.mark.parametrize("row", BROKEN, ids=lambda row: f"{row[0]}: {row[1].__name__}")
def test_contract_catches(row, monkeypatch: pytest.MonkeyPatch) -> None:
    name, function, arguments = row
    monkeypatch.setenv("REGISTER_BROKEN", "1")
    implementation = as_implementation(function)
    assert CONTRACTS[name].applies_to(implementation)
    with pytest.raises(AssertionError) as caught:
        CONTRACTS[name](implementation, implementation.op.case(**arguments), at=2)
    assert "the other process failed" not in str(caught.value)


@pytest.mark.parametrize("row", BROKEN, ids=lambda row: f"{row[0]}: {row[1].__name__}")
def test_contract_passes(row) -> None:
    name, _, arguments = row
    implementation = CHUNKED if name == "every configuration" else IMPLEMENTATIONS["wkv/reference"]
    CONTRACTS[name](implementation, implementation.op.case(**arguments), at=2)


def test_every_contract_has_something_to_catch() -> None:
    assert {name for name, _, _ in BROKEN} == set(CONTRACTS)
