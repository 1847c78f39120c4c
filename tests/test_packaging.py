"""What a stranger meets first: imports, versions, the README's examples and commands."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import trwkv

ROOT = Path(__file__).parent.parent
MAX_IMPORT_SECONDS = 0.3
NEW_MODULES = """
import json, sys, torch
before = set(sys.modules)
import trwkv.ops
print(json.dumps(sorted(set(sys.modules) - before)))
"""
IMPORT_SECONDS = """
import time, torch
start = time.perf_counter()
import trwkv.ops
print(time.perf_counter() - start)
"""


def run_python(code: str) -> str:
    """What `code` prints in a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_version_is_that_of_the_package():
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert trwkv.__version__ == declared[1]


def test_importing_the_ops_loads_neither_a_kernel_nor_a_model_library():
    new = json.loads(run_python(NEW_MODULES))
    assert "trwkv.ops.wkv.api" in new
    heavy = {"transformers", "triton", "datasets", "lm_eval", "matplotlib", "safetensors"}
    assert not heavy & {name.partition(".")[0] for name in new}
    kernels = {path.stem for path in (ROOT / "trwkv/ops/wkv").glob("*.py") if "@triton" in path.read_text()}
    assert kernels
    assert not kernels & {name.removeprefix("trwkv.ops.wkv.") for name in new}


def test_importing_the_ops_costs_little_more_than_torch():
    seconds = []
    for _ in range(5):  # the best of several: other programs only ever make it slower
        seconds.append(float(run_python(IMPORT_SECONDS)))
        if min(seconds) < MAX_IMPORT_SECONDS:
            return
    pytest.fail(
        f"import trwkv.ops took {min(seconds):.2f} s more than torch; at most {MAX_IMPORT_SECONDS} s allowed"
    )
