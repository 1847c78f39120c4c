"""lm-eval (EleutherAI's evaluation harness) with the models of this package, and its own command line.

    trwkv lm-eval --model trwkv --model_args pretrained=RWKV-4-Pile-169M.pth,tokenizer=20B_tokenizer.json \\
        --tasks lambada_jsonl --metadata data_files=passages.jsonl --batch_size 8

Importing this module makes "trwkv" a model of lm-eval. `lambada_jsonl` is the task of `trwkv/tasks`.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

import trwkv.models  # noqa: F401  lm-eval's own "hf" can load our folders, too
from trwkv.data import check_vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["TASKS", "TrwkvLM", "quiet", "run_harness"]

#: The folder of our tasks, for lm-eval's `--include_path`.
TASKS = Path(__file__).parent / "tasks"

_NO_LONGEST_CONTEXT = 1 << 30
_COMMANDS = ("run", "ls", "validate")


@register_model("trwkv")
class TrwkvLM(HFLM):
    """A causal model for lm-eval: it reads every text whole, from a fresh state, and scores it in float32.

    Args:
        pretrained: any model that `trwkv --help` names, or a model of transformers on the device to use.
        tokenizer: what `trwkv.data.load_tokenizer` takes, or a tokenizer (default: `pretrained`, a folder).
        batch_size: requests scored in one pass, a number.
        max_batch_size: for lm-eval, which always says it; without a meaning here.
        device: of a model that is loaded; a GPU only where there is one (lm-eval's own default is "cuda:0").
        dtype: of the parameters of a model that is loaded (default: the checkpoint's own).
        newline_prefix: put a line break before every context, as the paper's evaluation did.

    Raises:
        ValueError: `batch_size` is no number of at least 1 ("auto" is of no use without a longest context); and as
            `load_model` and `load_tokenizer`.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        *,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str = "cuda",
        dtype: str | None = None,
        newline_prefix: bool = False,
    ) -> None:
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size: expected a number of at least 1, got {batch_size}")
        if not isinstance(newline_prefix, bool):
            raise ValueError(f"newline_prefix: expected true or false, got {newline_prefix!r}")
        if isinstance(pretrained, str):
            from trwkv.cli import load_model
            from trwkv.data import load_tokenizer

            if tokenizer is None or isinstance(tokenizer, str):
                tokenizer = load_tokenizer(tokenizer or pretrained)
            device = "cpu" if device.startswith("cuda") and not torch.cuda.is_available() else device
            model: Any = load_model(pretrained, dtype).to(torch.device(device))  # type: ignore[arg-type]
        else:
            model = pretrained
        self.prefix = "\n" if newline_prefix else ""
        with quiet("lm_eval.models.huggingface"):  # it warns of a model instance, which is the purpose here
            super().__init__(
                pretrained=model,
                backend="causal",
                tokenizer=tokenizer,
                batch_size=int(batch_size),
                max_length=_NO_LONGEST_CONTEXT,
                softmax_dtype=torch.float32,
            )
        check_vocabulary(self.tokenizer, model.config.vocab_size)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return super().loglikelihood(self._prefixed(requests), disable_tqdm=disable_tqdm)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        return super().generate_until(self._prefixed(requests), disable_tqdm=disable_tqdm)

    def _prefixed(self, requests: list[Any]) -> list[Any]:
        """The requests, each of a context and something else, with the prefix before the context."""
        return [
            dataclasses.replace(request, arguments=(self.prefix + request.args[0], *request.args[1:]))
            for request in requests
        ]


def run_harness(arguments: Sequence[str]) -> None:
    """lm-eval's command line with these arguments; without `--include_path` it finds the tasks of this package."""
    from lm_eval.__main__ import cli_evaluate

    arguments = list(arguments)
    if arguments and arguments[0] not in _COMMANDS and arguments != ["--help"]:
        arguments.insert(0, "run")
    if arguments[:1] == ["run"] and len(arguments) > 1:
        arguments[1:1] = ["--include_path", str(TASKS)]
    before = sys.argv
    sys.argv = ["lm-eval", *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = before


@contextmanager
def quiet(logger: str) -> Iterator[None]:
    """Let this logger say nothing but errors."""
    log = logging.getLogger(logger)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
