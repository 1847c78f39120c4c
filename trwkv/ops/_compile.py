"""Ahead-of-time compilation of the kernels, without a GPU: what would be launched, and what it costs in registers."""

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction, KernelParam

_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Resources:
    """What ptxas reports of one kernel, and the length of its machine code in instructions."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    instructions: int


@dataclass
class Launch:
    """One launch as a launcher asked for it: the kernel and its arguments. A dtype stands for a tensor that begins at a
    multiple of 16 bytes.
    """

    kernel: JITFunction
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.kernel.__name__

    def without_tensors(self) -> "Launch":
        """All that compiling takes: it holds no memory."""
        args = tuple(x.dtype if isinstance(x, torch.Tensor) else x for x in self.args)
        return Launch(self.kernel, self.grid, args, self.options)

    def compile(self, target: int | str) -> CompiledKernel:
        """Machine code for an NVIDIA GPU of this compute capability (80, 90, ...) or an AMD GPU of this name (gfx942,
        ...). What was launched must be meant for it: inline PTX cannot be compiled for AMD's."""
        signature, constants, attributes = {}, {}, {}
        for i, (name, (kind, is_aligned, constant)) in enumerate(self._described().items()):
            signature[name] = kind
            if kind == "constexpr":
                constants[(i,)] = constant
            if is_aligned:
                attributes[(i,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, attributes)
        return triton.compile(
            source,
            target=_target(target),
            options=self._compile_options(),
        )

    def specialization(self) -> tuple:
        """What distinguishes the kernels that are compiled for two launches, beside the capability."""
        return (*self._described().items(), *self._compile_options().items())

    def runtime_arguments(self) -> dict[str, Any]:
        """The arguments that the compiled kernel takes, by name."""
        values = self._values()
        return {name: values[name] for name, (kind, *_) in self._described().items() if kind != "constexpr"}

    def _compile_options(self) -> dict[str, Any]:
        return {name: value for name, value in self.options.items() if name not in self.kernel.arg_names}

    def _values(self) -> dict[str, Any]:
        return dict(zip(self.kernel.arg_names, self.args, strict=False)) | self.options

    def _described(self) -> dict[str, tuple[str, bool, Any]]:
        """Of each argument: its type, whether it is a multiple of 16, and its value if that is a constant."""
        values = self._values()
        out = {}
        for param in self.kernel.params:
            kind, is_aligned = _describe(values[param.name], param)
            out[param.name] = kind, is_aligned, values[param.name] if kind == "constexpr" else None
        return out


def _target(target: int | str) -> GPUTarget:
    if isinstance(target, int):
        return GPUTarget("cuda", target, 32)
    return GPUTarget("hip", target, 64 if target.startswith("gfx9") else 32)


def _describe(value: Any, param: KernelParam) -> tuple[str, bool]:
    """Type of an argument in a kernel's signature, and whether it is known to be a multiple of 16."""
    if param.is_constexpr or value is None:
        return "constexpr", False
    if isinstance(value, torch.dtype):
        return _POINTERS[value], True
    if isinstance(value, torch.Tensor):
        return _POINTERS[value.dtype], value.data_ptr() % 16 == 0
    if isinstance(value, int):
        if param.do_not_specialize:
            return "i32", False
        is_aligned = value % 16 == 0 and not param.do_not_specialize_on_alignment
        return ("constexpr", False) if value == 1 else ("i32", is_aligned)  # as at a real launch
    raise TypeError(f"value: expected a tensor, its dtype, an int or None; got {type(value).__name__}")


@contextmanager
def intercept_launches(handle: Callable[[Launch], None]) -> Iterator[None]:
    """Within the block launches go to this function and not to a GPU."""

    def intercept(kernel: JITFunction, grid: tuple[int, ...]):
        def launch(*args: Any, **options: Any) -> None:
            handle(Launch(kernel, grid, args, options))

        return launch

    original = JITFunction.__getitem__
    JITFunction.__getitem__ = intercept
    try:
        yield
    finally:
        JITFunction.__getitem__ = original


@contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Within the block kernels are not run but collected, without their tensors. Outputs are whatever memory held."""
    launches: list[Launch] = []
    with intercept_launches(lambda launch: launches.append(launch.without_tensors())):
        yield launches


def resources(compiled: CompiledKernel) -> Resources:
    """Reads the compiled binary with the tools that Triton ships."""
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(compiled.asm["cubin"])
        usage = _tool("cuobjdump", "-res-usage", str(binary))
        sass = _tool("cuobjdump", "-sass", str(binary))
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Resources(
        registers=numbers["REG"],
        spill_bytes=numbers["STACK"] + numbers["LOCAL"],
        shared_bytes=compiled.metadata.shared,
        instructions=len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", sass, re.MULTILINE)),
    )


def _tool(name: str, *args: str) -> str:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    tool = os.environ.get(f"TRITON_{name.upper()}_PATH", str(tools / name))
    return subprocess.run([tool, *args], check=True, capture_output=True, text=True).stdout
