"""Tables and plots of a study, all from its results.json."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import numpy as np

from trwkv.report import format_table

DRAWS = 10_000
MARKED = re.compile(r"(<!-- python benchmarks/reproduce\.py (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
Results = dict[str, Any]


def by_seed(results: Results, cell: str, *path: str) -> dict[int, np.ndarray]:
    """A measure of a cell, [examples] for each seed that was run."""
    runs = {run["seed"]: run for run in results["runs"] if run["cell"] == cell}
    return {seed: np.array(reduce(getitem, path, runs[seed]), dtype=float) for seed in sorted(runs)}


def values(results: Results, cell: str, *path: str) -> np.ndarray:
    """[seeds, examples] of a measure of a cell."""
    return np.stack(list(by_seed(results, cell, *path).values()))


def was_run(results: Results, cell: str) -> bool:
    return any(run["cell"] == cell for run in results["runs"])


def interval(differences: np.ndarray, draws: int = DRAWS) -> tuple[float, float, float]:
    """Mean of paired differences [seeds, examples], and a 95 % interval by bootstrap: every draw takes seeds and
    examples anew, with replacement. The same numbers always: the draws have a fixed seed."""
    rng = np.random.default_rng(0)
    n_seeds, n = differences.shape
    seeds = rng.integers(n_seeds, size=(draws, n_seeds, 1))
    means = np.empty(draws)
    for i in range(0, draws, 1000):
        examples = rng.integers(n, size=(min(1000, draws - i), 1, n))
        means[i : i + 1000] = differences[seeds[i : i + 1000], examples].mean((1, 2))
    low, high = np.quantile(means, [0.025, 0.975])
    return float(differences.mean()), float(low), float(high)


def difference(results: Results, cell: str, *path: str) -> tuple[float, float, float] | None:
    """Of a cell to its control, over the seeds that both have; None without a control or such a seed."""
    control = results["cells"][cell]["control"]
    own, theirs = by_seed(results, cell, *path), by_seed(results, control, *path) if control else {}
    differences = [own[seed] - theirs[seed] for seed in own if seed in theirs]
    return interval(np.stack(differences)) if differences else None


def table(results: Results, name: str) -> str:
    """One table as Markdown."""
    if name not in results["tables"]:
        raise ValueError(f"--table: expected one of {', '.join(results['tables'])}; got {name!r}")
    cells = [cell for cell in results["tables"][name] if was_run(results, cell)]
    if not cells:
        return "(not run yet)"
    kinds = {
        "settings": _settings_row,
        "brief": _brief_row,
        "positions": _position_row,
        "diversity": _diversity_row,
    }
    row = kinds.get(name, _row)
    rows = [row(results, cell) for cell in cells]
    return format_table(list(rows[0]), [[row.get(column) for column in rows[0]] for row in rows])


def _row(results: Results, cell: str) -> dict[str, Any]:
    settings = results["cells"][cell]
    runs = [run for run in results["runs"] if run["cell"] == cell]
    parameters, cost = runs[0]["parameters"], results.get("cost", {}).get(cell)
    return {
        "cell": cell,
        "seeds": len(runs),
        "control": settings["control"],
        "trained": parameters["trained"],
        "added %": 100 * parameters["added"] / (parameters["total"] - parameters["added"]),
        "held-out bits/byte": _fixed(values(results, cell, "bits_per_byte", "held_out").mean(), 4),
        "less control": _interval(difference(results, cell, "bits_per_byte", "held_out"), 4),
        "WikiText-2 bits/byte": _fixed(values(results, cell, "bits_per_byte", "wikitext").mean(), 4),
        "less control ": _interval(difference(results, cell, "bits_per_byte", "wikitext"), 4),
        "LAMBADA log perplexity": _fixed(-values(results, cell, "lambada", "log_probability").mean(), 3),
        "less control  ": _interval(_negated(difference(results, cell, "lambada", "log_probability")), 3),
        "LAMBADA accuracy %": _fixed(100 * values(results, cell, "lambada", "right").mean(), 2),
        "tokens/s": cost and cost["tokens_per_second"],
        "peak MiB": cost and cost["peak_memory_mib"],
    }


def _settings_row(results: Results, cell: str) -> dict[str, Any]:
    """How a cell trained."""
    settings = results["cells"][cell]
    return {
        "cell": cell,
        "steps": settings["steps"],
        "sequences": settings["batch_size"],
        "of tokens": settings["context_length"],
        "learning rate": settings["learning_rate"],
        "that of the vectors": settings["vector_learning_rate"],
        "steps x rate": settings["steps"] * (settings["vector_learning_rate"] or settings["learning_rate"]),
    }


def _brief_row(results: Results, cell: str) -> dict[str, Any]:
    """What a cell has over its control, in few columns."""
    row = _row(results, cell)
    return {
        "cell": cell,
        "control": row["control"],
        "added %": row["added %"],
        "held-out bits/byte": row["less control"],
        "WikiText-2 bits/byte": row["less control "],
        "LAMBADA log perplexity": row["less control  "],
    }


def _position_row(results: Results, cell: str) -> dict[str, Any]:
    """Nats per token by the position in a long text: of a base or a control itself, of others less their control."""
    row: dict[str, Any] = {"cell": cell, "less": results["cells"][cell]["control"]}
    for interval_name in results["runs"][0]["by_position"]:
        found = difference(results, cell, "by_position", interval_name)
        mean = values(results, cell, "by_position", interval_name).mean()
        row[interval_name] = _interval(found, 4) if found else _fixed(mean, 4)
    return row


def _diversity_row(results: Results, cell: str) -> dict[str, Any]:
    """How far apart the perspectives are after the first step, and after the last."""
    runs = [run["diversity"] for run in results["runs"] if run["cell"] == cell]
    row: dict[str, Any] = {"cell": cell}
    for measure in ("vectors", "outputs", "entropy"):
        first, last = (float(np.mean([run[i][measure] for run in runs])) for i in (0, -1))
        row |= {f"{measure}, first step": _fixed(first, 4), f"{measure}, last step": _fixed(last, 4)}
    return row


def _fixed(x: float, digits: int) -> str:
    return f"{x:.{digits}f}"


def _interval(x: tuple[float, float, float] | None, digits: int) -> str | None:
    return None if x is None else f"{x[0]:+.{digits}f} [{x[1]:+.{digits}f}, {x[2]:+.{digits}f}]"


def _negated(x: tuple[float, float, float] | None) -> tuple[float, float, float] | None:
    return None if x is None else (-x[0], -x[2], -x[1])


def plots(results: Results, path: Path) -> None:
    """Three pictures beside `path`: the effects, the diversity over training, the loss by position."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    for name, draw in (
        ("effects", _draw_effects),
        ("diversity", _draw_diversity),
        ("positions", _draw_positions),
    ):
        figure = draw(results, pyplot)
        figure.savefig(path.with_name(f"{path.stem}_{name}.png"), dpi=120)
        pyplot.close(figure)


