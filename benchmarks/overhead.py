"""What a call costs beyond its arithmetic: the op at T = 1, against a bare `torch.autograd.Function` on the same code.

    python benchmarks/overhead.py                       # prints the table
    python benchmarks/overhead.py --json overhead.json  # and keeps it, with the machine and the versions

The difference is validation, choice of backend and dispatch through `torch.library`. On a CPU, one thread.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trwkv.ops import multi_perspective_wkv
from trwkv.ops.wkv.torch_chunk import chunk_forward
from trwkv.report import environment

ROUNDS, CALLS = 15, 300


class Bare(torch.autograd.Function):
    """The least that PyTorch asks of an op with a gradient."""

    @staticmethod
    def forward(ctx: Any, save: bool, *inputs: Any) -> Any:
        outputs = chunk_forward(*inputs, save=save)
        ctx.save_for_backward(*inputs, *outputs[1:])
        ctx.mark_non_differentiable(outputs[2])
        ctx.set_materialize_grads(False)
        return outputs


def microseconds(*calls: Callable[[], Any]) -> list[float]:
    """Fastest round of each, the calls taking turns, so that a busy moment does not fall on one alone."""
    best = [float("inf")] * len(calls)
    for _ in range(ROUNDS):
        for i, call in enumerate(calls):
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            best[i] = min(best[i], 1e6 * (time.perf_counter() - start) / CALLS)
    return best


def measure(P: int, C: int, gradient: bool) -> dict[str, Any]:
    w = (-torch.rand(P, C)).requires_grad_(gradient)
    u, k, state = torch.randn(P, C), torch.randn(1, 1, C), torch.rand(1, 3, P, C)
    bare, op = microseconds(
        lambda: Bare.apply(gradient, w, u, k, k, None, state),
        lambda: multi_perspective_wkv(w, u, k, k, initial_state=state, output_final_state=True),
    )
    return {"P": P, "C": C, "gradient": gradient, "bare_us": bare, "op_us": op, "overhead_us": op - bare}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(P, 64, gradient) for P in (1, 3) for gradient in (False, True)]
    print("| P | gradient | autograd.Function (us) | op (us) | difference (us) |\n|---|---|---|---|---|")
    for row in rows:
        wanted = "wanted" if row["gradient"] else "no"
        print(
            f"| {row['P']} | {wanted} | {row['bare_us']:.1f} | {row['op_us']:.1f} | {row['overhead_us']:.1f} |"
        )
    if options.json:
        options.json.write_text(
            json.dumps({"environment": environment("cpu"), "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
