"""What is shown: Markdown tables and the ratios that matter, all from the results that --json writes."""

import json
from pathlib import Path
from typing import Any

from throughput_cases import MODES
from trwkv.report import format_table

OWN = ("triton", "triton, in place", "torch")
"""This library's backends, the faster first."""
SHOWN_VERSIONS = ("python", "torch", "triton", "transformers")

Row = dict[str, Any]


def read(path: Path) -> dict[str, Any]:
    """Results as `--json` writes them today, also from files written before layout and dtype were the rows' own."""
    results = json.loads(path.read_text())
    for row in results["rows"]:
        for name in ("layout", "dtype"):
            row.setdefault(name, results["options"].get(name))
    for name in ("wrong", "failed", "skipped", "not_run", "first_calls", "resumed"):
        results.setdefault(name, [])
    return results


def values(rows: list[Row], name: str) -> list[Any]:
    """What the rows have under `name`, each once, in order."""
    return list(dict.fromkeys(tuple(x) if isinstance(x := row[name], list) else x for row in rows))


def ordered(rows: list[Row]) -> list[Row]:
    """The rows as a table lists them; implementations in the order in which they were measured."""
    order = {name: values(rows, name) for name in ("shape", "dtype")}
    order["layout"] = sorted(values(rows, "layout"))

    def place(row: Row) -> tuple[int, ...]:
        return (
            order["shape"].index(tuple(row["shape"])),
            MODES.index(row["mode"]),
            order["dtype"].index(row["dtype"]),
            row["perspectives"],
            order["layout"].index(row["layout"]),
        )

    return sorted(rows, key=place)


def own(rows: list[Row]) -> str | None:
    """The faster of this library's backends that have rows."""
    present = values(rows, "implementation")
    return next((name for name in OWN if name in present), None)


def table(results: dict[str, Any]) -> str:
    """One row per measurement. Columns that say the same everywhere, or nothing, are left out."""
    rows = ordered(results["rows"])
    columns: dict[str, Any] = {
        "B x T x C": lambda row: "x".join(map(str, row["shape"])),
        "what": lambda row: row["mode"],
        "layout": lambda row: row["layout"] if row["perspectives"] > 1 else None,
        "dtype": lambda row: row["dtype"],
        "P": lambda row: row["perspectives"],
        "implementation": lambda row: (
            row["implementation"] + (f" ({row['calls']} calls)" if row["calls"] > 1 else "")
        ),
        "ms (median)": lambda row: row["ms_median"],
        "p20 - p80": lambda row: f"{row['ms_p20']:.4g} - {row['ms_p80']:.4g}",
        "tokens/s": lambda row: float(f"{row['tokens_per_second']:.3g}"),
        "GB/s": lambda row: row["gb_per_second"],
        "% of copy": lambda row: float(f"{row['percent_of_copy']:.2g}"),
        "peak MiB": lambda row: row["peak_memory_mib"],
        "extra % of k": lambda row: _rounded(row.get("extra_memory_percent_of_k")),
        "error": lambda row: f"{row['error']:.1e}",
    }
    for name in ("layout", "dtype"):
        if len(values([row for row in rows if row["perspectives"] > 1 or name == "dtype"], name)) < 2:
            del columns[name]
    if not any("extra_memory_percent_of_k" in row for row in rows):
        del columns["extra % of k"]
    return format_table(list(columns), [[cell(row) for cell in columns.values()] for row in rows])


def _rounded(number: float | None) -> float | None:
    return None if number is None else float(f"{number:.2g}")


def conditions(results: dict[str, Any]) -> str:
    """One paragraph: on what, and what the columns mean."""
    found, rows = results["environment"]["versions"], results["rows"]
    versions = ", ".join(f"{name} {found[name]}" for name in SHOWN_VERSIONS if name in found)
    copies = [x["copy_gb_per_second"] for x in (results, *results["resumed"])]
    copy = f"{min(copies):.3g}" + (f" to {max(copies):.3g}" if len(copies) > 1 else "")
    text = (
        f"{place(results)}; {', '.join(values(rows, 'dtype'))}, layout {', '.join(values(rows, 'layout'))}; "
        f"{versions}; commit {results['commit']}; "
        f"load average {results['load_average_before']} before the run. "
        f"GB/s counts necessary traffic only; a copy reaches {copy} GB/s here. "
        "A row of decode is one step of T = 1 with state. Peak MiB is what PyTorch held during a call beyond its "
        "inputs. Error: largest deviation from float64, of output or any gradient, "
        "on 16 channels spread over all, as a share of the largest value."
    )
    if any("extra_memory_percent_of_k" in row for row in rows):
        text += " Extra is the peak without outputs and gradients, in percent of k's size."
    if results["resumed"]:
        text += f" Measured in {len(copies)} runs; every share is of its own run's copy."
    if launch := results.get("launch_us"):
        text += (
            f" A kernel with nothing to do costs {launch['call']:.3g} us called and {launch['graph']:.3g} us "
            "in a CUDA graph."
        )
    return text


def place(results: dict[str, Any]) -> str:
    """The machine, in a few words."""
    environment = results["environment"]
    if results["options"]["device"] == "cuda":
        return environment["device"]
    return f"{environment['cpu']}, {environment['torch_threads']} threads"


def summary(results: dict[str, Any]) -> list[str]:
    """Sentences on the ratios: against each peer at P = 1, and P perspectives against one."""
    rows, lines = results["rows"], []
    for shape, mode, dtype in dict.fromkeys(
        (tuple(row["shape"]), row["mode"], row["dtype"]) for row in ordered(rows)
    ):
        group = [
            row
            for row in ordered(rows)
            if (tuple(row["shape"]), row["mode"], row["dtype"]) == (shape, mode, dtype)
        ]
        single = {row["implementation"]: row["ms_median"] for row in group if row["perspectives"] == 1}
        ours = next((name for name in OWN if name in single), None)
        if ours is None:
            continue
        one = single[ours]
        facts = [f"{ours} takes {one:.3g} ms at P = 1"]
        facts += [f"{peer} takes {ms / one:.3g}x that" for peer, ms in single.items() if peer not in OWN]
        several = len(values([row for row in rows if row["perspectives"] > 1], "layout")) > 1
        for row in group:
            if row["implementation"] == ours and row["perspectives"] > 1:
                layout = f" ({row['layout']})" if several else ""
                facts.append(f"P = {row['perspectives']}{layout} costs {row['ms_median'] / one:.3g}x P = 1")
        what = mode + f" {dtype}" * (len(values(rows, "dtype")) > 1)
        lines.append(f"{'x'.join(map(str, shape))} {what}: {'; '.join(facts)}.")
    return lines


def first_calls(results: dict[str, Any]) -> list[str]:
    """A table of the first calls, if there are any."""
    calls = results["first_calls"]
    if not calls:
        return []
    header = ["B x T x C", "what", "P", "layout", "dtype", "implementation", "first call (s)"]
    rows = [
        [
            f"{call['B']}x{call['T']}x{call['C']}",
            *(call[name] for name in ("mode", "P", "layout", "dtype", "implementation", "seconds")),
        ]
        for call in calls
    ]
    note = "First call: in a fresh process with empty compilation caches, from imports and inputs done to the result."
    return ["", format_table(header, rows), "", note]


def not_run(results: dict[str, Any]) -> list[str]:
    """What the time did not suffice for."""
    missing = results["not_run"]
    return (
        ["", f"{len(missing)} not run, see not_run in the results (--resume continues)."] if missing else []
    )
