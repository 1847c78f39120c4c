"""What programs for RWKV-4 can do, tried: the table of docs/ecosystem.md.

    python benchmarks/ecosystem.py --json ecosystem.json   # tries everything, minutes
    python benchmarks/ecosystem.py --table ecosystem.json  # the table of an earlier run

Every cell is a trial on small random weights (`ecosystem_models.py`, `ecosystem_others.py`): "yes" where the result is
right, else what came instead. A program that is not installed is left out of the trials and said to be so.
"""

import argparse
import importlib.metadata
import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # decided when kernels are imported

from ecosystem_models import Transformers, Trwkv
from ecosystem_others import FlashLinearAttention, RwkvPackage
from ecosystem_setting import Setting, Wrong
from trwkv.report import environment

PEERS = {
    "transformers": (Transformers, "transformers"),
    "rwkv": (RwkvPackage, "rwkv"),
    "flash-linear-attention": (FlashLinearAttention, "flash-linear-attention"),
    "trwkv": (Trwkv, "trwkv"),
}
FEATURES = {
    "load_official": ("Reads an official .pth", "the logits of a batch are compared"),
    "load_hf": ("Reads a Hugging Face folder", "the same"),
    "load_rwkv_cpp": ("Reads a file of rwkv.cpp", "the same; float32"),
    "write_official": ("Writes an official .pth", "read again by the `rwkv` package"),
    "write_hf": ("Writes a Hugging Face folder", "read again by transformers"),
    "write_rwkv_cpp": ("Writes a file of rwkv.cpp", "read again by trwkv; no other reader was at hand"),
    "left_padding": ("Batch with padding on the left", "a shorter sequence beside a longer one is as alone"),
    "right_padding": ("Batch with padding on the right", "the same"),
    "beam_search": ("Beam search", "four beams over 24 tokens, with the state as without it"),
    "continue_from_state": ("Continues from a state", "11 tokens and then 13 are as 24"),
    "bf16_decoding": (
        "Decoding in bfloat16",
        "512 tokens one by one; the last logits against float32 with the same weights, and the state's type",
    ),
    "train_on_cpu": ("Gradients on a CPU", "that of the decay is compared"),
    "state_gradient": ("Gradient of the initial state", "compared with a reference where there is one"),
    "packed": ("Packed sequences (`cu_seqlens`)", "two in one row are as each alone"),
    "perspectives": ("Several perspectives", "three equal ones compute what one does"),
    "lm_eval": ("lm-eval", "its `HFLM` scores a continuation; compared with the logits"),
    "peft": ("LoRA with PEFT", "on key and receptance; starts as the base, all its parameters get gradients"),
    "compile": ("torch.compile(fullgraph=True)", 'the forward, with backend "aot_eager"'),
    "export": ("torch.export", "the program computes the same"),
    "refuses_code": ("Refuses a checkpoint with code", "a pickle that makes a folder; no folder was made"),
}
NO_FUNCTION, NO_MODEL = "no function", "no RWKV-4 model"
SHOWN = 90  # characters of an error


def tried(name: str, setting: Setting) -> dict[str, str]:
    """What every feature of one program gave."""
    cls, package = PEERS[name]
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return dict.fromkeys(FEATURES, "not installed")
    peer: Any = cls(setting)
    missing = NO_MODEL if cls is FlashLinearAttention else NO_FUNCTION
    return {
        feature: trial(getattr(peer, feature), setting) if hasattr(peer, feature) else missing
        for feature in FEATURES
    }


def trial(call: Any, setting: Setting) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return call()
    except ModuleNotFoundError as error:
        return f"not tried: {error.name} is not installed"
    except Exception as error:
        text = " ".join(str(error).replace(f"{setting.folder}{os.sep}", "").split()).replace("|", "/")
        first = text.split(". ")[0]
        kind = "" if isinstance(error, Wrong) else f"{type(error).__name__}: "
        return f"no: {kind}{first if len(first) < SHOWN else first[: SHOWN - 3] + '...'}"


def table(content: dict[str, Any]) -> str:
    names = [
        f"{name} {version}" if (version := content["peers"][name]["version"]) else name
        for name in content["peers"]
    ]
    lines = ["| | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for number, (feature, (title, _)) in enumerate(FEATURES.items(), 1):
        cells = [peer["cells"][feature] for peer in content["peers"].values()]
        lines.append(f"| {title} [{number}] | " + " | ".join(cells) + " |")
    notes = [f"{number}. {title}: {how}." for number, (title, how) in enumerate(FEATURES.values(), 1)]
    return "\n".join([*lines, "", "How each was tried:", "", *notes])


def run() -> dict[str, Any]:
    torch.set_num_threads(1)
    peers = {}
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(Path(folder))
        for name, (_, package) in PEERS.items():
            cells = tried(name, setting)
            installed = "not installed" not in cells.values()
            peers[name] = {
                "version": importlib.metadata.version(package) if installed else None,
                "cells": cells,
            }
    return {"environment": environment("cpu"), "peers": peers}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write what came here")
    parser.add_argument("--table", type=Path, help="try nothing: the table of this file")
    options = parser.parse_args()
    content = json.loads(options.table.read_text()) if options.table else run()
    if options.json:
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    print(table(content))


if __name__ == "__main__":
    main()
