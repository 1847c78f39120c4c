"""What the benchmark shows: tables and plots, also of results written by earlier versions."""

import json

import pytest

import throughput
from throughput_plots import plot, plot_length, plot_perspectives
from throughput_report import ordered, read, summary, table

pytest.importorskip("matplotlib", reason="draws plots")

COPY = 4e12  # bytes per second
FACTORS = {"triton": 1.0, "torch": 7.0, "flash-linear-attention": 20.0}


def made_up(lengths=(1024, 4096, 16384), perspectives=(1, 2, 4), layouts=("aggregated", "own"), B=1, C=2048):
    """Results in which triton reaches 80 % of the copy and others take multiples of its time."""
    rows = []
    for T in lengths:
        for mode, read_write in (("forward", (2, 1)), ("backward", (4, 1))):
            for P in perspectives:
                for layout in layouts if P > 1 else ["aggregated"]:
                    elements = read_write[0] * (P if layout == "own" else 1) + read_write[1]
                    floor = 1e3 * elements * B * T * C * 2 / COPY
                    for name, factor in FACTORS.items():
                        ms = floor / 0.8 * factor * (1 + 0.05 * (P - 1))
                        rows.append(
                            {
                                "shape": [B, T, C],
                                "mode": mode,
                                "perspectives": P,
                                "layout": layout,
                                "dtype": "bfloat16",
                                "implementation": name,
                                "calls": P if "flash" in name else 1,
                                "ms_median": ms,
                                "ms_p20": 0.95 * ms,
                                "ms_p80": 1.1 * ms,
                                "tokens_per_second": B * T / ms * 1e3,
                                "gb_per_second": COPY * floor / ms / 1e9,
                                "percent_of_copy": 100 * floor / ms,
                                "peak_memory_mib": 64.0,
                                "extra_memory_percent_of_k": 1.2345,
                                "error": 1e-3,
                            }
                        )
    return {
        "date": "2026-01-01",
        "commit": "abc",
        "environment": {
            "versions": {"torch": "2"},
            "device": "NVIDIA H200",
            "cpu": "a CPU",
            "torch_threads": 1,
        },
        "options": {"device": "cuda"},
        "load_average_before": 0.0,
        "copy_gb_per_second": COPY / 1e9,
        "launch_us": {"call": 4.0, "graph": 1.25},
        "rows": rows,
        "resumed": [{"copy_gb_per_second": 4100.0}],
        **{name: [] for name in ("wrong", "failed", "skipped", "not_run", "first_calls")},
    }


def test_rows_are_listed_in_one_order_however_they_were_measured():
    results = made_up(lengths=(1024,), perspectives=(1, 2))
    expected = [(row["mode"], row["perspectives"], row["layout"]) for row in results["rows"][::3]]
    shuffled = sorted(results["rows"], key=lambda row: row["ms_median"], reverse=True)
    found = [(row["mode"], row["perspectives"], row["layout"]) for row in ordered(shuffled)]
    assert found[::3] == found[1::3] == found[2::3] == expected
    assert "| extra % of k |" in table(results) and " 1.2 |" in table(results)
    assert "layout" in table(results) and "dtype" not in table(results)
    assert "layout" not in table(made_up(layouts=("own",)))


def test_ratios_are_to_one_perspective_of_the_faster_backend():
    (forward, backward) = summary(made_up(lengths=(16384,), perspectives=(1, 4)))
    assert forward == (
        "1x16384x2048 forward: triton takes 0.0629 ms at P = 1; flash-linear-attention takes 20x that; "
        "P = 4 (aggregated) costs 1.15x P = 1; P = 4 (own) costs 3.45x P = 1."
    )
    assert backward.startswith("1x16384x2048 backward: triton takes 0.105 ms at P = 1")


def test_results_of_earlier_versions_can_be_read(tmp_path, capsys):
    results = made_up(layouts=("own",))
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results))
    assert throughput.main(["--table", str(path)]) == 0
    today = capsys.readouterr().out
    results["options"] |= {"layout": "own", "dtype": "bfloat16"}
    for name in ("resumed", "failed", "not_run", "first_calls"):
        del results[name]
    for row in results["rows"]:
        for name in ("layout", "dtype", "extra_memory_percent_of_k"):
            del row[name]
    path.write_text(json.dumps(results))
    assert throughput.main(["--table", str(path)]) == 0
    earlier = capsys.readouterr().out
    assert earlier.splitlines()[-6:] == today.splitlines()[-6:]  # the ratios
    assert {row["layout"] for row in read(path)["rows"]} == {"own"}
    assert "a copy reaches 4e+03 GB/s" in earlier and "a copy reaches 4e+03 to 4.1e+03 GB/s" in today


def test_plots(tmp_path, monkeypatch):
    from matplotlib import figure

    drawn = []
    real = figure.Figure.savefig
    monkeypatch.setattr(
        figure.Figure, "savefig", lambda self, path, **how: (drawn.append(self), real(self, path, **how))
    )
    results = made_up()
    for draw in (plot, plot_length, plot_perspectives):
        draw(results, tmp_path / "plot.png")
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")

    def panels(picture):
        return {
            axis.get_title(): {
                label: line.get_xydata().T if hasattr(line, "get_xydata") else line[0].get_xydata().T
                for line, label in zip(*axis.get_legend_handles_labels(), strict=True)
            }
            for axis in picture.axes
            if axis.get_visible()
        }

    over_p, over_t, ratio = (panels(picture) for picture in drawn)
    assert len(over_p) == 3 * 2 * 2 and set(over_p["backward, 1x4096x2048, own"]) == set(FACTORS)

    panel = over_t["forward, 1 x T x 2048, own"]
    assert len(panel) == 3 + 2 + 1  # triton's P, the others at P = 1, the copy
    lengths, floor = panel["a copy of the necessary bytes, P = 1"]
    assert list(lengths) == [1024, 4096, 16384]
    assert list(floor) == pytest.approx([1e3 * 3 * T * 2048 * 2 / COPY for T in lengths])
    assert list(panel["triton, P = 1"][1]) == pytest.approx(list(floor / 0.8))
    assert "flash-linear-attention, P = 1" in panel

    panel = ratio["backward, own"]
    assert list(panel["ideal: as the necessary bytes"][1]) == pytest.approx([1, 9 / 5, 17 / 5])
    assert list(panel["1x1024x2048"][1]) == pytest.approx([1, 9 / 5 * 1.05, 17 / 5 * 1.15])
    assert list(ratio["backward, aggregated"]["ideal: as the necessary bytes"][1]) == pytest.approx([1, 1, 1])
    with pytest.raises(ValueError, match="no rows to draw"):
        plot_perspectives(made_up(perspectives=(2, 4)), tmp_path / "plot.png")
