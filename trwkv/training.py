"""Training that can be killed and continued: Hugging Face's Trainer with this library's settings."""

from __future__ import annotations

import json
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from trwkv.data import TokenBlocks
    from trwkv.models import TemporalRwkvForCausalLM

__all__ = [
    "PeakMemory",
    "TrainingInterrupted",
    "TrainingResult",
    "held_out_loss",
    "parameter_groups",
    "train",
]

#: The paper lowers the learning rate from 3e-5 to 1e-5; any other learning rate falls by the same factor.
FINAL_LEARNING_RATE_SHARE = 1 / 3
_LOGS_PER_RUN = 20
_LOGS_PER_CHECKPOINT = 4
_DEVICES = ("cpu", "cuda")
_NOTHING_TRAINS = "model: expected at least one parameter that requires a gradient; got none"


class TrainingInterrupted(Exception):
    """Training stopped on a signal, after writing a checkpoint."""

    def __init__(self, step: int):
        super().__init__(f"stopped after step {step}")
        self.step = step


@dataclass(frozen=True)
class TrainingResult:
    """What one call of :func:`train` measured.

    Attributes:
        history: `(step, training loss)` pairs, each loss the mean over the steps since the pair before; also
            those of the runs that this one continued.
        steps: that this call took; fewer than asked for if it continued a run.
        tokens_per_second: of this call alone, with logging and checkpoints; 0 if it took no step.
        seconds: of this call alone.
        peak_memory_mib: on a GPU, the most that torch had allocated there; on Linux without a GPU, the most
            main memory that the process had; elsewhere None.
    """

    history: list[tuple[int, float]]
    steps: int
    tokens_per_second: float
    seconds: float
    peak_memory_mib: float | None


def train(
    model: PreTrainedModel,
    blocks: TokenBlocks,
    folder: str | Path,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    vector_learning_rate: float | None = None,
    device: str = "cpu",
    bf16: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> TrainingResult:
    """Train the parameters of `model` that require a gradient, in place, by next-token cross-entropy.

    AdamW (betas 0.9 and 0.999, no weight decay), gradient norm clipped at 1, 5 % linear warm-up, then a
    cosine from `learning_rate` down to a third of it; it reports nowhere (for another recipe, or tensorboard, use
    Trainer itself: docs/finetuning.md). Checkpoints go to `folder`; if it already holds one,
    training continues there and ends with the weights of a run that was never stopped. On Ctrl-C or SIGTERM
    the current step is finished and a checkpoint written. A finished training removes them, and `folder` if
    nothing else is in it.

    Args:
        model: on any device; it is moved to `device`.
        blocks: the training text; every pass over it has another order, fixed by `seed`.
        folder: for checkpoints; for no other use. New, empty, or left by a run that was stopped.
        steps: optimizer steps, counted from the beginning; at least 1.
        batch_size: blocks per step.
        learning_rate: the largest one, reached after the warm-up.
        seed: of the order of the blocks, and of whatever the model draws while it trains.
        vector_learning_rate: another one for `model.vector_parameters()` (a model of this library);
            None is `learning_rate`.
        device: "cpu" or "cuda".
        bf16: compute in bfloat16 where autocast says so; the weights stay in their own type.
        callbacks: Trainer's, called beside this function's own.

    Raises:
        TrainingInterrupted: a signal stopped the training; call again with the same arguments to continue.
        ValueError: `steps` is less than 1, `device` cannot be used here, no parameter requires a gradient, or
            `folder` holds anything but checkpoints.
    """
    folder = Path(folder)
    if steps < 1:
        raise ValueError(f"steps: expected a whole number of at least 1; got {steps}")
    _check_device(device)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(_NOTHING_TRAINS)
    _check_folder(folder)
    watch = _Watch(torch.device(device))
    optimizer = None
    if vector_learning_rate is not None:
        rates = {"learning_rate": learning_rate, "vector_learning_rate": vector_learning_rate}
        own: Any = model  # one of this library
        own.to(device)  # Trainer takes an optimizer only if the model is where it trains
        optimizer = torch.optim.AdamW(parameter_groups(own, **rates))
    trainer = Trainer(
        model=model,
        args=_arguments(
            folder,
            steps=steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            seed=seed,
            device=device,
            bf16=bf16,
        ),
        train_dataset=blocks,
        callbacks=[watch, *callbacks],
        optimizers=(optimizer, None),
    )
    checkpoint, state = _last_checkpoint(folder)
    if checkpoint and state["global_step"] >= steps:  # Trainer would take one more
        trained = type(model).from_pretrained(checkpoint, dtype=model.dtype)
        model.load_state_dict(trained.state_dict())
        model.to(device)  # type: ignore[arg-type]
        history = state["log_history"]
    else:
        with watch.handling_signals():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if watch.stopped:
            raise TrainingInterrupted(trainer.state.global_step)
        history = trainer.state.log_history
    for path in _checkpoints(folder):
        shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):  # what else came there meanwhile stays
        folder.rmdir()
    block_tokens = len(blocks[0]["input_ids"])
    return TrainingResult(
        history=[(int(log["step"]), log["loss"]) for log in history if "loss" in log],
        steps=watch.steps,
        tokens_per_second=watch.steps * batch_size * block_tokens / watch.seconds if watch.steps else 0.0,
        seconds=watch.seconds,
        peak_memory_mib=watch.peak_memory_mib,
    )


