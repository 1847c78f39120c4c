"""The bound that MATH.md proves for every element of a float32 output, which is sharper than the tolerance."""

from tests.contracts.support import everywhere, hold
from trwkv.testing import Implementation


@everywhere("error bound")
def test_error_bound(implementation: Implementation) -> None:
    hold("error bound", implementation)
