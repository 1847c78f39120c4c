"""Give an RWKV-4 model multiple temporal perspectives, fine-tune them, and evaluate on LAMBADA.

    python examples/finetune_lambada.py

needs no argument, no network and a few minutes on two CPU cores. It trains a small RWKV-4 on generated passages
whose last word only an early sentence tells; then, on longer passages, where the base forgets that word, it
fine-tunes the vectors of P = 1 (the control: the same base, trained equally long) and P = 3, and compares
them. With a real base, text and tasks:

    python examples/finetune_lambada.py --base RWKV/rwkv-4-169m-pile \\
        --train wikimedia/wikipedia:20231101.en --placement stream --perspectives 1,2,3,4 \\
        --eval lambada_openai,arc_easy,winogrande,hellaswag,piqa,sciq --newline-prefix --device cuda

Everything ends in one folder: results.json, loss.png, and for every P a model that loads with
`trwkv.models.TemporalRwkvForCausalLM.from_pretrained`. Stop it at any time and continue with --resume.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trwkv.data import TokenBlocks, check_hub, check_train_source, is_hub_id, load_tokenizer, token_blocks
from trwkv.runs import OPTIONS_FILE, check_same_options, choose_output, number, read_json, several, write_json

PROGRAM = "examples/finetune_lambada.py"
EMBEDDED_PASSAGES = 300
HELD_OUT_BLOCKS = 64
MAX_TRAIN_TOKENS = 100_000_000
NOT_KEPT = ("output", "resume", "device", "command")  # these may differ when a run is continued
# The paper's recipe for a real base; a small model trained in minutes wants larger steps on shorter text.
DEFAULTS = {"steps": 64_000, "batch_size": 2, "context_length": 1024, "learning_rate": 3e-5}
SCRATCH_DEFAULTS = {"steps": 200, "batch_size": 8, "context_length": 256, "learning_rate": 1e-2}
SCRATCH_BASE = {"hidden_size": 96, "layers": 2, "base_steps": 1200, "base_learning_rate": 1e-2}


COUNT, AT_LEAST_0, ABOVE_0 = number(int, least=1), number(float), number(float, above=True)
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "base and data": {
        "--base": {"default": "scratch", "help": '"scratch" (default), an RWKV-4 .pth, a folder or a hub id'},
        "--tokenizer": {
            "help": '"bytes" (default for scratch), a tokenizer.json, a folder or a hub id (default: the base)'
        },
        "--train": {
            "default": "embedded",
            "help": '"embedded" (default), .txt or .jsonl files (or .gz) separated by commas, or a hub dataset '
            "owner/name[:configuration]",
        },
        "--eval": {
            "type": several(str),
            "default": ["embedded"],
            "help": '"embedded" (default), LAMBADA-like .jsonl files, lm-eval tasks; separated by commas',
        },
        "--eval-limit": {"type": COUNT, "help": "evaluate the first so many examples of each task only"},
        "--newline-prefix": {
            "action": "store_true",
            "help": "put a line break before every evaluated context, as the paper did",
        },
    },
    "perspectives": {
        "--perspectives": {"type": several(COUNT), "default": [1, 3], "help": "values of P (default 1,3)"},
        "--placement": {"choices": ("layer", "stream"), "default": "layer"},
        "--perspective-vectors": {"type": several(str), "help": "default: those that the placement has"},
        "--aggregation": {"choices": ("selector", "learned", "mean", "fixed"), "default": "selector"},
        "--fixed-weights": {"type": several(float), "help": "of --aggregation fixed, such as 0.75,0.25"},
        "--perspective-noise": {
            "type": AT_LEAST_0,
            "default": 0.1,
            "help": "sets the perspectives apart at the start (default 0.1)",
        },
        "--selector-noise": {"type": AT_LEAST_0, "default": 0.0, "help": "on the selector, in training"},
    },
    "training (defaults: the paper's; with --base scratch, smaller ones)": {
        "--train-parameters": {
            "choices": ("vectors", "vectors+head", "perspectives", "perspectives+head", "all"),
            "default": "vectors",
            "help": "vectors: all seven of every block, and the selectors; perspectives: not those they share",
        },
        "--steps": {"type": COUNT, "help": "of fine-tuning (64000; scratch: 200)"},
        "--batch-size": {"type": COUNT, "help": "sequences per step (2; scratch: 8)"},
        "--context-length": {"type": COUNT, "help": "tokens per sequence (1024; scratch: 256)"},
        "--learning-rate": {"type": ABOVE_0, "help": "falls to a third of this (3e-5; scratch: 1e-2)"},
        "--seed": {"type": number(int), "default": 0},
        "--device": {"choices": ("auto", "cpu", "cuda"), "default": "auto"},
        "--bf16": {"action": "store_true", "help": "compute in bfloat16 (autocast)"},
    },
    "the base, with --base scratch only": {
        "--hidden-size": {"type": COUNT, "help": "(default 96)"},
        "--layers": {"type": COUNT, "help": "(default 2)"},
        "--base-train": {"help": "its text (default: --train; instead of embedded, embedded-short)"},
        "--base-steps": {"type": COUNT, "help": "training steps (default 1200)"},
        "--base-learning-rate": {"type": ABOVE_0, "help": "(default 1e-2)"},
    },
    "the run": {
        "--output": {"type": Path, "help": "folder of the results (default: a new one in runs/)"},
        "--resume": {"action": "store_true", "help": "continue in --output (default: the latest in runs/)"},
    },
}


def parse_options(argv: list[str]) -> argparse.Namespace:
    """The options, complete and checked; whatever is wrong ends the program here, before any work."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    for title, options in OPTIONS.items():
        group = parser.add_argument_group(title)
        for name, settings in options.items():
            group.add_argument(name, **settings)
    options = parser.parse_args(argv)
    try:
        output = choose_output(options.output, "finetune_lambada", resume=options.resume)
        saved = read_json(output / OPTIONS_FILE)["options"] if options.resume else {}
        parser.set_defaults(**saved)
        options = parser.parse_args([*argv, "--output", str(output)])
        complete_options(options)
        check_same_options(saved, vars(options))
        if not options.resume:
            check_sources(options)
    except ValueError as error:
        parser.error(str(error))
    return options


