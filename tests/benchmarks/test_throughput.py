"""The benchmark: that it measures what is right, refuses what is wrong, and counts correctly."""

import json
from dataclasses import replace

import pytest
import torch

import throughput
import throughput_cases
import throughput_run
from throughput_cases import LAYOUTS, Case, errors, exact_results, expected, make_inputs
from throughput_contenders import contenders, work

pytest.importorskip("transformers", reason="the peer on a CPU is transformers' loop")
pytest.importorskip("matplotlib", reason="draws a plot")

SMALL = ["--device", "cpu", "--shapes", "2,20,8", "--seconds", "0.01"]
CPU_MODES = ("forward", "backward", "forward+backward", "decode")


def small_case(mode="forward+backward", layout="aggregated", P=3, dtype=torch.float32):
    return Case(mode, 2, 20, 8, P, layout, dtype, "cpu")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", CPU_MODES)
@pytest.mark.parametrize("P", [1, 3])
def test_every_contender_computes_the_same(layout, mode, P, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda fn, **options: fn)
    case = small_case(mode, layout, P)
    inputs = make_inputs(case)
    exact = expected(mode, exact_results(inputs, gradients=True))
    names = {"output"} if "backward" not in mode else set(inputs.differentiable())
    names |= {"output"} if mode == "forward+backward" else set()
    present = contenders("cpu")
    assert set(present) == {"torch", "reference", "transformers", "torch-compiled"}
    assert (present.pop("torch-compiled").refuses(case) is None) == (
        mode != "decode" and (P == 1 or layout == "aggregated")
    )
    if mode != "decode":
        present["torch-compiled"] = contenders("cpu")["torch-compiled"]
    for contender in present.values():
        fn = work(case, contender, inputs)
        first, results = fn(), fn()
        assert set(first) == set(results) == names
        found = errors(inputs, results, exact, log_decay=contender.log_decay)
        assert set(found) == names
        assert max(found.values()) < 1e-5


@pytest.mark.parametrize("limit", ["_SEGMENT", "_REFERENCE_TOKENS"])
def test_float64_is_right_across_its_segments_and_for_long_sequences(limit, monkeypatch):
    for layout in LAYOUTS:
        inputs = make_inputs(small_case(layout=layout))
        whole = exact_results(inputs, gradients=True)
        with monkeypatch.context() as changed:
            changed.setattr(throughput_cases, limit, 7)
            for name, x in exact_results(inputs, gradients=True).items():
                assert x.dtype == torch.float64
                torch.testing.assert_close(x, whole[name], rtol=1e-12, atol=1e-12)


def test_large_inputs_repeat_a_bank_of_random_numbers(monkeypatch):
    case = small_case("forward", "own")
    small = make_inputs(case)
    monkeypatch.setattr(throughput_cases, "_BANK", 101)
    large = make_inputs(case)
    assert large.k.shape == small.k.shape
    flat = large.k.flatten()
    assert torch.equal(flat[101:202], flat[:101]) and len(flat.unique()) == 101
    assert len(large.k.unique(dim=0)) == case.B


def test_a_run_writes_what_it_prints(tmp_path, capsys):
    results, picture = tmp_path / "results.json", tmp_path / "plot.png"
    files = ["--json", str(results), "--plot", str(picture)]
    assert throughput.main([*SMALL, "--perspectives", "1,2", *files]) == 0
    printed = capsys.readouterr()
    assert "transformers (2 calls)" in printed.out
    assert "P = 2 costs" in printed.out
    assert "forward+backward, 2x20x8, P = 2, aggregated, float32: torch" in printed.err
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path) not in results.read_text()

    written = json.loads(results.read_text())
    assert {row["mode"] for row in written["rows"]} == {"forward", "forward+backward", "decode"}
    assert len(written["rows"]) == 3 * 2 * 3
    for row in written["rows"]:
        assert 0 < row["ms_p20"] <= row["ms_median"] <= row["ms_p80"]
        assert row["error"] < 1e-5
        assert ("extra_memory_percent_of_k" in row) == (row["mode"] != "decode")
    assert throughput.main(["--table", str(results)]) == 0
    assert capsys.readouterr().out == printed.out
    assert throughput.main(["--table", str(results), "--perspectives", "2"]) == 0
    assert "costs" not in capsys.readouterr().out
    assert throughput.main(["--table", str(results), "--modes", "decode", "--backends", "torch"]) == 0
    table = capsys.readouterr().out.partition("\n\n")[0]
    assert "decode" in table and "forward" not in table and "transformers" not in table


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

    both = {"torch": right, "broken": replace(right, name="broken", run=run)}
    for module in (throughput, throughput_run):
        monkeypatch.setattr(module, "contenders", lambda device: both)
    path = tmp_path / "results.json"
    arguments = [*SMALL, "--perspectives", "2", "--modes", "forward+backward", "--json", str(path)]
    assert throughput.main(arguments) == 1
    label = "broken (forward+backward, 2x20x8, P = 2, aggregated, float32)"
    assert f"WRONG, not timed: {label}" in capsys.readouterr().err
    written = json.loads(path.read_text())
    assert [row["implementation"] for row in written["rows"]] == ["torch"]
    assert len(written["wrong"]) == 1


