"""Kernels compiled beforehand are those that calls look for. A driver without a GPU launches nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trwkv.ops import precompile

DRIVER = """
import os, torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

class Driver:
    launches = []

    class utils:
        load_binary = staticmethod(lambda *args: (1, 1, 64, 0, 1024))
        get_device_properties = staticmethod(lambda device: {"max_shared_mem": 232448, "warpSize": 32})

    class launcher_cls:
        def __init__(self, src, metadata):
            self.name = src.fn.__name__

        def __call__(self, *args, **options):
            Driver.launches.append(self.name)

    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

driver.set_active(Driver)
"""
CODE = """
from trwkv.ops import precompile
from trwkv.ops._tuning import pin_config
from trwkv.ops.token_shift_mix.kernel import token_shift_mix_forward
from trwkv.ops.wkv.chunk import chunk_backward, chunk_forward
from trwkv.ops.wkv.recurrent import recurrent_forward

def entries():
    return len(os.listdir(os.environ["TRITON_CACHE_DIR"]))

P, B, T, C = 1, 2, 100, 16
sizes = {"fwd_block_c": 16, "fwd_block_t": 4, "bwd_block_c": 16, "bwd_block_t": 4, "chunk_len": 64}
with pin_config(**sizes):
    count = precompile.compile_all(precompile.launches_of(P, torch.bfloat16, (B, T, C), "BTP", "cpu"), jobs=2)
    assert not Driver.launches
    before = entries()
    w, k, weights = torch.rand(P, C), torch.rand(B, T, C).bfloat16(), torch.rand(B, T, P)
    for _ in range(2):
        output, state, saved = chunk_forward(w, w, k, k, weights, None, None, False, save=True)
        chunk_backward(output, None, w, w, k, k, weights, None, None, False, saved)
        chunk_forward(w, w, k, k, weights, None, None, False, save=False)
        token = (w, w, k[:, :1], k[:, :1], weights[:, :1], state, None, False)
        recurrent_forward(*token)
        recurrent_forward(*token, receptance=output[:, :1])
        token_shift_mix_forward(k, [w[0]] * 3, None)
        token_shift_mix_forward(k[:, :1], [w[0]] * 2, k[:, 0])
    assert entries() == before, (before, entries())
    other = torch.rand(B, T, C).half()  # and what was not asked for is compiled then
    chunk_forward(w, w, other, other, weights, None, None, False, save=False)
    assert entries() > before
print(count, sorted(set(Driver.launches)))
"""


BROKEN = """
import triton, triton.language as tl
from trwkv.ops._compile import Launch
from trwkv.ops.precompile import compile_all

@triton.jit
def good_kernel(x):
    tl.store(x, 1.0)

@triton.jit
def broken_kernel(x):
    tl.static_assert(False, "broken on purpose")

def launches(*kernels):
    return [Launch(kernel, (1,), (torch.float32,), {}) for kernel in kernels]

for _ in range(2):
    try:
        compile_all(launches(broken_kernel, good_kernel), jobs=1)
    except triton.CompilationError as error:
        print("broken on purpose" in str(error), end=" ")
assert compile_all(launches(good_kernel), jobs=1) == 0  # the other one was compiled
good_kernel[(1,)](torch.zeros(1))
print(Driver.launches)
"""


def run(code: str, folder: Path) -> str:
    """What a program prints that has a driver without a GPU and an empty cache."""
    program = folder / "program.py"  # Triton reads the source of kernels
    program.write_text(DRIVER + code)
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder / "cache")}
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_kernel_that_does_not_compile(tmp_path: Path) -> None:
    """Is named, after the others; and leaves Triton able to compile."""
    assert run(BROKEN, tmp_path).split(maxsplit=2) == ["True", "True", "['good_kernel']\n"]


def test_calls_find_what_was_compiled(tmp_path: Path) -> None:
    count, names = run(CODE, tmp_path).split(maxsplit=1)
    assert int(count) == 14
    for name in (
        "wkv_chunk_fwd_kernel",
        "wkv_chunk_bwd_kernel",
        "wkv_recurrent_fwd_kernel",
        "token_shift_mix_kernel",
    ):
        assert name in names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "8,1024"], "--shapes: invalid"),
        (["--shapes", "8,0,768"], "expected numbers from 1 on; got '8,0,768'"),
        (["--dtypes", "float64"], "expected some of float32, bfloat16, float16; got 'float64'"),
        (["--perspectives", "two"], "--perspectives: invalid"),
        (["--jobs", "0"], "--jobs: expected at least 1; got 0"),
        (["--weights", "P"], "--weights: invalid choice"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        precompile.main(arguments)
    assert message in capsys.readouterr().err


def test_without_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        precompile.main([])
    assert "a GPU is needed" in capsys.readouterr().err
