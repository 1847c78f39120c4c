"""The benchmark: that it measures what is right, refuses what is wrong, and counts correctly."""

import json
import sys
import types
from dataclasses import replace

import pytest
import torch

import throughput
import throughput_cases
from throughput_cases import LAYOUTS, MODES, Case, contenders, errors, exact_results, make_inputs, work
from throughput_measure import peak_memory, quantiles

pytest.importorskip("transformers", reason="the peer on a CPU is transformers' loop")
pytest.importorskip("matplotlib", reason="draws a plot")

SMALL = ["--device", "cpu", "--shapes", "2,20,8", "--seconds", "0.01"]


def small_case(mode="forward+backward", layout="aggregated", P=3, dtype=torch.float32):
    return Case(mode, 2, 20, 8, P, layout, dtype, "cpu")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("P", [1, 3])
def test_every_contender_computes_the_same(layout, mode, P):
    case = small_case(mode, layout, P)
    inputs = make_inputs(case)
    exact = exact_results(case, inputs)
    found = {
        name: errors(case, c, inputs, work(case, c, inputs)(), exact) for name, c in contenders("cpu").items()
    }
    assert set(found) == {"torch", "reference", "transformers"}
    expected = {"output"} | (set(inputs.differentiable()) if mode == "forward+backward" else set())
    for of_one in found.values():
        assert set(of_one) == expected
        assert max(of_one.values()) < 1e-5


def test_float64_is_right_across_its_segments(monkeypatch):
    case = small_case()
    inputs = make_inputs(case)
    whole = exact_results(case, inputs)
    monkeypatch.setattr(throughput_cases, "_SEGMENT", 7)
    for name, x in exact_results(case, inputs).items():
        torch.testing.assert_close(x, whole[name], rtol=1e-12, atol=1e-12)


def test_a_run_writes_what_it_prints(tmp_path, capsys):
    results, picture = tmp_path / "results.json", tmp_path / "plot.png"
    files = ["--json", str(results), "--plot", str(picture)]
    assert throughput.main([*SMALL, "--perspectives", "1,2", *files]) == 0
    printed = capsys.readouterr()
    assert "transformers (2 calls)" in printed.out
    assert "P = 2 costs" in printed.out
    assert "forward+backward, 2x20x8, P = 2: torch" in printed.err
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path) not in results.read_text()

    written = json.loads(results.read_text())
    assert {row["mode"] for row in written["rows"]} == set(MODES)
    assert len(written["rows"]) == len(MODES) * 2 * 3
    for row in written["rows"]:
        assert 0 < row["ms_p20"] <= row["ms_median"] <= row["ms_p80"]
        assert row["error"] < 1e-5
    assert throughput.main(["--table", str(results)]) == 0
    assert capsys.readouterr().out == printed.out
    assert throughput.main(["--table", str(results), "--perspectives", "2"]) == 0
    assert "costs" not in capsys.readouterr().out


@pytest.mark.parametrize("what", ["output", "gradient", "not finite"])
def test_a_wrong_result_is_named_and_not_timed(what, monkeypatch, capsys, tmp_path):
    right = contenders("cpu")["torch"]

    def run(*args):
        output, state = right.run(*args)
        if what == "output":
            return output * 1.01, state
        if what == "not finite":
            return torch.where(output == output.max(), torch.nan, output), state
        return output.detach() + 1.1 * (output - output.detach()), state

    monkeypatch.setattr(
        throughput,
        "contenders",
        lambda device: {"torch": right, "broken": replace(right, name="broken", run=run)},
    )
    path = tmp_path / "results.json"
    arguments = [*SMALL, "--perspectives", "2", "--modes", "forward+backward", "--json", str(path)]
    assert throughput.main(arguments) == 1
    assert "WRONG, not timed: broken (forward+backward, 2x20x8, P = 2)" in capsys.readouterr().err
    written = json.loads(path.read_text())
    assert [row["implementation"] for row in written["rows"]] == ["torch"]
    assert len(written["wrong"]) == 1


def test_slow_peers_are_not_called_many_times(capsys):
    arguments = [*SMALL, "--perspectives", "1,4", "--modes", "forward", "--max-call-seconds", "0"]
    assert throughput.main(arguments) == 0
    assert "skipped: transformers (forward, 2x20x8, P = 4)" in capsys.readouterr().err


def test_necessary_bytes():
    element = 2 * 20 * 8 * 4
    assert small_case("forward").necessary_bytes == 3 * element  # k, v, output
    assert (
        small_case("forward+backward").necessary_bytes == (3 + 5) * element
    )  # and k, v, its gradient; dk, dv
    assert small_case("forward", "separate").necessary_bytes == (2 + 3) * element
    assert small_case("forward", "own").necessary_bytes == (6 + 1) * element
    assert small_case("forward", dtype=torch.bfloat16).necessary_bytes == 3 * element // 2
    token, state = (
        3 * 2 * 8 * 4,
        2 * 3 * 3 * 2 * 8 * 4,
    )  # one token of k, v, output; read and write (num, den, exp)
    assert small_case("decode").necessary_bytes == token + state


def test_peak_memory_counts_what_is_held_at_once():
    x = torch.ones(2**18)  # 1 MiB
    assert peak_memory(lambda: (x + 1) * 2 + 3, "cpu") / 2**20 == pytest.approx(2, abs=0.01)


def test_quantiles():
    assert quantiles([3.0]) == (3.0, 3.0, 3.0)
    assert quantiles([5.0, 1.0, 4.0, 2.0, 3.0, 6.0]) == (2.0, 3.5, 5.0)


def test_flash_linear_attention_is_called_by_its_signature(monkeypatch):
    from transformers.models.rwkv.modeling_rwkv import rwkv_linear_attention_cpu

    def fused_recurrent_rwkv4(w, u, k, v, state):
        assert state.shape == (k.shape[0], 3, 1, k.shape[2])
        output, final = rwkv_linear_attention_cpu(
            w, u, k, v, state=state[:, :, 0].unbind(1), return_state=True
        )
        return output, torch.stack(final, 1).unsqueeze(2)

    module = types.ModuleType("fla.ops.rwkv4")
    module.fused_recurrent_rwkv4 = fused_recurrent_rwkv4
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "fla.ops.rwkv4", module)
    monkeypatch.setattr(throughput_cases.importlib.util, "find_spec", lambda name: name)
    fla = contenders("cuda")["flash-linear-attention"]
    for mode in MODES:
        case = small_case(mode)
        inputs = make_inputs(case)
        found = errors(case, fla, inputs, work(case, fla, inputs)(), exact_results(case, inputs))
        assert max(found.values()) < 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "1,2"], "expected B,T,C"),
        (["--perspectives", "0"], "at least 1"),
        (["--modes", "sideways"], "expected some of forward,forward+backward,decode"),
        (["--device", "cpu", "--backends", "tourch"], "expected some of torch,reference,transformers"),
    ],
)
def test_bad_options_say_what_is_expected(arguments, message, capsys):
    with pytest.raises(SystemExit):
        throughput.parse(arguments)
    assert message in capsys.readouterr().err