def test_necessary_bytes():
    element = 2 * 20 * 8 * 4
    assert small_case("forward").necessary_bytes == 3 * element  # k, v, output
    assert small_case("backward").necessary_bytes == 5 * element  # k, v, the output's gradient; dk, dv
    assert small_case("forward+backward").necessary_bytes == (3 + 5) * element
    assert small_case("forward", "separate").necessary_bytes == (2 + 3) * element
    assert small_case("backward", "separate").necessary_bytes == (2 + 3 + 2) * element
    assert small_case("forward", "own").necessary_bytes == (6 + 1) * element
    assert small_case("backward", "own").necessary_bytes == (6 + 1 + 6) * element
    assert small_case("forward", dtype=torch.bfloat16).necessary_bytes == 3 * element // 2
    token = 3 * 2 * 8 * 4  # k, v, output
    state = 2 * 3 * 3 * 2 * 8 * 4  # (num, den, exp), read and written
    assert small_case("decode").necessary_bytes == token + state


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "1,2"], "expected B,T,C"),
        (["--decode", "1,2,3"], "expected B,C"),
        (["--perspectives", "0"], "at least 1"),
        (["--modes", "sideways"], "expected some of forward,backward,forward+backward,decode"),
        (["--layout", "shared"], "expected some of aggregated,separate,own"),
        (["--device", "cpu", "--modes", "decode-graph"], "decode-graph is a CUDA graph; got device cpu"),
        (["--device", "cpu", "--backends", "tourch"], "expected some of torch,reference,torch-compiled"),
        (["--device", "cpu", "--official-cuda", "."], "it runs on a GPU; got device cpu"),
        (["--device", "cpu", "--resume"], "needs --json"),
        (["--device", "cpu", "--json", "/nowhere/at/all.json"], "a folder that exists"),
        (["--device", "cpu", "--json", __file__], "exists; --resume goes on with it"),
        (
            ["--table", "/nosuch"],
            "--table: expected results that --json wrote; got /nosuch (FileNotFoundError",
        ),
        (["--table", __file__], "--table: expected results that --json wrote; got "),
    ],
)
def test_bad_options_say_what_is_expected(arguments, message, capsys):
    with pytest.raises(SystemExit):
        throughput.parse(arguments)
    assert message in capsys.readouterr().err


def test_sets():
    quick = throughput.parse(["--device", "cpu"])
    assert quick.set == "quick" and quick.layouts == ["aggregated"] and "torch-compiled" not in quick.backends
    assert quick.decode == [(1, 768), (4, 768)]  # B and C of the shapes
    full = throughput.parse(["--device", "cpu", "--set", "full", "--shapes", "1,2,3"])
    assert full.shapes == [(1, 2, 3)] and full.decode == [(1, 3)] and full.layouts == list(LAYOUTS)
    assert full.perspectives == [1, 2, 3, 4, 8] and full.modes == list(CPU_MODES)
    assert "torch-compiled" in full.backends
    cases = [case for group in throughput_run.groups(full) for case in group]
    assert len(cases) == len(set(cases)) == (1 + 4 * 3) * 4  # P = 1 once, whatever the layouts
