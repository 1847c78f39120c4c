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


def run_program(*arguments: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_version_is_that_of_the_package():
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert trwkv.__version__ == declared[1]


def test_importing_the_ops_loads_neither_a_kernel_nor_a_model_library():
    new = json.loads(run_program("-c", NEW_MODULES))
    assert "trwkv.ops.wkv.api" in new
    heavy = {"transformers", "triton", "datasets", "lm_eval", "matplotlib", "safetensors"}
    assert not heavy & {name.partition(".")[0] for name in new}
    files = [path for path in (ROOT / "trwkv/ops").rglob("*.py") if "@triton" in path.read_text()]
    kernels = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files}
    assert "trwkv.ops.wkv.recurrent" in kernels
    assert not kernels & set(new)


def test_importing_the_ops_costs_little_more_than_torch():
    seconds = []
    for _ in range(5):  # the best of several: other programs only ever make it slower
        seconds.append(float(run_program("-c", IMPORT_SECONDS)))
        if min(seconds) < MAX_IMPORT_SECONDS:
            return
    pytest.fail(
        f"import trwkv.ops took {min(seconds):.2f} s more than torch; at most {MAX_IMPORT_SECONDS} s allowed"
    )


def fenced(language: str) -> list[str]:
    """The README's code blocks of one language."""
    return re.findall(
        rf"^```{language}\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL
    )


def test_readme_examples_run(tmp_path, monkeypatch, capsys):
    """One after the other, as they are read: a later one may use what an earlier one made."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for snippet in fenced("python"):
        for checkpoint in re.findall(r'"(\S+\.pth)"', snippet):
            write_checkpoint(checkpoint)
        exec(compile(snippet, "README.md", "exec"), names)
        if "decoding" in snippet:
            assert names["y"].shape == (names["B"], 1, names["C"])
            assert names["state"].shape == (names["B"], 3, names["P"], names["C"])
    assert names["y"].shape == (
        1,
        512,
        names["P"],
        names["C"],
    )  # of the bidirectional one, the last of the op
    assert names["model"].config.n_perspectives == 3
    assert "added_percent" in capsys.readouterr().out


def write_checkpoint(name: str) -> None:
    models = pytest.importorskip("trwkv.models", reason="needs transformers")
    config = models.TemporalRwkvConfig(vocab_size=11, hidden_size=8, num_hidden_layers=2)
    models.TemporalRwkvForCausalLM(config).to_rwkv4(name)


def test_readme_and_contributing_name_commands_that_exist():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for document in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / document).read_text()
        named = set(re.findall(r"(?:^|`)make (\w+)", text, re.MULTILINE))
        assert named
        assert named <= targets
        for script in re.findall(r"python ((?:examples|benchmarks)/\S+\.py)", text):
            assert (ROOT / script).is_file()
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert (ROOT / link).exists()
    assert re.search(r"\bmake test$", (ROOT / ".ci/run").read_text(), re.MULTILINE)


def test_readme_options_exist():
    scripts = ("examples/finetune_lambada.py", "benchmarks/throughput.py", "benchmarks/reproduce.py")
    known = "".join(run_program(script, "--help") for script in scripts)
    for command in ("convert", "eval", "generate"):
        known += run_program("-m", "trwkv.cli", command, "--help")
    options = set(re.findall(r"(?<=[\s`])--[a-z-]+", (ROOT / "README.md").read_text()))
    assert "--placement" in options
    assert not {option for option in options if option not in known}


def test_readme_figures_are_those_of_the_committed_results():
    blocks = re.findall(
        r"<!-- python (\S+) (.+?) -->\n(.*?)<!-- end -->", (ROOT / "README.md").read_text(), re.DOTALL
    )
    assert blocks
    for script, arguments, text in blocks:
        assert text.strip() == run_program(script, *arguments.split()).strip()
