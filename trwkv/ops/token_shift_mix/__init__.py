"""Token shift and time mixes in one pass over the input, for inference."""

MAX_MIXES = 3
"""Mixes of one call: a time mixing has three."""
