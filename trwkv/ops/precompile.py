"""Compiles kernels before their first call, several at once.

    python -m trwkv.ops.precompile --perspectives 1,3 --dtypes bfloat16 --shapes "8,1024,768;1,8192,768" --weights BTP

Triton compiles a kernel when it is first called with some P, C, dtype and kind of weights, and with T in one chunk or
in many: seconds for P = 1, minutes for P = 8, one after the other. This fills its cache on disk with all that training,
prefill and decoding of shared k and v of these shapes call, on the GPU that it runs on.
"""

import argparse
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from trwkv.ops._compile import Launch, record_launches

WEIGHTS = ("none", "PC", "BTP")
DTYPES = ("float32", "bfloat16", "float16")


def launches_of(
    P: int, dtype: torch.dtype, shape: tuple[int, int, int], weights: str, device: torch.device | str
) -> list[Launch]:
    """What a training step, a prefill and a decoding step launch: k and v [B, T, C] of this dtype, the rest float32."""
    from trwkv.ops.token_shift_mix.kernel import token_shift_mix_forward
    from trwkv.ops.wkv.chunk import chunk_backward, chunk_forward
    from trwkv.ops.wkv.recurrent import recurrent_forward

    B, T, C = shape
    w, k = torch.empty(P, C, device=device), torch.empty(B, T, C, dtype=dtype, device=device)
    kinds: dict[str, tuple[int, ...]] = {"PC": (P, C), "BTP": (B, T, P)}
    of_all = None if weights == "none" else torch.empty(kinds[weights], device=device)
    of_one = of_all[:, :1] if of_all is not None and weights == "BTP" else of_all
    token, mix = k[:, :1], w[0]
    with record_launches() as launches:
        output, state, saved = chunk_forward(w, w, k, k, of_all, None, None, False, save=True)
        chunk_backward(output, None, w, w, k, k, of_all, None, None, False, saved)
        chunk_forward(w, w, k, k, of_all, None, None, False, save=False)
        for receptance in (None, output[:, :1]):
            recurrent_forward(w, w, token, token, of_one, state, None, False, receptance=receptance)
        for x, previous in ((k, None), (token, k[:, 0])):
            for mixes in ([mix, mix, mix], [mix, mix]):
                token_shift_mix_forward(x, mixes, previous)
    return launches


def compile_all(launches: Iterable[Launch], jobs: int) -> int:
    """Compiles what Triton's cache does not hold yet; the number of different kernels. Raises what compiling one of
    them raised, after the others.
    """
    import triton

    # One that failed within the block would leave Triton in this mode, and all later calls without a compiler.
    with ThreadPoolExecutor(jobs) as pool, triton.AsyncCompileMode(pool, ignore_errors=True) as mode:
        kernels = [
            launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.options) for launch in launches
        ]
    for kernel in kernels:
        if future := getattr(kernel, "future", None):  # that was compiled now, or failed before
            future.result()
    return len(mode.future_kernels)


def _numbers(text: str) -> list[int]:
    numbers = [int(part) for part in text.split(",")]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"expected numbers from 1 on; got {text!r}")
    return numbers


def _shapes(text: str) -> list[tuple[int, int, int]]:
    shapes = []
    for part in text.split(";"):
        B, T, C = _numbers(part)
        shapes.append((B, T, C))
    return shapes


def _dtypes(text: str) -> list[torch.dtype]:
    if not set(text.split(",")) <= set(DTYPES):
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(DTYPES)}; got {text!r}")
    return [getattr(torch, name) for name in text.split(",")]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--perspectives", type=_numbers, default="1,3", help="comma-separated (default: %(default)s)")
    add("--dtypes", type=_dtypes, default="bfloat16", help="comma-separated (default: %(default)s)")
    add(
        "--shapes",
        type=_shapes,
        default="8,1024,768",
        help="B,T,C, separated by semicolons (default: %(default)s)",
    )
    add("--weights", choices=WEIGHTS, default="BTP", help="their shape, where P > 1 (default: %(default)s)")
    add("--jobs", type=int, default=os.cpu_count(), help="threads (default: one for every core)")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs: expected at least 1; got {options.jobs}")
    if not torch.cuda.is_available():
        parser.error("a GPU is needed: kernels are compiled for the one that is there")
    device = torch.device("cuda", torch.cuda.current_device())
    begin = time.perf_counter()
    launches = [
        launch
        for P in options.perspectives
        for dtype in options.dtypes
        for shape in options.shapes
        for launch in launches_of(P, dtype, shape, options.weights if P > 1 else "none", device)
    ]
    count = compile_all(launches, options.jobs)
    print(f"{count} kernels in {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
