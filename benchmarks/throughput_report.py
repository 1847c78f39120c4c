"""What is shown: a Markdown table, a plot and the ratios that matter, all from the results that --json writes."""

from pathlib import Path
from typing import Any

from trwkv.report import format_table

OWN = ("triton", "torch")
"""This library's backends, the faster first."""
SHOWN_VERSIONS = ("python", "torch", "triton", "transformers")


def table(results: dict[str, Any]) -> str:
    """One row per measurement, and a note on those of several calls."""
    header = [
        "B x T x C",
        "what",
        "P",
        "implementation",
        "ms (median)",
        "p20 - p80",
        "tokens/s",
        "GB/s",
        "% of copy",
    ]
    rows = [
        [
            "x".join(map(str, row["shape"])),
            row["mode"],
            row["perspectives"],
            row["implementation"] + (f" ({row['calls']} calls)" if row["calls"] > 1 else ""),
            row["ms_median"],
            f"{row['ms_p20']:.4g} - {row['ms_p80']:.4g}",
            float(f"{row['tokens_per_second']:.3g}"),
            row["gb_per_second"],
            float(f"{row['percent_of_copy']:.2g}"),
            row["peak_memory_mib"],
            f"{row['error']:.1e}",
        ]
        for row in results["rows"]
    ]
    return format_table([*header, "peak MiB", "error"], rows)


def conditions(results: dict[str, Any]) -> str:
    """One paragraph: on what, and what the columns mean."""
    found, options = results["environment"]["versions"], results["options"]
    versions = ", ".join(f"{name} {found[name]}" for name in SHOWN_VERSIONS if name in found)
    return (
        f"{_place(results)}; {options['dtype']}, layout {options['layout']}; {versions}; commit {results['commit']}; "
        f"load average {results['load_average_before']} before the run. "
        f"GB/s counts necessary traffic only; a copy reaches {results['copy_gb_per_second']:.3g} GB/s here. "
        "A row of decode is one step of T = 1 with state. Peak MiB is what PyTorch held during a call beyond its "
        "inputs. Error: largest deviation from float64, of output or any gradient, "
        "on 16 channels spread over all, as a share of the largest value."
    )


def _place(results: dict[str, Any]) -> str:
    environment = results["environment"]
    if results["options"]["device"] == "cuda":
        return environment["device"]
    return f"{environment['cpu']}, {environment['torch_threads']} threads"


def summary(results: dict[str, Any]) -> list[str]:
    """Sentences on the ratios: against each peer at P = 1, and P perspectives against one."""
    lines = []
    groups: dict[tuple[tuple[int, ...], str], dict[tuple[str, int], float]] = {}
    for row in results["rows"]:
        group = groups.setdefault((tuple(row["shape"]), row["mode"]), {})
        group[row["implementation"], row["perspectives"]] = row["ms_median"]
    for (shape, mode), ms in groups.items():
        own = next((name for name in OWN if (name, 1) in ms), None)
        if own is None:
            continue
        one = ms[own, 1]
        facts = [f"{own} takes {one:.3g} ms at P = 1"]
        facts += [
            f"{peer} takes {ms[peer, 1] / one:.3g}x that" for peer, P in ms if P == 1 and peer not in OWN
        ]
        facts += [f"P = {P} costs {ms[own, P] / one:.3g}x P = 1" for name, P in ms if name == own and P > 1]
        lines.append(f"{'x'.join(map(str, shape))} {mode}: {'; '.join(facts)}.")
    return lines


def plot(results: dict[str, Any], path: Path) -> None:
    """A panel per shape and mode: milliseconds over P, a line per implementation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    panels: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for row in results["rows"]:
        panel = panels.setdefault(("x".join(map(str, row["shape"])), row["mode"]), {})
        panel.setdefault(row["implementation"], []).append(row)
    names = list(dict.fromkeys(row["implementation"] for row in results["rows"]))
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(4.2 * columns, 3.4 * lines + 0.5), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, ((shape, mode), curves) in zip(axes.flat, panels.items(), strict=False):
        for name, rows in curves.items():
            style = {"color": f"C{names.index(name)}", "marker": "os^Dv"[names.index(name) % 5]}
            ms = [row["ms_median"] for row in rows]
            spread = [
                [row["ms_median"] - row["ms_p20"] for row in rows],
                [row["ms_p80"] - row["ms_median"] for row in rows],
            ]
            axis.errorbar([row["perspectives"] for row in rows], ms, spread, capsize=3, label=name, **style)
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_locator(ticker.NullLocator())
        axis.set_xticks(sorted({row["perspectives"] for rows in curves.values() for row in rows}))
        axis.set_title(f"{mode}, {shape}", fontsize=10)
        axis.set_xlabel("perspectives P")
        axis.set_ylabel("ms per step" if mode == "decode" else "ms per call")
        axis.grid(alpha=0.3)
    handles = {
        label: h for axis in axes.flat for h, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), fontsize=9
    )
    place = _place(results)
    figure.suptitle(
        f"WKV under P perspectives ({place}, {results['options']['dtype']}); median, 20 % to 80 %",
        fontsize=10,
    )
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
