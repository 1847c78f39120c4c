"""Weights of RWKV-4 (official names and shapes) into a model and out of it."""

import warnings
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trwkv import convert
from trwkv.models.configuration import TemporalRwkvConfig
from trwkv.modules import PerspectiveSelector, perspective_rows

ModelT = TypeVar("ModelT", bound=PreTrainedModel)


def with_rwkv4_weights(
    cls: type[ModelT], config: TemporalRwkvConfig, state: dict[str, Tensor], dtype: torch.dtype
) -> ModelT:
    """A `cls` of this configuration with the tensors of an RWKV-4; selectors as at the start of training."""
    if config.n_perspectives > 1 and config.perspective_noise == 0 and config.aggregation != "selector":
        warnings.warn(
            f"aggregation {config.aggregation!r} with perspective_noise 0: the perspectives start equal and "
            "get equal gradients, so training will not tell them apart",
            stacklevel=3,
        )
    config.dtype = dtype
    with torch.device("meta"):  # no memory, no random start
        model = cls(config)
    weights = {}
    for name, parameter in model.named_parameters():
        if "selector." in name:
            continue
        value = state[name.removeprefix("rwkv.")]
        wide = name.endswith(("time_decay", "time_first"))
        # copied: the file may be mapped into memory, and be overwritten while the model lives
        value = value.reshape(value.shape[-1]) if "time_" in name else value
        value = value.to(torch.promote_types(torch.float32, value.dtype) if wide else dtype, copy=True)
        if parameter.ndim > value.ndim:
            value = perspective_rows(value, config.n_perspectives, config.perspective_noise)
        weights[name] = value
    model.load_state_dict(weights, strict=False, assign=True)
    for module in model.modules():
        if isinstance(module, PerspectiveSelector):
            module.to_empty(device="cpu").to(dtype).reset_parameters()
    model.tie_weights()
    return model.eval()


def rwkv4_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors of a model with one perspective, on the CPU, with official names and shapes."""
    shapes = convert.rwkv4_shapes(**{name: getattr(model.config, name) for name in convert.SIZES})
    state = {name.removeprefix("rwkv."): tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    return {name: state[name].reshape(shape).contiguous() for name, shape in shapes.items()}
