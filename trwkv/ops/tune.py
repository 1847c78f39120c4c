"""Finds the fastest configuration of the chunk kernels on this GPU, and saves it for every later call.

    python -m trwkv.ops.tune --perspectives 1,2,3 --dtypes bfloat16 --shape 8,2048,1024

What ships with the package was chosen from compiler reports; nothing is searched at a call. A search compiles some
three dozen kernels for each P and dtype, on all cores: minutes. Every candidate must reproduce the shipped
configuration's results, to the tolerance of `TOLERANCE`, before it is timed; one that does not, or does not compile, is
left out with a line that says so. One is preferred to what ships if it is faster by `MARGIN`. Results are saved by GPU,
P and dtype in TRWKV_TUNING_FILE, by default ~/.cache/trwkv/tuning.json; delete the file to return to what ships.
Another configuration sums in another order: its last bits differ from those of a machine that is tuned otherwise.
"""

import argparse
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.errors import TritonError

from trwkv.ops._compile import record_launches
from trwkv.ops._dispatch import multiprocessors, tuning_file
from trwkv.ops._tuning import Config, config_for, entry_name, pin_config, save_config
from trwkv.ops.precompile import compile_all

BLOCK_C = (32, 64)
FWD_BLOCK_T = (4, 8, 16)
BWD_BLOCK_T = (2, 4, 8)
WARPS = (4, 8, 12, 16, 24)
TOLERANCE = 1e-2
"""Largest difference from the shipped configuration, relative to the largest value: far above rounding, and far below
what a wrong kernel does."""
MARGIN = 0.03

Timer = Callable[[Callable[[], Any]], float]


class Problem(NamedTuple):
    """Inputs of one op, as the kernels' launchers take them."""

    inputs: tuple[Any, ...]
    grad_output: Tensor

    def step(self, kernel: str) -> Callable[[], Sequence[Tensor | None]]:
        """The forward or, from a checkpoint that is made here, the backward."""
        from trwkv.ops.wkv.chunk import chunk_backward, chunk_forward

        if kernel == "forward":
            return lambda: chunk_forward(*self.inputs, save=False)[:2]
        inputs: tuple[Any, ...] = (*self.inputs, chunk_forward(*self.inputs, save=True)[2])
        return lambda: chunk_backward(self.grad_output, None, *inputs)


def search(
    P: int,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    device: torch.device | str = "cuda",
    *,
    timer: Timer | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> tuple[Config, dict[str, float]]:
    """The fastest configuration for k and v [B, T, C] of this dtype, shared, with weights [B, T, P]; milliseconds of
    it and of the shipped one.

    Forward and backward are searched apart, then among how many warps T is divided, on one row of the same size (B T
    tokens), and whether it had better be for the shape itself. `timer` returns a function's milliseconds; by
    default it is the median in a CUDA graph, so that the host's work between two kernels does not count.
    """
    if timer is None:
        from triton.testing import do_bench_cudagraph

        timer = partial(do_bench_cudagraph, return_mode="median")
    B, T, C = shape
    many, one = make_problem(P, dtype, B, T, C, device), make_problem(P, dtype, 1, B * T, C, device)
    measured = {}

    def fastest(name: str, kernel: str, problem: Problem, best: Config, *variants: dict[str, Any]) -> Config:
        step = problem.step(kernel)
        with pin_config(**asdict(best)):
            expected = step()
        candidates = dict.fromkeys([best, *(replace(best, **changes) for changes in variants)])
        if problem.grad_output.is_cuda:
            _compile(candidates, step)
        times = {}
        for config in candidates:
            try:
                with pin_config(**asdict(config)):
                    _require_same(step(), expected)
                    times[config] = timer(step)
            except (RuntimeError, TritonError) as error:
                if config == best:
                    raise
                report(f"P = {P}, {name}: left out {config}: {error}")
            else:
                report(f"P = {P}, {name}: {times[config]:.4f} ms with {config}")
        winner = min(times, key=lambda config: times[config])
        if times[winner] > (1 - MARGIN) * times[best]:
            winner = best
        measured[f"{name}, as shipped"], measured[name] = times[best], times[winner]
        return winner

    best = config_for(P)
    best = fastest("forward", "forward", many, best, *_products(fwd_block_c=BLOCK_C, fwd_block_t=FWD_BLOCK_T))
    best = fastest(
        "backward", "backward", many, best, *_products(bwd_block_c=BLOCK_C, bwd_block_t=BWD_BLOCK_T)
    )
    best = fastest("one row, forward", "forward", one, best, *_products(fwd_warps=WARPS))
    best = fastest("one row, backward", "backward", one, best, *_products(bwd_warps=WARPS))
    for kernel, option in (("forward", "fwd_undivided_from"), ("backward", "bwd_undivided_from")):
        columns = B * -(-C // best.block_c(kernel)) / multiprocessors(many.grad_output.device)
        otherwise = columns if columns < getattr(best, option) else 1.01 * columns
        best = fastest(f"{kernel}, divided or not", kernel, many, best, {option: otherwise})
    return best, measured


def _compile(candidates: Iterable[Config], step: Callable[[], Any]) -> None:
    """Their kernels, several at once. What fails does so again where it is called."""
    with record_launches() as launches:
        for config in candidates:
            with pin_config(**asdict(config)):
                step()
    with suppress(RuntimeError, TritonError):
        compile_all(launches, os.cpu_count() or 1)


def _products(**choices: Sequence[int]) -> list[dict[str, int]]:
    return [dict(zip(choices, values, strict=True)) for values in product(*choices.values())]


def make_problem(P: int, dtype: torch.dtype, B: int, T: int, C: int, device: torch.device | str) -> Problem:
    g = torch.Generator(device=device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, device=device)

    w, u = -torch.exp(2 * normal(P, C) - 2), normal(P, C)
    k, v, grad_output = (normal(B, T, C).to(dtype) for _ in range(3))
    weights = normal(B, T, P).softmax(-1).to(dtype)
    return Problem((w, u, k, v, weights, None, None, False), grad_output)


def _require_same(results: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> None:
    for x, y in zip(results, expected, strict=True):
        if x is None or y is None:
            continue
        error = (x.double() - y.double()).abs().max() / y.double().abs().max()
        if not error <= TOLERANCE:
            raise RuntimeError(f"wrong by {error:.1e}; expected at most {TOLERANCE}. Please report it.")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--perspectives", default="1,2,3", help="comma-separated (default: %(default)s)")
    parser.add_argument("--dtypes", default="bfloat16", help="comma-separated (default: %(default)s)")
    parser.add_argument("--shape", default="8,2048,1024", help="B,T,C (default: %(default)s)")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("a GPU is needed: configurations are those of GPU kernels")
    B, T, C = map(int, options.shape.split(","))
    device = torch.device("cuda", torch.cuda.current_device())
    gpu = torch.cuda.get_device_name(device)
    for P in map(int, options.perspectives.split(",")):
        for name in options.dtypes.split(","):
            dtype = getattr(torch, name)
            config, measured = search(P, dtype, (B, T, C), device, report=partial(print, flush=True))
            details = measured | {"shape": [B, T, C], "torch": torch.__version__}
            save_config(tuning_file(), gpu, entry_name(P, dtype), config, details)
            print(f"{gpu}, {entry_name(P, dtype)}: {config}\nsaved in {tuning_file()}")


if __name__ == "__main__":
    main()
