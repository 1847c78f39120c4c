"""Triton's interpreter, which runs kernels on a CPU: how to choose it."""

import os

import torch


def interpret_without_gpu() -> None:
    """Where there is no GPU, makes Triton's kernels run in its interpreter. Call it before any kernel is imported."""
    if torch.cuda.is_available():
        return
    os.environ["TRITON_INTERPRET"] = "1"
