"""What a run reports: the machine and versions it ran with, a table, a plot of the losses."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

__all__ = ["environment", "format_table", "plot_losses", "relative_command", "results_table"]

_PACKAGES = ("trwkv", "torch", "triton", "transformers", "lm-eval", "datasets", "tokenizers", "numpy")


def environment(device: str) -> dict[str, Any]:
    """Versions and hardware, without anything that identifies this particular machine."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    versions["torch"] = torch.__version__  # with the build, which not every wheel's own record has
    return {
        "versions": versions,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def relative_command(program: str, arguments: Sequence[str]) -> str:
    """A command line as typed, but with absolute paths made relative to the current folder."""
    return shlex.join(["python", *(_relative(word) for word in (program, *arguments))])


def _relative(word: str) -> str:
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    paths = [os.path.relpath(path) if os.path.isabs(path) else path for path in value.split(",")]
    return option + equals + ",".join(paths)


def format_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table, its columns padded for the terminal; numbers to 4 digits, None as a dash."""
    cells = [[_format_cell(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    lines = [
        "| " + " | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in (list(header), *cells)
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|")
    return "\n".join(lines)


def _format_cell(cell: Any) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, int):
        return f"{cell:,}"
    if isinstance(cell, float):
        return f"{cell:,.0f}" if abs(cell) >= 1000 else f"{cell:.4g}"
    return str(cell)


def results_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of a fine-tuning run; a row per model, a column per metric of every task."""
    metrics = [
        (task, metric)
        for task, values in rows[0]["tasks"].items()
        for metric in values
        if metric != "n" and not metric.endswith("_stderr")
    ]
    several = len(rows[0]["tasks"]) > 1
    names = {"acc": "accuracy"}
    return format_table(
        ["P", "trained parameters", "added %", "loss"]
        + [names.get(metric, metric) + several * f" ({task})" for task, metric in metrics]
        + ["tokens/s", "peak memory MiB"],
        [
            [row["perspectives"], row["trained_parameters"], row["added_percent"], row["held_out_loss"]]
            + [row["tasks"][task][metric] for task, metric in metrics]
            + [row.get("tokens_per_second"), row.get("peak_memory_mib")]
            for row in rows
        ],
    )


def plot_losses(
    path: Path, panels: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]], *, title: str = ""
) -> None:
    """Draw loss curves as a PNG.

    Args:
        path: of the picture.
        panels: a panel's title -> a curve's name -> its `(step, loss)` pairs, the loss in nats per token.
            Panels lie side by side; a curve of one pair is drawn as a horizontal line.
        title: above all panels.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(5.5 * len(panels), 3.8), layout="constrained", squeeze=False
    )
    for axis, (panel, curves) in zip(axes[0], panels.items(), strict=True):
        for index, (name, points) in enumerate(curves.items()):
            steps, losses = zip(*points, strict=True)
            if len(points) == 1:
                axis.axhline(losses[0], color="0.4", linestyle="--", label=name)
            else:
                axis.plot(steps, losses, ("-", "--", ":", "-.")[index % 4], color=f"C{index}", label=name)
        axis.set_title(panel, fontsize=10)
        axis.set_xlabel("step")
        axis.set_ylabel("loss (nats per token)")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
