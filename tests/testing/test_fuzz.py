"""`python -m trwkv.testing fuzz`: finds a planted bug, prints a test that shows it, and otherwise nothing."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PLANTED = """
from trwkv.ops import reference_wkv
from trwkv.testing import IMPLEMENTATIONS, Implementation, register
from trwkv.testing.wkv import wkv_case

BUG = True


def forgetful(w, u, k, v, **options):
    return reference_wkv(w, u * 0 if BUG and k.shape[1] > 2 else u, k, v, **options)


register(Implementation(IMPLEMENTATIONS["wkv/reference"].op, "forgetful", forgetful))
"""


def run(folder: Path, *arguments: str, interpret: str = "1") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": f"{folder}:{ROOT}", "TRITON_INTERPRET": interpret}
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )


def test_a_planted_bug(tmp_path: Path) -> None:
    module = tmp_path / "planted.py"
    module.write_text(PLANTED)
    fuzz = (
        "trwkv.testing",
        "fuzz",
        "--backend",
        "reference",
        "--op",
        "wkv",
        "--import",
        "planted",
        "--seed",
        "1",
    )
    found = run(tmp_path, *fuzz, "--minutes", "1")
    assert found.returncode == 1, found.stdout + found.stderr
    code = found.stdout[found.stdout.index("import planted") :]
    (drawn,) = re.findall(r"wkv_case\((.*)\)", code)
    assert "T=3" in drawn  # the smallest
    assert "P=1, C=1" in drawn
    (tmp_path / "test_found.py").write_text(code)
    assert "1 failed" in run(tmp_path, "pytest", "-q", "test_found.py").stdout
    module.write_text(PLANTED.replace("BUG = True", "BUG = False"))
    assert "1 passed" in run(tmp_path, "pytest", "-q", "test_found.py").stdout


def test_nothing_to_find(tmp_path: Path) -> None:
    done = run(tmp_path, "trwkv.testing", "fuzz", "--minutes", "0.05", "--backend", "torch", "--seed", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no failure" in done.stdout
    (total,) = re.findall(r"^(\d+) cases, seed 3", done.stdout, re.MULTILINE)
    assert int(total) > 0
    assert re.search(r"^agreement +\S+ +\S+ +\S+$", done.stdout, re.MULTILINE)


def test_kernels_as_they_are_compiled(tmp_path: Path) -> None:
    fuzz = ("trwkv.testing", "fuzz", "--backend", "triton", "--op", "wkv_states", "--minutes", "0.05")
    done = run(tmp_path, *fuzz, "--emulate", "90")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^[1-9]\d* cases", done.stdout, re.MULTILINE)
    refused = run(tmp_path, *fuzz, "--emulate", "75")
    assert refused.returncode != 0 and "capability: expected 80 or more" in refused.stderr


def test_a_failure_of_a_compiled_kernel_is_shown_by_one(tmp_path: Path) -> None:
    write = """
from trwkv.testing import CONTRACTS, IMPLEMENTATIONS
from trwkv.testing.fuzz import Failure
arguments = {"B": 1, "T": 3, "P": 1, "C": 2, "state": "random"}
failure = Failure(CONTRACTS["agreement"], IMPLEMENTATIONS["wkv_states/triton"], arguments, 0, ValueError("wrong"))
print(failure.as_test(emulate=90))
"""
    code = subprocess.run([sys.executable, "-c", write], cwd=ROOT, capture_output=True, text=True).stdout
    (tmp_path / "test_found.py").write_text(code)
    assert "with emulated_launches(90):" in code
    assert "1 passed" in run(tmp_path, "pytest", "-q", "test_found.py", interpret="0").stdout


def test_wrong_options(tmp_path: Path) -> None:
    done = run(tmp_path, "trwkv.testing", "fuzz", "--op", "softmax")
    assert done.returncode != 0
    assert "wkv/torch-chunk" in done.stderr
    assert "--minutes" in run(tmp_path, "trwkv.testing", "fuzz", "--help").stdout


def test_the_package_needs_no_hypothesis() -> None:
    code = "import sys; sys.modules['hypothesis'] = None; import trwkv.testing; print('fine')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "fine", done.stderr