def held_out_loss(
    model: PreTrainedModel, blocks: TokenBlocks, *, batch_size: int, device: str = "cpu", bf16: bool = False
) -> float:
    """The mean next-token cross-entropy of `blocks` in nats, without training on them.

    Raises:
        ValueError: `device` is neither "cpu" nor "cuda", or cannot be used here.
    """
    _check_device(device)
    with tempfile.TemporaryDirectory() as folder:  # Trainer makes one even when nothing goes there
        args = TrainingArguments(
            output_dir=folder,
            per_device_eval_batch_size=batch_size,
            use_cpu=device == "cpu",
            bf16=bf16,
            report_to="none",
            prediction_loss_only=True,
        )
        args._n_gpu = min(args.n_gpu, 1)  # one device: Trainer would multiply the batch by the number of GPUs
        return Trainer(model=model, args=args, eval_dataset=blocks).evaluate()["eval_loss"]


def parameter_groups(
    model: TemporalRwkvForCausalLM,
    *,
    learning_rate: float,
    vector_learning_rate: float | None = None,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """The parameters that require a gradient as groups for an optimizer of `torch.optim`.

    Weight decay is for the matrices of the base and of a LoRA alone. It would pull decays, bonuses and mixes, which
    have a meaning where they are, towards zero; and a rule by the number of dimensions gets the perspectives wrong,
    whose vectors are matrices [P, C].

    Args:
        model: the model itself, or PEFT's around it.
        learning_rate: of all else.
        vector_learning_rate: of `model.vector_parameters()`; None is `learning_rate`.
        weight_decay: of the weights of `nn.Linear`, but the selectors'.

    Raises:
        ValueError: no parameter requires a gradient.
    """
    vectors = {parameter for _, parameter in model.vector_parameters()}
    matrices = {module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)}
    groups: dict[str, dict[str, Any]] = {
        "vectors": {"lr": learning_rate if vector_learning_rate is None else vector_learning_rate},
        "matrices": {"lr": learning_rate, "weight_decay": weight_decay},
        "others": {"lr": learning_rate},
    }
    groups = {name: {"params": [], "weight_decay": 0.0} | group for name, group in groups.items()}
    for parameter in model.parameters():
        if parameter.requires_grad:
            kind = "matrices" if parameter in matrices else "others"
            groups["vectors" if parameter in vectors else kind]["params"].append(parameter)
    if not any(group["params"] for group in groups.values()):
        raise ValueError(_NOTHING_TRAINS)
    return [group for group in groups.values() if group["params"]]


def _check_device(device: str) -> None:
    if device not in _DEVICES:
        raise ValueError(f"device: expected one of {', '.join(_DEVICES)}; got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: expected cpu, as torch finds no CUDA device here; got {device!r}")


def _check_folder(folder: Path) -> None:
    """Raise ValueError unless `folder` is one that training may write to, and remove from."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"folder: expected a folder; got {folder}, which is none")
    own = _checkpoints(folder)
    others = sorted(x.name for x in folder.iterdir() if x not in own and not x.name.startswith("."))
    if others:
        raise ValueError(
            f"folder: expected a new or empty one, or the checkpoints of a run; got {folder}, which holds {others[0]}"
        )


def _arguments(
    folder: Path, *, steps: int, batch_size: int, learning_rate: float, seed: int, device: str, bf16: bool
) -> TrainingArguments:
    logging_steps = max(1, steps // _LOGS_PER_RUN)
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": FINAL_LEARNING_RATE_SHARE},
        warmup_steps=steps // 20,
        weight_decay=0.0,
        max_grad_norm=1.0,
        seed=seed,
        data_seed=seed,
        use_cpu=device == "cpu",
        bf16=bf16,
        logging_steps=logging_steps,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=logging_steps * _LOGS_PER_CHECKPOINT,
        save_total_limit=1,
        report_to="none",
        remove_unused_columns=False,
    )
    args._n_gpu = min(args.n_gpu, 1)  # one device: Trainer would multiply the batch by the number of GPUs
    return args


def _checkpoints(folder: Path) -> list[Path]:
    """What the Trainer calls its checkpoints, oldest first."""
    found = [x for x in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", x.name) and x.is_dir()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def _last_checkpoint(folder: Path) -> tuple[Path | None, dict[str, Any]]:
    """The newest complete checkpoint in `folder`, and its `trainer_state.json`, which the Trainer writes last."""
    for checkpoint in reversed(_checkpoints(folder)):
        try:
            return checkpoint, json.loads((checkpoint / "trainer_state.json").read_text())
        except (OSError, ValueError):
            continue
    return None, {}


class _Watch(TrainerCallback):
    """Measures the steps of this process, and turns a signal into a checkpoint and a stop after the step."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stopped = False
        self.steps = 0
        self.seconds = 0.0
        self.peak_memory_mib: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._first_step = state.global_step
        self._memory = PeakMemory(self.device)
        self._start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stopped:
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self._start
        self.steps = state.global_step - self._first_step
        self.peak_memory_mib = self._memory.mib()
        self.stopped = self.stopped and state.global_step < state.max_steps

    @contextmanager
    def handling_signals(self) -> Iterator[None]:
        """Handle SIGINT and SIGTERM here (only possible in the main thread), and as before afterwards."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {
            number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.stopped:
            raise KeyboardInterrupt
        self.stopped = True
        print("\nStopping after this step, with a checkpoint; once more to stop at once.", file=sys.stderr)


class PeakMemory:
    """The most memory used since this object was made: torch's on a GPU, the process's on Linux."""

    def __init__(self, device: torch.device):
        self.device = device
        self._known = True
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: resets VmHWM
        except OSError:
            self._known = False

    def mib(self) -> float | None:
        """The peak in MiB; None where the operating system does not tell it."""
        if not self._known:
            return None
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) / 2**10