def complete_options(options: argparse.Namespace) -> None:
    """Fill in what was left out, and check what needs no file and no network."""
    import torch

    from trwkv.models import TemporalRwkvConfig

    is_scratch = options.base == "scratch"
    for name in (*SCRATCH_BASE, "base_train"):
        if not is_scratch and getattr(options, name) is not None:
            raise ValueError(
                f"--{name.replace('_', '-')}: only with --base scratch; got --base {options.base}"
            )
    for name, value in (SCRATCH_DEFAULTS | SCRATCH_BASE if is_scratch else DEFAULTS).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if is_scratch and options.base_train is None:
        options.base_train = "embedded-short" if options.train == "embedded" else options.train
    if options.tokenizer is None:
        if options.base.endswith(".pth"):
            raise ValueError(f"--base {options.base} brings no tokenizer: name one with --tokenizer")
        options.tokenizer = "bytes" if is_scratch else options.base
    for n_perspectives in options.perspectives:
        TemporalRwkvConfig(**perspective_settings(options, n_perspectives))
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here; use --device cpu")


def perspective_settings(options: argparse.Namespace, n_perspectives: int) -> dict[str, Any]:
    """What `TemporalRwkvConfig` and `from_rwkv4` have to know about the perspectives."""
    names = ("placement", "perspective_vectors", "aggregation", "fixed_weights")
    settings = {name: getattr(options, name) for name in (*names, "perspective_noise", "selector_noise")}
    if n_perspectives == 1 and options.fixed_weights is not None:
        settings["fixed_weights"] = [1.0]
    return settings | {"n_perspectives": n_perspectives}


def check_sources(options: argparse.Namespace) -> None:
    """Raise ValueError where the base, the text or a task is not here and cannot be fetched."""
    if options.base != "scratch" and not Path(options.base).exists():
        if not is_hub_id(options.base.rpartition("/")[0] if options.base.endswith(".pth") else options.base):
            raise ValueError(f'--base {options.base}: expected "scratch", a file or folder here, or a hub id')
        check_hub(f"--base {options.base}", 'the path of an RWKV-4 checkpoint, or "scratch"')
    for source in {options.train, options.base_train or options.train}:
        check_train_source(source)
    if tasks := [task for task in options.eval if task != "embedded"]:
        from trwkv.evaluate import check_tasks

        check_tasks(tasks)


@dataclass
class Run:
    """What every stage of the run needs."""

    options: argparse.Namespace
    device: str
    tokenizer: Any
    base_blocks: TokenBlocks | None
    train_blocks: TokenBlocks
    held_out: TokenBlocks
    tasks: list[str]


