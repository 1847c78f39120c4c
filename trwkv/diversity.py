"""Whether perspectives differ: their decays, their vectors, their outputs, and whom the selectors believe.

    from trwkv.diversity import half_lives, output_distance, selector_entropy

`examples/inspect_perspectives.py` draws these for one model; `benchmarks/reproduce.py` follows them in training.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from trwkv.modules import PerspectiveSelector, TimeMixing

if TYPE_CHECKING:
    from trwkv.models import TemporalRwkvForCausalLM

__all__ = ["half_lives", "output_distance", "selector_entropy", "selector_weights", "vector_distances"]


def half_lives(model: TemporalRwkvForCausalLM) -> list[Tensor]:
    """Per layer: the tokens after which half of a memory is left, [P, C] (a shared decay has one row)."""
    decays = (layer.time_decay.detach().float() for layer in _time_mixings(model))
    return [math.log(2) / torch.exp(decay.reshape(-1, decay.shape[-1])) for decay in decays]


def vector_distances(model: TemporalRwkvForCausalLM) -> list[float]:
    """Per layer: the distance of the two closest perspectives' vectors, relative to the size of the vectors.

    Raises:
        ValueError: P = 1.
    """
    _check_perspectives(model)
    names = {name for name, _ in model.perspective_parameters() if "selector." not in name}
    result = []
    for i in range(len(model.rwkv.blocks)):
        vectors = [
            x.detach().float().reshape(x.shape[0], -1)
            for name, x in model.named_parameters()
            if name in names and name.startswith(f"rwkv.blocks.{i}.")
        ]
        together = torch.cat([x / x.square().mean().sqrt().clamp(min=1e-12) for x in vectors], dim=1)
        result.append(min(_relative_distances(together)))
    return result


@torch.no_grad()
def output_distance(model: TemporalRwkvForCausalLM, input_ids: Tensor) -> float:
    """How far apart the outputs of two perspectives of a time mixing are, relative to their size: the root of the
    mean square over tokens and channels, averaged over pairs and layers. 0 is a model that has collapsed to P = 1.

    Args:
        model: on the device of `input_ids`.
        input_ids: [B, T].

    Raises:
        ValueError: P = 1.
    """
    _check_perspectives(model)
    inputs: list[Tensor] = []
    layers = _time_mixings(model)
    hooks = [layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for layer in layers]
    try:
        model(input_ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    distances = []
    for layer, x in zip(layers, inputs, strict=True):
        if layer.selector is None:
            outputs = rearrange(layer(x).output, "b t p c -> p b t c")
        else:
            selector = layer.selector
            try:
                outputs = torch.stack([_alone(layer, x, p) for p in range(layer.n_perspectives)])
            finally:
                layer.selector = selector
        distances += _relative_distances(outputs)
    return sum(distances) / len(distances)


def _check_perspectives(model: TemporalRwkvForCausalLM) -> None:
    if model.config.n_perspectives < 2:
        raise ValueError("model: expected two perspectives or more; got one")


def _time_mixings(model: TemporalRwkvForCausalLM) -> list[TimeMixing]:
    return [cast(TimeMixing, block.att) for block in model.rwkv.blocks]


def _alone(layer: TimeMixing, x: Tensor, p: int) -> Tensor:
    """The layer's output with all weight on perspective p."""
    weights = [float(i == p) for i in range(layer.n_perspectives)]
    layer.selector = PerspectiveSelector(
        x.shape[-1], layer.n_perspectives, aggregation="fixed", fixed_weights=weights
    )
    return layer(x).output


def _relative_distances(perspectives: Tensor) -> list[float]:
    """Of each pair of the P tensors in [P, ...]."""
    size = perspectives.float().square().mean().sqrt().clamp(min=1e-12)
    pairs = itertools.combinations(perspectives.float(), 2)
    return [float((a - b).square().mean().sqrt() / size) for a, b in pairs]


@torch.no_grad()
def selector_weights(model: TemporalRwkvForCausalLM, input_ids: Tensor) -> list[Tensor]:
    """What every selector gives for one text [1, T]: [T, P] each, first layer to last.

    Raises:
        ValueError: P = 1.
    """
    _check_perspectives(model)
    found: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, weights: Tensor) -> None:
        found.append(weights[0] if weights.ndim == 3 else weights.expand(input_ids.shape[1], -1))

    selectors = [module for module in model.modules() if isinstance(module, PerspectiveSelector)]
    hooks = [module.register_forward_hook(keep) for module in selectors]
    try:
        model(input_ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def selector_entropy(model: TemporalRwkvForCausalLM, input_ids: Tensor) -> float:
    """Mean entropy of the selectors' weights over a text [1, T], as a share of log P: 1 is the plain mean of the
    perspectives, 0 one perspective at a time.

    Raises:
        ValueError: P = 1.
    """
    weights = torch.stack(selector_weights(model, input_ids)).float()
    entropy = -torch.xlogy(weights, weights).sum(-1).mean()
    return float(entropy) / math.log(weights.shape[-1])
