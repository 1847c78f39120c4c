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


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": f"{folder}:{ROOT}"}
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


def test_wrong_options(tmp_path: Path) -> None:
    done = run(tmp_path, "trwkv.testing", "fuzz", "--op", "softmax")
    assert done.returncode != 0
    assert "wkv/torch-chunk" in done.stderr
    assert "--minutes" in run(tmp_path, "trwkv.testing", "fuzz", "--help").stdout


def test_the_package_needs_no_hypothesis() -> None:
    code = "import sys; sys.modules['hypothesis'] = None; import trwkv.testing; print('fine')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "fine", done.stderr