def read_blocks(
    options: argparse.Namespace, tokenizer: Any, source: str, steps: int
) -> tuple[TokenBlocks, TokenBlocks]:
    """The text to train on and a little that is held out; of what is made or downloaded, only what `steps` need."""
    max_tokens = MAX_TRAIN_TOKENS
    if is_hub_id(source) or source.startswith("embedded"):
        max_tokens = min(max_tokens, (steps * options.batch_size + HELD_OUT_BLOCKS) * options.context_length)
    settings = {"context_length": options.context_length, "max_tokens": max_tokens, "seed": options.seed}
    blocks = token_blocks(source, tokenizer, **settings)
    return blocks.split(min(HELD_OUT_BLOCKS, len(blocks) // 10 + 1), seed=options.seed)


def prepare(options: argparse.Namespace) -> Run:
    """Read the tokenizer, the text and the head of the base, then create the folder."""
    import torch

    from trwkv.convert import read_rwkv4
    from trwkv.synthetic import lambada_passages

    tokenizer = load_tokenizer(options.tokenizer)
    if options.base != "scratch":
        vocab_size = read_rwkv4(options.base).settings["vocab_size"]
        if len(tokenizer) > vocab_size:
            raise ValueError(
                f"--tokenizer {options.tokenizer}: expected at most the {vocab_size} tokens that "
                f"--base {options.base} knows, got {len(tokenizer)}"
            )
    train_blocks, held_out = read_blocks(options, tokenizer, options.train, options.steps)
    base_blocks = train_blocks
    if options.base == "scratch" and options.base_train != options.train:
        base_blocks, _ = read_blocks(options, tokenizer, options.base_train, options.base_steps)
    output = options.output
    output.mkdir(parents=True, exist_ok=True)
    kept = {name: value for name, value in vars(options).items() if name not in NOT_KEPT}
    if not options.resume:
        write_json(output / OPTIONS_FILE, {"command": options.command, "options": kept})
    embedded = output / "embedded.jsonl"
    if "embedded" in options.eval:
        rows = lambada_passages(EMBEDDED_PASSAGES, seed=options.seed, split="eval")
        embedded.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    print(
        f"{len(train_blocks):,} blocks of {options.context_length} tokens to train on; results go to {output}"
    )
    tasks = [str(embedded) if task == "embedded" else task for task in options.eval]
    return Run(options, device, tokenizer, base_blocks, train_blocks, held_out, tasks)


def fit(run: Run, model: Any, blocks: TokenBlocks, folder: Path, **settings: Any) -> dict[str, Any]:
    """Train the model in place; checkpoints go to `folder`."""
    from trwkv.training import train

    checkpoints, options = folder / "checkpoints", run.options
    common = {"batch_size": options.batch_size, "device": run.device, "bf16": options.bf16}
    return asdict(train(model, blocks, checkpoints, **common, **settings))


def train_base(run: Run) -> str:
    """Train a small RWKV-4 from scratch, unless that is done; returns its `from_rwkv4` source."""
    from transformers import set_seed

    from trwkv.models import TemporalRwkvConfig, TemporalRwkvForCausalLM

    options, folder = run.options, run.options.output / "base"
    if not (folder / "training.json").exists():
        set_seed(options.seed)
        config = TemporalRwkvConfig(
            vocab_size=len(run.tokenizer),
            hidden_size=options.hidden_size,
            num_hidden_layers=options.layers,
            context_length=options.context_length,
        )
        model = TemporalRwkvForCausalLM(config)
        print(f"\nBase: training an RWKV-4 of {model.num_parameters():,} parameters from scratch")
        settings = {"steps": options.base_steps, "learning_rate": options.base_learning_rate}
        result = fit(run, model, run.base_blocks, folder, **settings, seed=options.seed)
        model.to_rwkv4(folder / "base.pth")
        run.tokenizer.save_pretrained(folder)
        write_json(folder / "training.json", result)
    return str(folder / "base.pth")


def measure_base(run: Run, source: str) -> dict[str, Any]:
    """The base as it is, for comparison: a row of the results without training."""
    from trwkv.models import TemporalRwkvForCausalLM

    path = run.options.output / "base.json"
    if not path.exists():
        print("\nBase: evaluation before any fine-tuning")
        model = TemporalRwkvForCausalLM.from_rwkv4(source, dtype="float32")
        row = {"perspectives": "base", "trained_parameters": 0, "added_percent": 0.0}
        write_json(path, row | {"parameters": model.num_parameters()} | scores(run, model))
    return read_json(path)


def finetune(run: Run, source: str, n_perspectives: int) -> dict[str, Any]:
    """Fine-tune `n_perspectives` on the base and score the model, unless that is done; a row of the results."""
    from transformers import set_seed

    from trwkv.models import TemporalRwkvForCausalLM

    options, folder = run.options, run.options.output / f"p{n_perspectives}"
    if not (folder / "training.json").exists():
        set_seed(options.seed)
        settings = perspective_settings(options, n_perspectives)
        model = TemporalRwkvForCausalLM.from_rwkv4(source, dtype="float32", **settings)
        if options.train_parameters != "all":
            which = options.train_parameters
            model.freeze_base(train_head=which.endswith("+head"), train_vectors=which.startswith("vectors"))
        count = model.count_parameters()
        print(f"\nP = {n_perspectives}: fine-tuning {count.trainable:,} of {count.total:,} parameters")
        settings = {"steps": options.steps, "learning_rate": options.learning_rate}
        result = fit(run, model, run.train_blocks, folder, **settings, seed=options.seed + 1)
        model.save_pretrained(folder / "model")
        run.tokenizer.save_pretrained(folder / "model")
        row = {
            "perspectives": n_perspectives,
            "trained_parameters": count.trainable,
            "added_percent": count.added_percent,
            "parameters": count.total,
            "model": f"p{n_perspectives}/model",
        }
        write_json(folder / "training.json", row | result)
    if not (folder / "scores.json").exists():
        print(f"\nP = {n_perspectives}: evaluation")
        model = TemporalRwkvForCausalLM.from_pretrained(folder / "model")
        write_json(folder / "scores.json", scores(run, model))
    return read_json(folder / "training.json") | read_json(folder / "scores.json")


def scores(run: Run, model: Any) -> dict[str, Any]:
    """The loss on held-out text, and what lm-eval measures."""
    from trwkv.evaluate import evaluate
    from trwkv.training import held_out_loss

    options = run.options
    loss = held_out_loss(
        model, run.held_out, batch_size=options.batch_size, device=run.device, bf16=options.bf16
    )
    tasks = evaluate(
        model.to(run.device),
        run.tokenizer,
        run.tasks,
        batch_size=options.batch_size,
        limit=options.eval_limit,
        newline_prefix=options.newline_prefix,
    )
    return {"held_out_loss": loss, "tasks": tasks}


def report(run: Run, rows: list[dict[str, Any]], started: float) -> None:
    """Write results.json and loss.png, and print the table."""
    from trwkv.report import environment, plot_losses, results_table

    output = run.options.output
    results = {
        **read_json(output / OPTIONS_FILE),
        "environment": environment(run.device),
        "seconds_of_this_process": time.time() - started,
        "rows": rows,
    }
    base_training = output / "base" / "training.json"
    panels = {}
    if base_training.exists():
        results["base_training"] = read_json(base_training)
        panels["training the base"] = {"base": results["base_training"]["history"]}
    write_json(output / "results.json", results)
    panels["fine-tuning"] = {f"P = {row['perspectives']}": row["history"] for row in rows if "history" in row}
    plot_losses(output / "loss.png", panels, title="Training loss")

    print(f"\n{results_table(rows)}\n")
    print("loss: nats per token on held-out text; tokens/s and memory: of fine-tuning.")
    print(f"Results: {output}/results.json, {output}/loss.png, models in {output}/p*/model")


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    started = time.time()
    options = parse_options(argv)
    from transformers.utils import logging

    from trwkv.report import relative_command
    from trwkv.training import TrainingInterrupted

    options.command = relative_command(PROGRAM, argv)
    logging.disable_progress_bar()  # of saving; the Trainer and lm-eval show their own
    try:
        try:
            run = prepare(options)
        except (OSError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        source = train_base(run) if options.base == "scratch" else options.base
        rows = [measure_base(run, source)]
        rows += [finetune(run, source, n_perspectives) for n_perspectives in options.perspectives]
        report(run, rows, started)
    except (KeyboardInterrupt, TrainingInterrupted) as stop:
        print(f"\nStopped. {stop} What is done is kept; continue with --resume --output {options.output}")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
