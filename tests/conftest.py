"""Set before any kernel is imported: without a GPU, Triton's kernels run in its interpreter; or, if TRWKV_EMULATE is a
compute capability (90), as they are compiled for such a GPU, on the CPU (`trwkv.testing.ptx`).

At the end of a run: how many cases were drawn for each contract and implementation.
"""

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from trwkv.testing import COUNTS, interpret_without_gpu

CAPABILITY = None if torch.cuda.is_available() else os.environ.get("TRWKV_EMULATE")
if CAPABILITY:
    os.environ["TRITON_INTERPRET"] = "0"
else:
    interpret_without_gpu()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=bool(CAPABILITY))
def emulation() -> Iterator[None]:
    from trwkv.testing.ptx import emulated_launches

    with emulated_launches(int(CAPABILITY or 0)):
        yield


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Where bits are compared that depend on how many there are: of matrix products, of runs in other processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


_from_workers: Counter[tuple[str, str]] = Counter()


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)  # there is one in the workers of pytest-xdist
    if output is not None:
        output["contract_cases"] = [(*key, count) for key, count in COUNTS.items()]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    for contract, implementation, count in getattr(node, "workeroutput", {}).get("contract_cases", ()):
        _from_workers[contract, implementation] += count


def pytest_terminal_summary(terminalreporter: Any) -> None:
    counts = COUNTS + _from_workers
    if not counts:
        return
    terminalreporter.section("cases by contract and implementation")
    for contract in dict.fromkeys(name for name, _ in counts):
        row = (f"{key} {count}" for (name, key), count in sorted(counts.items()) if name == contract)
        terminalreporter.write_line(f"{contract}: {', '.join(row)}")
    terminalreporter.write_line(f"in all: {sum(counts.values())}")
