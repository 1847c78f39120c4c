"""The weights and tokens on which `ecosystem.py` tries programs, and what a right result is."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import RwkvConfig, RwkvForCausalLM

VOCAB, C, LAYERS, T = 61, 32, 2, 24
TOLERANCE = 1e-4
DECODED = 512


class Wrong(Exception):
    """It ran, and the result is not what it should be."""


def same(got: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> str:
    if not torch.equal(torch.isfinite(got), torch.isfinite(expected)):
        raise Wrong("not finite")
    error = (got.float() - expected.float()).abs().max().item() / expected.abs().max().item()
    if error > tolerance:
        raise Wrong(f"the result is off by {100 * error:.2g} %")
    return "yes"


def drift(got: Tensor, expected: Tensor, dtype: torch.dtype | None) -> str:
    error = (got - expected).norm() / expected.norm()
    return f"off by {100 * error.item():.2g} %, sums in {str(dtype).removeprefix('torch.')}"


class Setting(SimpleNamespace):
    """Weights in every format, tokens, and what transformers' model makes of them."""

    def __init__(self, folder: Path) -> None:
        from trwkv.models import TemporalRwkvForCausalLM

        torch.manual_seed(0)
        config = RwkvConfig(vocab_size=VOCAB, hidden_size=C, num_hidden_layers=LAYERS, rescale_every=0)
        model = RwkvForCausalLM(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        model.save_pretrained(folder / "hf")
        ours = TemporalRwkvForCausalLM.from_rwkv4(folder / "hf")
        for name in ("official.pth", "rwkv.cpp.bin"):
            ours.to_rwkv4(folder / name)
        tokens = torch.randint(0, VOCAB, (2, T))
        loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        gradient = model.rwkv.blocks[0].attention.time_decay.grad
        with torch.no_grad():
            logits = model(tokens, use_cache=False).logits
        super().__init__(folder=folder, model=model, tokens=tokens, logits=logits, gradient=gradient)


class Code:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)
