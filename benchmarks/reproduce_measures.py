"""What `reproduce.py` measures of a model."""

from __future__ import annotations

import itertools
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from trwkv.data import TokenBlocks
from trwkv.diversity import output_distance, selector_entropy, vector_distances
from trwkv.evaluate import evaluate
from trwkv.models import TemporalRwkvForCausalLM
from trwkv.training import PeakMemory

TOKENS_AT_ONCE = 8192
COST_STEPS = 6
DIGITS = 5  # kept in the results
#: Positions at which `position_losses` begins a new interval.
POSITIONS = (1, 64, 256, 1024, 2048, 4096, 8192)


@torch.no_grad()
def token_losses(model: TemporalRwkvForCausalLM, blocks: TokenBlocks, *, bf16: bool = False) -> Tensor:
    """Cross-entropy of every token but the first of each block, in nats: [N, T - 1], on the CPU."""
    model.eval()
    length = blocks.blocks.shape[1]
    batch = max(1, TOKENS_AT_ONCE // length)
    losses = []
    for start in range(0, len(blocks), batch):
        rows = [blocks[i]["input_ids"] for i in range(start, min(start + batch, len(blocks)))]
        ids = torch.stack(rows).to(model.device)
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=bf16):
            logits = model(ids, use_cache=False).logits[:, :-1]
        losses.append(cross_entropy(logits.float().mT, ids[:, 1:], reduction="none").cpu())
    return torch.cat(losses)


def block_losses(
    model: TemporalRwkvForCausalLM, blocks: TokenBlocks, tokenizer: Any, *, bf16: bool = False
) -> list[float]:
    """Bits per byte of every block. The first token of a block is given; an end of text counts for no byte."""
    nats = token_losses(model, blocks, bf16=bf16).double().sum(1)
    n_bytes = [
        sum(map(len, tokenizer.convert_ids_to_tokens(row[row != tokenizer.eos_token_id].tolist())))
        for row in blocks.blocks[:, 1:]
    ]  # a byte-level token is written with one character per byte
    return [round(float(x) / math.log(2) / n, DIGITS) for x, n in zip(nats.tolist(), n_bytes, strict=True)]


def position_losses(
    model: TemporalRwkvForCausalLM, blocks: TokenBlocks, *, bf16: bool = False
) -> dict[str, list[float]]:
    """Nats per token between two of `POSITIONS`, for every block: how well a model uses a long past."""
    losses = token_losses(model, blocks, bf16=bf16)
    return {
        f"{first}-{end}": [round(x, DIGITS) for x in losses[:, first - 1 : end - 1].mean(1).tolist()]
        for first, end in itertools.pairwise(POSITIONS)
        if end <= losses.shape[1] + 1
    }


def lambada(model: TemporalRwkvForCausalLM, tokenizer: Any, path: Path, limit: int) -> dict[str, Any]:
    """lm-eval's perplexity and accuracy, and of each passage log(p(last word)) and whether it was right."""
    samples: dict[str, dict[str, list[float]]] = {}
    results = evaluate(model, tokenizer, [path], batch_size=4, limit=limit, samples=samples)
    (metrics,), (values,) = results.values(), samples.values()
    return {
        "perplexity": metrics["perplexity"],
        "accuracy": metrics["acc"],
        "log_probability": [round(x, DIGITS - 1) for x in values["perplexity"]],
        "right": [int(x) for x in values["acc"]],
    }


def training_cost(
    model: TemporalRwkvForCausalLM, blocks: TokenBlocks, *, bf16: bool = False
) -> dict[str, Any]:
    """Tokens per second, forward and backward over all blocks at once, and the most memory (see `PeakMemory`)."""
    ids = torch.stack([blocks[i]["input_ids"] for i in range(len(blocks))]).to(model.device)
    memory, seconds = PeakMemory(model.device), []
    for _ in range(COST_STEPS):
        start = time.perf_counter()
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=bf16):
            loss = model(ids, labels=ids).loss
        loss.backward()
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        model.zero_grad()
    return {"tokens_per_second": ids.numel() / min(seconds), "peak_memory_mib": memory.mib()}


def diversity(model: TemporalRwkvForCausalLM, input_ids: Tensor) -> dict[str, float]:
    """How far apart the perspectives are (see `trwkv.diversity`); leaves the model in the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        distances = vector_distances(model)
        return {
            "vectors": sum(distances) / len(distances),
            "outputs": output_distance(model, input_ids),
            "entropy": selector_entropy(model, input_ids),
        }
    finally:
        model.train(was_training)
