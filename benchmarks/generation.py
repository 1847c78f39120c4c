"""Generation of very many tokens: time per token, resident memory and size of the state, all along the way.

    python benchmarks/generation.py                         # 100,000 tokens, a row for every 10,000; some minutes
    python benchmarks/generation.py --json generation.json  # and keeps them, with the machine and the versions
    python benchmarks/generation.py --device cuda --hidden-size 768 --layers 12 --dtype bfloat16 --tokens 2000 \
        --every 500 [--static] [--backend torch]            # the size of the 169M model, compiled, without our kernels

A random model with three perspectives, greedy, through `generate()`; by default a small one on one thread of a CPU.
`generate()` itself keeps the tokens, 8 bytes each, and copies them for every new one; the model's state does not grow.
"""

import argparse
import gc
import json
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers.generation.streamers import BaseStreamer

from trwkv.models import TemporalRwkvCache, TemporalRwkvConfig, TemporalRwkvForCausalLM
from trwkv.report import environment, format_table

MODEL = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 4, "n_perspectives": 3}
PROMPT = torch.tensor([list(b"Once upon a time")])


class Meter(BaseStreamer):
    """Notes, whenever another `every` tokens have come, how long they took and what is alive then."""

    def __init__(self, cache: TemporalRwkvCache, every: int) -> None:
        self.cache, self.every = cache, every
        self.rows: list[dict[str, Any]] = []
        self.n_tokens = -1  # the prompt comes first
        self.since = time.perf_counter()

    def put(self, value: torch.Tensor) -> None:
        self.n_tokens += 1
        if self.n_tokens == 0:
            self.since = time.perf_counter()
        elif self.n_tokens % self.every == 0:
            self.rows.append({
                "tokens": self.n_tokens,
                "ms_per_token": 1e3 * (time.perf_counter() - self.since) / self.every,
                "tokens_per_second": self.every / (time.perf_counter() - self.since),
                "resident_mib": psutil.Process().memory_info().rss / 2**20,
                "state_bytes": self.cache.nbytes(),
                "tensors_alive": sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects()),
            })  # fmt: skip
            self.since = time.perf_counter()

    def end(self) -> None:
        pass


def measure(
    n_tokens: int,
    every: int,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    static: bool = False,
    **model_options: Any,
) -> list[dict[str, Any]]:
    """`static`: a cache that changes in place, which lets `generate` compile the step on a GPU."""
    torch.manual_seed(0)
    config = TemporalRwkvConfig(**MODEL | model_options, bos_token_id=None, eos_token_id=None)
    model = TemporalRwkvForCausalLM(config).eval().to(device, dtype)

    def generate(n: int) -> Meter:
        cache = TemporalRwkvCache(config.num_hidden_layers, static=static)
        meter = Meter(cache, every)
        model.generate(
            PROMPT.to(device),
            max_new_tokens=n,
            do_sample=False,
            cache=cache,
            streamer=meter,
            pad_token_id=0,
        )
        return meter

    generate(4)  # what is compiled is compiled here
    return generate(n_tokens).rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=100_000, help="(default: %(default)s)")
    parser.add_argument("--every", type=int, default=10_000, help="tokens per row (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument(
        "--hidden-size", type=int, default=MODEL["hidden_size"], help="(default: %(default)s)"
    )
    parser.add_argument(
        "--layers", type=int, default=MODEL["num_hidden_layers"], help="(default: %(default)s)"
    )
    parser.add_argument(
        "--backend",
        choices=("auto", "triton", "torch"),
        default="auto",
        help="of the ops (default: %(default)s)",
    )
    parser.add_argument("--static", action="store_true", help="a static cache: compiled on a GPU")
    options = parser.parse_args()
    if options.every < 1 or options.tokens < options.every:
        parser.error(f"--every: expected 1 to {options.tokens} tokens; got {options.every}")
    torch.set_num_threads(1)
    model = {
        "hidden_size": options.hidden_size,
        "num_hidden_layers": options.layers,
        "wkv_backend": options.backend,
    }
    dtype = getattr(torch, options.dtype)
    rows = measure(options.tokens, options.every, options.device, dtype, options.static, **model)
    header = ("tokens", "ms per token", "tokens/s", "resident MiB", "state bytes", "tensors alive")
    print(format_table(header, [list(row.values()) for row in rows]))
    if options.json:
        how = {"dtype": options.dtype, "static": options.static}
        content = {"environment": environment(options.device), "model": MODEL | model | how, "rows": rows}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
