"""Programs that run for long: their options, and folders of runs that can be stopped and continued."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = [
    "check_same_options",
    "choose_output",
    "number",
    "read_json",
    "several",
    "write_json",
    "write_whole",
]

OPTIONS_FILE = "run.json"
_RUNS = Path("runs")


def number(kind: type, *, least: float = 0, above: bool = False) -> Callable[[str], Any]:
    """An argparse type: a finite number of at least `least`, or above it."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not (least < value if above else least <= value) or value == float("inf"):
            wanted = f"a finite number {'above' if above else 'of at least'} {least}"
            raise argparse.ArgumentTypeError(f"expected {wanted}, got {text}")
        return value

    parse.__name__ = "whole number" if kind is int else "number"
    return parse


def several(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """An argparse type: different values separated by commas."""

    def parse(text: str) -> list[Any]:
        values = [kind(word) for word in text.split(",")]
        if kind is not float and len(set(values)) < len(values):
            raise argparse.ArgumentTypeError(f"expected different values, got {text}")
        return values

    parse.__name__ = "list separated by commas"
    return parse


def choose_output(output: Path | None, name: str, *, resume: bool) -> Path:
    """The folder to write to, or with `resume` that to continue in.

    Args:
        output: what the user asked for. None is `runs/<name>`, or where that exists `runs/<name>-2`, -3,
            and so on; and with `resume` the last of these.
        name: of the program.
        resume: whether the run should already be there.

    Raises:
        ValueError: the folder holds something (without `resume`), or no run (with it).
    """
    if output is None:
        candidates = [_RUNS / name]
        while candidates[-1].exists():
            candidates.append(_RUNS / f"{name}-{len(candidates) + 1}")
        if resume and len(candidates) == 1:
            raise ValueError(f"--resume: there is no run in {_RUNS}; name its folder with --output")
        output = candidates[-2] if resume else candidates[-1]
    if resume and not (output / OPTIONS_FILE).is_file():
        raise ValueError(f"--resume: {output} holds no run (no {OPTIONS_FILE})")
    if not resume and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(
            f"--output {output} is not empty: choose another one, or add --resume to continue it"
        )
    return output


def check_same_options(
    saved: Mapping[str, Any],
    now: Mapping[str, Any],
    expected: str = "--resume needs the options that the run began with",
) -> None:
    """Raise ValueError if a run that was started with `saved` should continue with other options `now`."""
    different = [
        f"{name} was {value}, now {now.get(name)}" for name, value in saved.items() if now.get(name) != value
    ]
    if different:
        raise ValueError(f"{expected}; " + ", ".join(different))


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` so that a reader sees the old file or the whole new one."""
    write_whole(path, json.dumps(content, indent=2) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write `text` so that a reader sees the old file or the whole new one."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
