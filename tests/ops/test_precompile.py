"""Kernels compiled beforehand are those that calls look for. A driver without a GPU launches nothing."""

import os
import subprocess
import sys

import pytest

from trwkv.ops import precompile

CODE = """
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


def test_calls_find_what_was_compiled(tmp_path) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    count, names = done.stdout.split(maxsplit=1)
    assert int(count) == 13
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
