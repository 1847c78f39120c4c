"""What of a model are perspectives, what trains, and how much there is of it."""

from collections.abc import Iterator
from typing import Any, TypeVar

from torch import nn

from trwkv.models.outputs import ParameterCount
from trwkv.modules import CHANNEL_VECTORS, TIME_VECTORS

Model = TypeVar("Model", bound="TemporalRwkvParametersMixin")


class TemporalRwkvParametersMixin(nn.Module):
    """A model with a configuration and a head, whose parameters have the names that blocks give them."""

    config: Any  # a TemporalRwkvConfig
    head: nn.Module

    def perspective_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter) of what perspectives consist of: the vectors named by `config.perspective_vectors`, one
        row per perspective, and the selectors. With P = 1 those vectors are the base's own."""
        for name, parameter in self.named_parameters():
            if _vector_name(name) in self.config.perspective_vectors or "selector." in name:
                yield name, parameter

    def vector_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter) of the seven vectors of every block, those that perspectives share (by default the
        token-shift mixes) included, and of the selectors."""
        for name, parameter in self.named_parameters():
            if _vector_name(name) in TIME_VECTORS + CHANNEL_VECTORS or "selector." in name:
                yield name, parameter

    def freeze_base(self: Model, *, train_head: bool = False, train_vectors: bool = True) -> Model:
        """Let only `vector_parameters()` train. Returns self.

        The paper's recipe, in which perspectives share no vector. Where they do, the shared ones train as well: they
        brought most of the gain (docs/reproduction.md), are few, and cost nothing in inference.

        Args:
            train_head: the head, too.
            train_vectors: False for `perspective_parameters()` alone; shared vectors then stay the base's.
        """
        self.requires_grad_(False)
        for _, parameter in self.vector_parameters() if train_vectors else self.perspective_parameters():
            parameter.requires_grad_(True)
        self.head.requires_grad_(train_head)
        return self

    def count_parameters(self) -> ParameterCount:
        """Count them by what they are for; works on the meta device."""
        P = self.config.n_perspectives
        added = 0
        if P > 1:
            for name, parameter in self.perspective_parameters():
                added += parameter.numel() * (1 if "selector." in name else (P - 1) / P)
        total = sum(parameter.numel() for parameter in self.parameters())
        trainable = sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)
        base = total - round(added)
        return ParameterCount(total, base, round(added), 100 * added / base, trainable)


def _vector_name(parameter_name: str) -> str:
    """The configuration's name of a vector: "rwkv.blocks.0.ffn.time_mix_k" is "channel_mix_k"."""
    *_, module, name = ["", *parameter_name.split(".")]
    return name.replace("time_mix", "channel_mix") if module == "ffn" else name
