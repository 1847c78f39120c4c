"""Plots of results: milliseconds over P with all implementations; how time grows with T, and with P."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from throughput_report import Row, ordered, own, place, values


def plot(results: dict[str, Any], path: Path) -> None:
    """A panel per shape and mode: milliseconds over P, a line per implementation."""
    rows = ordered(results["rows"])
    names = values(rows, "implementation")

    def draw(axis: Any, panel: list[Row]) -> None:
        from matplotlib import ticker

        for name in values(panel, "implementation"):
            index = names.index(name)
            _line(
                axis,
                [row for row in panel if row["implementation"] == name],
                "perspectives",
                label=name,
                color=f"C{index}",
                marker="os^DvPX"[index % 7],
            )
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_locator(ticker.NullLocator())
        axis.set_xticks(sorted(values(panel, "perspectives")))
        axis.set_xlabel("perspectives P")
        axis.set_ylabel("ms per step" if panel[0]["mode"].startswith("decode") else "ms per call")

    _figure(results, path, _panels(rows, ("mode", "shape")), draw, "WKV under P perspectives")


def plot_length(results: dict[str, Any], path: Path) -> None:
    """A panel per mode, B and C: milliseconds over T, a line per P; peers at P = 1; below them what a copy takes."""
    rows = [
        {**row, "batch and channels": f"{row['shape'][0]} x T x {row['shape'][2]}", "T": row["shape"][1]}
        for row in ordered(results["rows"])
        if not row["mode"].startswith("decode")
    ]
    ours = own(rows)
    peers = [name for name in values(rows, "implementation") if name != ours]
    perspectives = sorted(values(rows, "perspectives"))

    def draw(axis: Any, panel: list[Row]) -> None:
        for P in perspectives:
            index = perspectives.index(P)
            chosen = [row for row in panel if row["implementation"] == ours and row["perspectives"] == P]
            _line(axis, chosen, "T", label=f"{ours}, P = {P}", color=f"C{index}", marker="os^Dv"[index % 5])
        for index, name in enumerate(peers):
            chosen = [row for row in panel if row["implementation"] == name and row["perspectives"] == 1]
            _line(
                axis,
                chosen,
                "T",
                label=f"{name}, P = 1",
                color="0.55",
                marker="Px+1*<>"[index % 7],
                linestyle=":",
            )
        floor = {row["T"]: _copy_ms(row) for row in panel if row["perspectives"] == min(perspectives)}
        lengths = sorted(floor)
        axis.plot(
            lengths,
            [floor[T] for T in lengths],
            "k--",
            linewidth=1,
            label=f"a copy of the necessary bytes, P = {min(perspectives)}",
        )
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        ticks = sorted(values(panel, "T"))
        axis.set_xticks(ticks, [f"{T:,}" for T in ticks], rotation=30, fontsize=8)
        axis.minorticks_off()
        axis.set_xlabel("tokens T")
        axis.set_ylabel("ms per call")

    _figure(results, path, _panels(rows, ("mode", "batch and channels")), draw, "Time against the length")


def plot_perspectives(results: dict[str, Any], path: Path) -> None:
    """A panel per mode and layout: time over P as a multiple of that of P = 1, a line per shape."""
    rows = [row for row in ordered(results["rows"]) if row["implementation"] == own(results["rows"])]
    single = {_what(row): row["ms_median"] for row in rows if row["perspectives"] == 1}
    rows = [{**row, "one": single[_what(row)]} for row in rows if _what(row) in single]
    shapes = values(rows, "shape")

    def draw(axis: Any, panel: list[Row]) -> None:
        for shape in values(panel, "shape"):
            index = shapes.index(shape)
            chosen = [row for row in panel if tuple(row["shape"]) == shape]
            scale = 1 / chosen[0]["one"]
            style = {"color": f"C{index}", "marker": "os^DvPX*<>"[index % 10]}
            _line(axis, chosen, "perspectives", scale=scale, label="x".join(map(str, shape)), **style)
        first = [row for row in panel if row["shape"] == panel[0]["shape"]]
        steps = sorted({row["perspectives"]: _copy_ms(row) for row in first}.items())
        axis.plot(
            [P for P, _ in steps],
            [ms / steps[0][1] for _, ms in steps],
            "k--",
            linewidth=1,
            label="ideal: as the necessary bytes",
        )
        ticks = sorted(values(panel, "perspectives"))
        axis.plot(ticks, ticks, "k:", linewidth=1, label="P separate calls")
        axis.set_xticks(ticks)
        axis.set_xlabel("perspectives P")
        axis.set_ylabel("time / time of P = 1")
        axis.set_ylim(bottom=0)

    panels = _panels(rows, ("mode",), always=("layout",))
    _figure(results, path, panels, draw, f"What perspectives cost, {own(rows)}")


def _copy_ms(row: Row) -> float:
    """Milliseconds that a copy of the row's necessary bytes takes."""
    return row["ms_median"] * row["percent_of_copy"] / 100


def _what(row: Row) -> tuple[Any, ...]:
    return tuple(row["shape"]), row["mode"], row["dtype"]


def _line(axis: Any, rows: list[Row], over: str, *, scale: float = 1.0, **style: Any) -> None:
    """Medians, with bars from 20 % to 80 %."""
    rows = sorted(rows, key=lambda row: row[over])
    if rows:
        ms = [scale * row["ms_median"] for row in rows]
        spread = [
            [scale * (row["ms_median"] - row["ms_p20"]) for row in rows],
            [scale * (row["ms_p80"] - row["ms_median"]) for row in rows],
        ]
        axis.errorbar([row[over] for row in rows], ms, spread, capsize=3, markersize=5, **style)


def _panels(rows: list[Row], by: Sequence[str], always: Sequence[str] = ()) -> dict[str, list[Row]]:
    """Rows by title: `by`, and layout and dtype where there are several.

    P = 1 knows no layout and belongs into the panels of all.
    """
    layouts = values([row for row in rows if row["perspectives"] > 1], "layout")
    by = [*by, *(name for name in ("layout", "dtype") if name in always or len(values(rows, name)) > 1)]
    panels: dict[str, list[Row]] = {}
    for row in rows:
        for layout in layouts if row["perspectives"] == 1 and layouts else [row["layout"]]:
            cells = [{**row, "layout": layout}[name] for name in by]
            title = ", ".join("x".join(map(str, x)) if isinstance(x, list) else x for x in cells)
            panels.setdefault(title, []).append(row)
    return panels


def _figure(
    results: dict[str, Any],
    path: Path,
    panels: dict[str, list[Row]],
    draw: Callable[[Any, list[Row]], None],
    title: str,
) -> None:
    """A PNG of the panels, up to three in a line, with one legend below them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    if not panels:
        raise ValueError(f"{path}: no rows to draw in the results")
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(4.2 * columns, 3.4 * lines + 0.7), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    handles: dict[str, Any] = {}
    for axis, (name, rows) in zip(axes.flat, panels.items(), strict=False):
        draw(axis, rows)
        axis.set_title(name, fontsize=10)
        axis.grid(alpha=0.3)
        handles.update({label: h for h, label in zip(*axis.get_legend_handles_labels(), strict=True)})
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=min(4, len(handles)), fontsize=9
    )
    dtypes = ", ".join(values(results["rows"], "dtype"))
    figure.suptitle(f"{title} ({place(results)}, {dtypes}); median, 20 % to 80 %", fontsize=10, wrap=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
