"""Every way to compute the op, and the device and configuration its tests use."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from trwkv.ops import WkvOutput, chunk_wkv, recurrent_wkv, reference_wkv
from trwkv.ops._tuning import pin_config
from trwkv.testing import WkvCase, WkvTruth, assert_accurate, gradients, true_sums

GPU = torch.cuda.is_available()
SMALL = {"fwd_block_c": 16, "fwd_block_t": 4, "bwd_block_c": 16, "bwd_block_t": 4, "chunk_len": 64}


@dataclass(frozen=True)
class Implementation:
    name: str
    op: Any
    backend: str | None = None

    @property
    def device(self) -> str:
        return "cuda" if GPU and self.backend == "triton" else "cpu"

    @contextmanager
    def configured(self, **changes: int) -> Iterator[None]:
        """Small blocks, so that small cases meet every edge, and the interpreter finishes."""
        interpreted = self.backend == "triton" and not GPU
        with pin_config(**(SMALL | changes)) if interpreted or changes else nullcontext():
            yield

    def run(self, case: WkvCase, **changes: int) -> WkvOutput:
        options = {} if self.backend is None else {"backend": self.backend}
        with self.configured(**changes):
            return case.call(self.op, **options)

    def assert_accurate(self, name: str, actual: torch.Tensor, truth: WkvTruth) -> None:
        assert_accurate(name, actual, truth, truncates=self.backend == "triton" and not GPU)

    def check(self, case: WkvCase, truth: WkvTruth, **changes: int) -> None:
        """Forward and every gradient against the truth."""
        case = case.to(self.device)
        output, state = self.run(case, **changes)
        if output.dtype != case.v.dtype:
            raise AssertionError(f"output: expected {case.v.dtype}; got {output.dtype}")
        self.assert_accurate("output", output, truth)
        exponent = truth.exponent.to(self.device)
        narrow = torch.float64 if case.k.dtype == torch.float64 else torch.float32
        self.assert_accurate("state", true_sums(state, exponent).to(narrow), truth)
        with self.configured(**changes):  # the backward runs here, after the forward's own block has ended
            got = gradients(case, lambda c: self.run(c, **changes), exponent)
        for name, grad in got.items():
            if grad.dtype != case.inputs()[name].dtype:
                raise AssertionError(f"{name}: gradient in {grad.dtype}")
            self.assert_accurate(name, grad, truth)


TORCH_CHUNK = Implementation("torch-chunk", chunk_wkv, "torch")
TRITON_CHUNK = Implementation("triton-chunk", chunk_wkv, "triton")
TRITON_RECURRENT = Implementation("triton-recurrent", recurrent_wkv, "triton")
TORCH_RECURRENT = Implementation("torch-recurrent", recurrent_wkv, "torch")
REFERENCE = Implementation("reference", reference_wkv)

ALL = [REFERENCE, TORCH_CHUNK, TORCH_RECURRENT, TRITON_CHUNK, TRITON_RECURRENT]
FAST = [TORCH_CHUNK, TRITON_CHUNK, TRITON_RECURRENT]
