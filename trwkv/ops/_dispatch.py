"""Choice of backend: the one place of the op's path that reads the environment and the device."""

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from pathlib import Path

import torch

BACKENDS = ("auto", "triton", "torch", "reference")
LAUNCH_OPTIONS = {"num_warps": 1, "enable_fp_fusion": False}
"""How kernels are compiled. Products and sums are not fused but where the source says so: Triton's own choice is
another one up to version 3.9 than after it, and numbers are to be the same.
"""
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def is_interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on the CPU (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def resolve_backend(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Name of the backend that will run; raises with the list of valid ones if the request cannot be met.

    "auto": Triton on a CUDA or ROCm device for float32, bfloat16 and float16; PyTorch everywhere else, and where
    triton is not installed.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}; got {backend!r}")
    if backend == "auto":
        return "triton" if device.type == "cuda" and _HAS_TRITON and dtype != torch.float64 else "torch"
    if backend == "triton":
        _require_triton(device, dtype)
    return backend


def _require_triton(device: torch.device, dtype: torch.dtype) -> None:
    others = "'torch' or 'reference'"
    if not _HAS_TRITON:
        raise ValueError(f"backend: 'triton' needs the triton package, which is not installed; use {others}")
    if dtype == torch.float64:
        raise TypeError(
            f"k, v: the 'triton' backend takes float32, bfloat16 or float16; got float64; use {others}"
        )
    if device.type != "cuda" and not is_interpreting():
        raise ValueError(
            f"backend: 'triton' needs tensors on a GPU (or TRITON_INTERPRET=1 set before the first call, to run "
            f"the kernels in Triton's interpreter); got tensors on {device.type!r}; use {others} there"
        )


def gpu_name(device: torch.device) -> str | None:
    """What the driver calls the GPU; None for a CPU."""
    return _gpu_name(device.index) if device.type == "cuda" else None


@lru_cache(maxsize=64)
def _gpu_name(index: int | None) -> str:
    return torch.cuda.get_device_name(index)


def has_packed_instructions(device: torch.device) -> bool:
    """Whether a GPU computes with pairs of float16 and of bfloat16: not NVIDIA's before compute capability 8.0. A CPU
    stands for one that does.
    """
    return device.type != "cuda" or _capability(device.index) >= (8, 0)


@lru_cache(maxsize=64)
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def lanes_of_a_warp(device: torch.device) -> int:
    """32, or 64 on AMD's data center GPUs; 1 in the interpreter."""
    if is_interpreting():
        return 1
    return _warp_size(device.index) if device.type == "cuda" else 32


@lru_cache(maxsize=64)
def _warp_size(index: int | None) -> int:
    return torch.cuda.get_device_properties(index).warp_size


def multiprocessors(device: torch.device) -> int:
    """How many a GPU has; for a CPU an H200's."""
    return _multiprocessors(device.index) if device.type == "cuda" else 132


@lru_cache(maxsize=64)
def _multiprocessors(index: int | None) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


@lru_cache(maxsize=1)
def tuning_file() -> Path:
    """Where `trwkv.ops.tune` saves what it finds: TRWKV_TUNING_FILE (read once), or in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.environ.get("TRWKV_TUNING_FILE") or os.path.join(cache, "trwkv", "tuning.json"))


def device_guard(device: torch.device) -> AbstractContextManager:
    """Makes `device` the current one, so that a kernel is launched where its tensors lie."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def is_inline_ptx_available() -> bool:
    """Whether kernels may use NVIDIA's instructions by name: not in the interpreter, not on ROCm."""
    return not is_interpreting() and torch.version.hip is None