def _draw_effects(results: Results, pyplot: Any) -> Any:
    rows = [
        (cell, found)
        for cell in results["cells"]
        if results["cells"][cell]["start"] == "upcycled"
        and was_run(results, cell)
        and (found := difference(results, cell, "bits_per_byte", "held_out"))
    ]
    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.27 * len(rows)), layout="constrained")
    for i, (_, (mean, low, high)) in enumerate(rows):
        color = "C2" if high < 0 else "C3" if low > 0 else "0.5"
        axes.errorbar(mean, -i, xerr=[[mean - low], [high - mean]], fmt="o", color=color, capsize=3)
    axes.axvline(0, color="k", linewidth=0.8)
    axes.set_yticks(
        [-i for i in range(len(rows))], [f"{cell} - {results['cells'][cell]['control']}" for cell, _ in rows]
    )
    axes.set(
        xlabel="held-out bits per byte less the control's (left: better)",
        title="Upcycled cells: mean, 95 % paired bootstrap",
    )
    axes.grid(alpha=0.3, axis="x")
    return figure


def _draw_diversity(results: Results, pyplot: Any) -> Any:
    figure, panels = pyplot.subplots(1, 3, figsize=(15, 5), layout="constrained")
    titles = {
        "vectors": "Distance of the closest vectors",
        "outputs": "Distance of the outputs",
        "entropy": "Entropy of the selector / log P",
    }
    cells = [cell for cell in results["tables"]["diversity"] if was_run(results, cell)]
    for axes, (measure, title) in zip(panels, titles.items(), strict=True):
        for i, cell in enumerate(cells):
            runs = [run["diversity"] for run in results["runs"] if run["cell"] == cell]
            steps = [row["step"] for row in runs[0]]
            mean = np.mean([[row[measure] for row in run] for run in runs], axis=0)
            mean[mean == 0] = np.nan  # before the first noise or step
            axes.plot(steps, mean, marker=".", color=f"C{i % 10}", ls="-" if i < 10 else "--", label=cell)
        axes.set(xlabel="step of training", title=title)
        axes.grid(alpha=0.3)
    panels[0].set_yscale("log")
    panels[1].set_yscale("log")
    panels[2].legend(fontsize=8)
    return figure


def _draw_positions(results: Results, pyplot: Any) -> Any:
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    names = list(results["runs"][0]["by_position"])
    cells = [
        cell
        for cell in results["tables"]["positions"]
        if was_run(results, cell) and results["cells"][cell]["start"] == "upcycled"  # others differ far more
    ]
    shown = 0
    for cell in cells:
        found = [difference(results, cell, "by_position", name) for name in names]
        if None in found:
            continue
        mean, low, high = np.array(found).T
        x = np.arange(len(names)) + 0.05 * shown
        axes.errorbar(x, mean, yerr=[mean - low, high - mean], marker="o", capsize=3, label=cell)
        shown += 1
    axes.axhline(0, color="k", linewidth=0.8)
    axes.set_xticks(range(len(names)), names)
    axes.set(xlabel="position in the text", ylabel="nats per token less the control's (down: better)")
    axes.grid(alpha=0.3)
    if shown:
        axes.legend()
    return figure


def rewrite(document: Path) -> None:
    """Put what the named commands print into a document, between `<!-- python ... -->` and `<!-- end -->`."""
    import reproduce

    def replaced(match: re.Match) -> str:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            reproduce.main(shlex.split(match[2]))
        return f"{match[1]}{printed.getvalue().strip()}\n{match[3]}"

    document.write_text(MARKED.sub(replaced, document.read_text(encoding="utf-8")), encoding="utf-8")
