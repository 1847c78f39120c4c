"""Evaluation with lm-eval (EleutherAI's evaluation harness), which owns the tasks and the metrics.

    results = evaluate(model, tokenizer, ["passages.jsonl", "sciq"])
    results["passages.jsonl"]  # {"perplexity": ..., "acc": ..., "n": ...}

A task is either a local jsonl file of LAMBADA-like passages (`{"text": ...}` a line, the last word is the
target) or the name of an lm-eval task, whose data come from the Hugging Face hub.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trwkv.data import check_hub

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["HUB_TASKS", "check_tasks", "evaluate", "load_passages"]

#: lm-eval's names of the paper's tasks, with lm-eval's folder of each: reading only that saves 20 s.
HUB_TASKS = {
    "lambada_openai": "lambada",
    "arc_easy": "arc",
    "winogrande": "winogrande",
    "hellaswag": "hellaswag",
    "piqa": "piqa",
    "sciq": "sciq",
}

_LAMBADA_JSONL = "lambada_jsonl"
_BOOTSTRAP_SAMPLES = 200
_FEWSHOT_SEED = 1234  # lm-eval's own; for tasks that come with examples


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str | Path],
    *,
    batch_size: int = 8,
    limit: int | None = None,
    newline_prefix: bool = False,
    samples: dict[str, dict[str, list[float]]] | None = None,
) -> dict[str, dict[str, float]]:
    """Score a causal language model on lm-eval tasks, with as many examples as each task itself asks for (mostly none).

    The model reads every passage whole, from a fresh state, whatever its training context length was. In float32 the
    result does not depend on `batch_size`; in half precision it does a little, as matrix products round by the shape of
    the batch. Perplexity is that of the target, `exp(-mean(log p(target |
    context)))`: per target word, so it can be compared between tokenizers. Accuracy is 1 where greedy
    decoding gives the target.

    Args:
        model: a `TemporalRwkvForCausalLM`, or any causal model of transformers, on the device to use.
        tokenizer: the tokenizer the model was trained with.
        tasks: jsonl files and names of lm-eval tasks, see the module's docstring.
        batch_size: requests scored in one pass.
        limit: use only the first `limit` examples of each task; None uses all.
        newline_prefix: put a line break before every context, as the paper's evaluation did.
        samples: gets, for each task, every metric's values example by example, in the order of the examples
            (log(p(target | context)) for perplexity); not those of metrics that take more than a number of each.

    Returns:
        For each task, by its file's name (without folder) or its own name, the metrics that lm-eval
        reports, with their standard errors (`<metric>_stderr`), and the number of examples `n`. Where several of
        its filters give a metric, as with some generated answers, its name is "<metric>,<filter>".

    Raises:
        ValueError: no task, an unknown task, a malformed file, or data that are not here and cannot be
            fetched.
    """
    from lm_eval.evaluator import evaluate as harness_evaluate

    from trwkv.harness import TrwkvLM, quiet

    if limit is not None and limit < 1:
        raise ValueError(f"limit: expected None or at least 1 example, got {limit}")
    check_tasks(tasks)
    # lm-eval's bootstrap would fork this process, which is unsafe once torch has threads or a GPU.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    was_training = model.training
    model.eval()
    lm = TrwkvLM(model, tokenizer, batch_size=batch_size, newline_prefix=newline_prefix)
    results: dict[str, dict[str, float]] = {}
    try:
        for task in tasks:
            name, manager = _task_manager(task)
            with quiet("lm_eval.api.task"):  # it warns of a data set that is loaded by a function
                loaded = manager.load([name])
            for harness_task in loaded["tasks"].values():
                if harness_task.get_config("num_fewshot") is None:
                    harness_task.set_config(key="num_fewshot", value=0)
                harness_task.set_fewshot_seed(seed=_FEWSHOT_SEED)
            report = harness_evaluate(
                lm, loaded, limit=limit, bootstrap_iters=_BOOTSTRAP_SAMPLES, log_samples=samples is not None
            )
            file_name = Path(task).name if _is_file(task) else None
            results |= _metrics(report, file_name)
            if samples is not None:
                samples |= _samples(report, file_name)
    finally:
        model.train(was_training)
    return results


def check_tasks(tasks: Sequence[str | Path]) -> None:
    """Raise ValueError, saying what to do, if one of `tasks` cannot be evaluated here; loads nothing."""
    if isinstance(tasks, str) or not tasks:
        raise ValueError(f"tasks: expected a list of at least one jsonl file or task name, got {tasks!r}")
    names = [Path(task).name if _is_file(task) else str(task) for task in tasks]
    if len(set(names)) < len(names):  # results are told apart by these
        raise ValueError(f"tasks: expected files and tasks of different names, got {', '.join(names)}")
    for task in tasks:
        if _is_file(task):
            _check_passages(Path(task))
        else:
            if str(task) not in HUB_TASKS:
                _check_task_name(str(task))
            check_hub(str(task), "the path of a local jsonl file of passages")


def _is_file(task: str | Path) -> bool:
    return isinstance(task, Path) or Path(task).suffix in (".jsonl", ".json")


def _check_passages(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"evaluation file {path} does not exist")
    try:
        lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"evaluation file {path}: expected UTF-8; {error}") from error
    for number, line in enumerate(lines, 1):
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f'{path}, passage {number}: expected {{"text": passage}}, got {line[:60]!r}'
            ) from None
        if (
            not isinstance(text, str)
            or not text.rpartition(" ")[0].strip()
            or not text.rpartition(" ")[2].strip()
        ):
            raise ValueError(f"{path}, passage {number}: expected a context and a last word, got {text!r}")
    if not lines:
        raise ValueError(f"evaluation file {path} holds no passage")


def _check_task_name(name: str) -> None:
    from lm_eval.tasks import TaskManager

    if name not in TaskManager().all_tasks:
        raise ValueError(
            f"unknown evaluation task {name!r}: expected a .jsonl file or a task of lm-eval, "
            f"such as {', '.join(HUB_TASKS)}"
        )


def load_passages(
    *, data_files: str | None = None, **others_of_the_run: object
) -> dict[str, datasets.Dataset]:
    """The data of the task `lambada_jsonl`: lm-eval calls it with everything in `--metadata` and `--model_args`.

    Raises:
        ValueError: no file, or not one of passages.
    """
    import datasets

    if not isinstance(data_files, str):
        raise ValueError(
            f"{_LAMBADA_JSONL}: expected the path of a jsonl file in --metadata data_files=...; got {data_files!r}"
        )
    _check_passages(Path(data_files))
    return datasets.load_dataset("json", data_files={"test": data_files})


def _task_manager(task: str | Path) -> tuple[str, Any]:
    """lm-eval's name of the task, and a task manager that knows it."""
    import lm_eval.tasks

    from trwkv.harness import TASKS

    if _is_file(task):
        metadata = {"data_files": str(Path(task).resolve())}
        return _LAMBADA_JSONL, lm_eval.tasks.TaskManager(
            include_defaults=False, include_path=str(TASKS), metadata=metadata
        )
    name = str(task)
    if name in HUB_TASKS:
        folder = Path(lm_eval.tasks.__file__).parent / HUB_TASKS[name]
        return name, lm_eval.tasks.TaskManager(include_defaults=False, include_path=str(folder))
    return name, lm_eval.tasks.TaskManager()


