"""Token shift and time mixes in one pass over the input, for inference."""
