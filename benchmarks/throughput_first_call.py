"""What the first call costs a fresh process that finds no compiled kernel: compilation, tuning, lazy imports.

`first_call` starts the process; run as a script, this file is that process.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
SECONDS = 300.0
"""After which a first call is given up."""


def first_call(
    name: str, case: dict[str, Any], official_cuda: Path | None, threads: int | None
) -> dict[str, Any]:
    """{"seconds": ...} from "imported, inputs made" to the first result, or {"error": ...}."""
    task = {
        "name": name,
        "case": case,
        "official_cuda": official_cuda and str(official_cuda),
        "threads": threads,
    }
    with tempfile.TemporaryDirectory() as empty:
        try:
            done = subprocess.run(
                [sys.executable, __file__, json.dumps(task)],
                env={**os.environ, **{cache: str(Path(empty, cache)) for cache in CACHES}},
                capture_output=True,
                text=True,
                check=False,
                timeout=SECONDS,
            )
        except subprocess.TimeoutExpired:
            return {"error": f"not done after {SECONDS:.0f} s"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    return {"seconds": float(done.stdout.split()[-1])}


def _measure(task: dict[str, Any]) -> float:
    import torch

    from throughput_cases import DTYPES, Case, make_inputs
    from throughput_contenders import contenders, work
    from throughput_official import OFFICIAL, find_sources, official

    if task["threads"]:
        torch.set_num_threads(task["threads"])
    case = Case(**{**task["case"], "dtype": DTYPES[task["case"]["dtype"]]})
    if task["name"] == OFFICIAL:
        contender = official(find_sources(Path(task["official_cuda"]), case.dtype), case.T)
    else:
        contender = contenders(case.device)[task["name"]]
    importlib.import_module(contender.module)
    inputs = make_inputs(case)
    wait = torch.cuda.synchronize if case.device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    work(case, contender, inputs)()
    wait()
    return time.perf_counter() - start


if __name__ == "__main__":
    print(_measure(json.loads(sys.argv[1])))
