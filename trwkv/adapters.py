"""Perspectives, and the vectors they share, as a small file of their own, beside a base or a PEFT adapter.

PEFT saves what it added itself and nothing else. Where perspectives train together with a LoRA, as
`docs/finetuning.md` shows, they are kept here: in the same folder, and in every checkpoint of a Trainer.
"""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

if TYPE_CHECKING:
    from trwkv.models import TemporalRwkvForCausalLM

__all__ = ["PERSPECTIVES_FILE", "PerspectiveCheckpoints", "load_perspectives", "save_perspectives"]

PERSPECTIVES_FILE = "perspectives.safetensors"
# What the tensors do not say, or say less clearly.
_SETTINGS = ("n_perspectives", "placement", "perspective_vectors", "aggregation", "fixed_weights")


def save_perspectives(model: TemporalRwkvForCausalLM, folder: str | PathLike) -> Path:
    """Write `model.vector_parameters()`, bit for bit, to `perspectives.safetensors` in `folder`.

    Args:
        model: on any device; the model itself, or PEFT's around it. Not one whose parameters are sharded.
        folder: where to; made if it is missing.

    Returns:
        The path of the file.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: x.detach().cpu().contiguous() for name, x in model.vector_parameters()}
    save_file(tensors, folder / PERSPECTIVES_FILE, metadata=_settings(model))
    return folder / PERSPECTIVES_FILE


def load_perspectives(model: TemporalRwkvForCausalLM, folder: str | PathLike) -> None:
    """Give `model`, in place, the perspectives that :func:`save_perspectives` wrote to `folder`.

    Args:
        model: of the configuration they were saved from; the model itself, or PEFT's around it.
        folder: the folder that has the file.

    Raises:
        FileNotFoundError: it has none.
        ValueError: the perspectives are those of another configuration, or of other tensors; the model is
            then as it was.
    """
    from safetensors import safe_open

    path = Path(folder) / PERSPECTIVES_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; save_perspectives writes it")
    with safe_open(path, framework="pt") as file:
        settings, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, value in _settings(model).items():
        if settings.get(name) != value:
            raise ValueError(f"{path}: expected {name} {value}, as the model has; got {settings.get(name)}")
    parameters = dict(model.vector_parameters())
    shapes = {name: tuple(x.shape) for name, x in parameters.items()}
    saved = {name: tuple(x.shape) for name, x in tensors.items()}
    if saved != shapes:
        different = sorted(dict(saved.items() ^ shapes.items()))
        raise ValueError(
            f"{path}: expected the names and shapes of the model's vectors and selectors; different are {different[:8]}"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


class PerspectiveCheckpoints(TrainerCallback):
    """Keeps the perspectives in the checkpoints of a Trainer whose model is a PEFT model.

    Such a Trainer saves and loads the adapter alone: resumed without this, the perspectives would silently start
    from the base's. With it, `resume_from_checkpoint` (a checkpoint in `output_dir`) and
    `load_best_model_at_end` restore both.

    Raises:
        FileNotFoundError: training resumes from a checkpoint that has no perspectives.
    """

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.should_save:
            save_perspectives(kwargs["model"], _checkpoint(args, state))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step > 0:
            load_perspectives(kwargs["model"], _checkpoint(args, state))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            load_perspectives(kwargs["model"], state.best_model_checkpoint)


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _settings(model: TemporalRwkvForCausalLM) -> dict[str, str]:
    return {name: json.dumps(getattr(model.config, name)) for name in _SETTINGS}
