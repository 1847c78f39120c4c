"""Runs the compiled kernels without a GPU: Triton's own compiler, then its PTX, lane by lane, on the CPU.

Triton's interpreter runs the Python source with numpy; this runs what the compiler made of it. It covers what the other
cannot see: the layout of tiles over lanes, inline PTX, predicated and vectorised loads, what the hardware's approximate
instructions may err by, and races: a lane that reads what another wrote with no barrier between them is an error, as is
an access outside the tensors that the kernel was given. What it does not cover is ptxas, and time.
"""

from trwkv.testing.ptx.launch import emulated_launches
from trwkv.testing.ptx.memory import MemoryFault

__all__ = ["MemoryFault", "emulated_launches"]
