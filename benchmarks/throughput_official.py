"""The official CUDA kernel of RWKV-4 as a contender, built from a folder of RWKV-LM's sources.

The folders differ: the backward of some takes the output y as well, some have a second pair of files for bfloat16,
and the threads of a block are 1024 or 32 (of which B * C must be a multiple, for C above them).
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from throughput_cases import Case
from throughput_contenders import Contender, peer

OFFICIAL = "official-cuda"
MAX_TOKENS = 8192
"""Longest sequence it is built for: a thread of its backward keeps 2 or 3 numbers per token in local memory, and the
driver sets that aside for every thread that the GPU can hold (18 GB at 8192 tokens on an H200)."""
_FLAGS = ("--maxrregcount=60", "--use_fast_math", "-O3", "-Xptxas=-O3", "--extra-device-vectorization")


@dataclass(frozen=True)
class Sources:
    """What can be told from a folder without building it. `dtype` is that of u, k, v and their gradients."""

    files: tuple[Path, Path]
    dtype: torch.dtype
    backward_takes_output: bool
    threads: int


def find_sources(folder: Path, dtype: torch.dtype) -> Sources:
    """The kernel for k and v in `dtype`; without one made for it that of float32, to be given converted tensors."""
    suffix = "_bf16" if dtype == torch.bfloat16 and (folder / "wkv_op_bf16.cpp").is_file() else ""
    binding, kernel = folder / f"wkv_op{suffix}.cpp", folder / f"wkv_cuda{suffix}.cu"
    for path in (binding, kernel):
        if not path.is_file():
            found = ", ".join(sorted(x.name for x in folder.glob("*"))) or "nothing"
            raise FileNotFoundError(
                f"expected {binding.name} and {kernel.name}, as in RWKV-LM's RWKV-v4neo/cuda, in {folder}; "
                f"found {found}"
            )
    signature = re.search(r"void\s+backward\s*\((.*?)\)", binding.read_text(), re.DOTALL)
    tensors = signature.group(1).count("Tensor") if signature else 0
    if tensors not in (9, 10):
        raise ValueError(
            f"{binding}: expected a backward of (B, T, C, w, u, k, v, gy, gw, gu, gk, gv), "
            f"with or without y before gy; found {tensors} tensors"
        )
    threads = re.search(r"min\(C,\s*(\d+)\)", kernel.read_text())
    return Sources(
        (binding, kernel),
        torch.bfloat16 if suffix else torch.float32,
        tensors == 10,
        int(threads.group(1)) if threads else 1024,
    )


def official(sources: Sources, longest: int) -> Contender:
    """Builds the kernel (about a minute, kept by PyTorch for the next run) for sequences of up to `longest` tokens."""
    from torch.utils.cpp_extension import load

    extension = load(
        name=f"official_wkv_{str(sources.dtype).removeprefix('torch.')}_{longest}",
        sources=[str(path) for path in sources.files],
        extra_cuda_cflags=[*_FLAGS, f"-DTmax={longest}"],
    )

    def one(time_decay, u, k, v, state):
        return _Wkv.apply(extension, sources, time_decay, u, k, v), None

    def refuses(case: Case) -> str | None:
        if case.decoding:
            return "it has no state"
        if case.T > longest:
            return f"built for at most {longest} tokens"
        threads = min(case.C, sources.threads)
        return f"it needs B * C in multiples of {threads}" if case.B * case.C % threads else None

    return peer(OFFICIAL, one, lambda B, C, device: None, refuses)


class _Wkv(torch.autograd.Function):
    """The kernel's two functions write into tensors that they are given, and check nothing."""

    @staticmethod
    def forward(
        ctx: Any, extension: Any, sources: Sources, time_decay: Tensor, u: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        ctx.extension, ctx.sources, dtype = extension, sources, v.dtype
        w = -torch.exp(time_decay.float()).contiguous()
        u, k, v = (x.to(sources.dtype).contiguous() for x in (u, k, v))
        y = torch.empty_like(k)
        extension.forward(*k.shape, w, u, k, v, y)
        ctx.save_for_backward(w, u, k, v, *([y] if sources.backward_takes_output else []))
        return y.to(dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        w, u, k, v, *y = ctx.saved_tensors
        B, T, C = k.shape
        grad_w, grad_u = k.new_zeros(2, B, C)  # some kernels add to them
        grad_k, grad_v = torch.empty_like(k), torch.empty_like(v)
        grad = grad_outputs[0].to(k.dtype).contiguous()
        ctx.extension.backward(B, T, C, w, u, k, v, *y, grad, grad_w, grad_u, grad_k, grad_v)
        dtype = grad_outputs[0].dtype  # that of the caller's k and v; grad_w is the gradient of time_decay
        return None, None, grad_w.sum(0).float(), grad_u.sum(0).float(), grad_k.to(dtype), grad_v.to(dtype)
