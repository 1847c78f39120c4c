"""Launches Triton's kernels on the CPU, compiled for a GPU that is not there."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
import torch

from trwkv.ops import _dispatch
from trwkv.ops._compile import Launch, intercept_launches
from trwkv.ops._dispatch import is_interpreting
from trwkv.testing import ops
from trwkv.testing.ptx.machine import Machine
from trwkv.testing.ptx.memory import WARP, Memory
from trwkv.testing.ptx.parse import Program, parse

_PROGRAMS: dict[tuple, Program] = {}


def run(launch: Launch, capability: int) -> None:
    """Compiles a launch for this compute capability and runs it on the CPU, on the tensors that it was given."""
    if len(launch.grid) > 1:
        raise NotImplementedError(f"ptx: expected a grid of one axis; got {launch.grid}")
    key = (launch.kernel, capability, launch.specialization())
    if key not in _PROGRAMS:
        _PROGRAMS[key] = parse(launch.compile(capability).asm["ptx"])
    program = _PROGRAMS[key]
    arguments = launch.runtime_arguments()
    (grid,) = launch.grid
    threads = launch.options.get("num_warps", 4) * WARP
    memory = Memory(
        {name: x for name, x in arguments.items() if isinstance(x, torch.Tensor)},
        np.repeat(np.arange(grid), threads),
    )
    parameters = [memory.address(name) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()]
    parameters += [0] * (len(program.parameters) - len(parameters))  # Triton's own, unused
    Machine(program, grid, threads, memory, parameters).run()


@contextmanager
def emulated_launches(capability: int = 90) -> Iterator[None]:
    """Within the block `backend="triton"` takes CPU tensors, and its kernels run as they are compiled for a GPU.

    The kernels must not have been imported for Triton's interpreter.
    """
    if capability < 80:
        raise ValueError(
            f"capability: expected 80 or more, for older GPUs take other paths; got {capability}"
        )
    if is_interpreting():
        raise RuntimeError("TRITON_INTERPRET: expected 0, for kernels that are compiled; got 1")
    with (
        intercept_launches(lambda launch: run(launch, capability)),
        mock.patch.object(_dispatch, "_require_triton", lambda device, dtype: None),
        mock.patch.object(ops, "HAS_GPU", False),
    ):
        yield
