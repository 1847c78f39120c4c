"""`reverse` gives the bits of the flipped sequences, flipped back."""

from tests.contracts.support import everywhere, hold
from trwkv.testing import Implementation


@everywhere("reverse is flipped")
def test_reverse_is_flipped(implementation: Implementation) -> None:
    hold("reverse is flipped", implementation)