def _metrics(report: Any, file_name: str | None) -> dict[str, dict[str, float]]:
    """lm-eval's `{task: {"acc,none": ..., "acc_stderr,none": ...}}` as `{task: {"acc": ..., "n": ...}}`."""
    results = {}
    for task, values in report["results"].items():
        found = {
            tuple(key.split(",", 1)): float(value)
            for key, value in values.items()
            if "," in key and isinstance(value, int | float)
        }
        if found:
            counts = report["n-samples"].get(task)  # a group of tasks has none
            n = counts["effective"] if counts else values["sample_len"]
            results[file_name or task] = _by_short_name(found) | {"n": n}
    return results


def _samples(report: Any, file_name: str | None) -> dict[str, dict[str, list[float]]]:
    """lm-eval's records of each example as `{task: {"acc": [...], ...}}`."""
    results = {}
    for task, records in report["samples"].items():
        found: dict[tuple[str, ...], list[float]] = {}
        for record in sorted(records, key=lambda record: record["doc_id"]):
            for metric in record["metrics"]:
                if not isinstance(record[metric], tuple | list | dict | str):  # a number of each example
                    found.setdefault((metric, record["filter"]), []).append(float(record[metric]))
        results[file_name or task] = _by_short_name(found)
    return results


def _by_short_name(values: dict[tuple[str, ...], Any]) -> dict[str, Any]:
    """By metric, from (metric, filter); by "metric,filter" where several filters have the metric."""
    metrics = [metric for metric, _ in values]
    return {
        metric if metrics.count(metric) == 1 else f"{metric},{filter_}": value
        for (metric, filter_), value in values.items()
    }
