"""Checks of arguments that several layers take, and the configuration too."""

from collections.abc import Sequence

from torch import Tensor


def check_whole_number(name: str, value: object) -> None:
    """Raise ValueError unless it is an int of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: expected a whole number of at least 1; got {value!r}")


def chosen_vectors(names: Sequence[str], valid: Sequence[str], where: str = "") -> list[str]:
    """`perspective_vectors`, in the order of `valid`; ValueError for a string, or for a name that is not valid."""
    if isinstance(names, str) or not set(names) <= set(valid):
        raise ValueError(
            f"perspective_vectors: {where}expected a list of some of {', '.join(valid)}; got {names!r}"
        )
    return [name for name in valid if name in names]


def check_differ(names: Sequence[str], n_perspectives: int) -> None:
    """Raise ValueError where P > 1 perspectives have no vector of their own."""
    if n_perspectives > 1 and not names:
        raise ValueError(
            f"perspective_vectors: expected at least one with n_perspectives = {n_perspectives}; "
            "got none (the perspectives would be the same)"
        )


def check_input(x: Tensor, channels: int, n_streams: int | None) -> None:
    """Raise ValueError unless x is [B, T, C], or [B, T, P, C] with `n_streams` = P."""
    axes = (channels,) if n_streams is None else (n_streams, channels)
    if x.ndim != 2 + len(axes) or x.shape[2:] != axes:
        expected = ", ".join(["B", "T", *map(str, axes)])
        raise ValueError(f"x: expected shape [{expected}]; got {list(x.shape)}")
