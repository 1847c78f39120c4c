"""No reads of memory that is unwritten or foreign, no writes beyond a tensor's ends, no writes to inputs."""

import pytest

from tests.contracts.support import CHUNKED, case_of, everywhere, hold
from trwkv.testing import CONTRACTS, IMPLEMENTATIONS, Implementation


@everywhere("memory")
def test_memory(implementation: Implementation) -> None:
    hold("memory", implementation)


@pytest.mark.parametrize("name", CHUNKED)
def test_across_chunks(name: str) -> None:
    """The states between chunks are scratch memory too, and with packed sequences some of it stays unused."""
    implementation = IMPLEMENTATIONS[name]
    case = case_of(implementation, B=1, T=70, P=1, C=19, cu_seqlens=(0, 1, 66, 66, 70))
    CONTRACTS["memory"](implementation, case)
