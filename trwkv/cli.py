"""`trwkv`: convert, evaluate and run checkpoints from the command line.

    trwkv convert RWKV-4-Pile-169M.pth three-perspectives --perspectives 3 --tokenizer 20B_tokenizer.json
    trwkv eval --model three-perspectives --tasks lambada_openai,sciq
    trwkv generate --model three-perspectives --prompt "Once upon a time"
    trwkv lm-eval --model trwkv --model_args pretrained=three-perspectives --tasks sciq --num_fewshot 5

A model is a folder that `save_pretrained` or `trwkv convert` wrote, or any RWKV-4 checkpoint that `trwkv.convert`
reads: an official .pth, a file of rwkv.cpp, a Hugging Face folder, a hub id. Files have no tokenizer with them: name
one, as `convert` does here, or whenever it is needed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from trwkv.models import TemporalRwkvForCausalLM

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
DTYPES = ("float32", "bfloat16", "float16")
# how names of files end that are no folders (that of "RWKV-4-1.5" is one)
_FILE_SUFFIXES = (".safetensors", ".pt", ".ckpt", ".gguf", ".ggml", ".json", ".txt", ".zip")
_EXTRAS = {  # what brings the modules that a command imports
    **dict.fromkeys(("transformers", "tokenizers", "huggingface_hub", "safetensors", "accelerate"), "hf"),
    **dict.fromkeys(("lm_eval", "datasets"), "eval"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # lm-eval's options are for lm-eval's parser alone
    own, theirs = (arguments[:1], arguments[1:]) if arguments[:1] == ["lm-eval"] else (arguments, [])
    options = _parser().parse_args(own)
    options.theirs = theirs
    try:
        options.run(options)
    except (OSError, ValueError) as error:
        sys.exit(f"trwkv {options.command}: {error}")
    except ModuleNotFoundError as error:
        module = _missing_module(error)
        if module not in _EXTRAS:
            raise
        extra = f'pip install -e ".[{_EXTRAS[module]}]" in a clone of trwkv'
        sys.exit(f"trwkv {options.command}: needs {module}, which is not installed: {extra}")


def _missing_module(error: BaseException) -> str:
    """The package that is not there; transformers raises an error of its own from the one that names it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (getattr(error, "name", None) or "").partition(".")[0]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trwkv", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)

    convert = commands.add_parser("convert", help="RWKV-4 in and out, and perspectives added")
    convert.add_argument("source", help="a model, see `trwkv --help`")
    convert.add_argument(
        "target",
        type=Path,
        help="where to: official if it ends in .pth, rwkv.cpp's if in .bin, else a folder",
    )
    convert.add_argument("--perspectives", type=int, help="give an RWKV-4 checkpoint so many (default: 1)")
    convert.add_argument("--placement", choices=("layer", "stream"), help="where they are (default: layer)")
    convert.add_argument("--noise", type=float, help="sets them apart, relative to their size (default: 0)")
    convert.add_argument("--rwkv4", action="store_true", help="a folder for transformers' own RWKV-4 model")
    convert.add_argument(
        "--tokenizer",
        help="put into the folder: folder, tokenizer.json or hub id (default: the source's, if it has one)",
    )
    convert.add_argument("--dtype", choices=DTYPES, help="of the parameters (default: the checkpoint's)")
    convert.set_defaults(run=_convert)

    evaluate = commands.add_parser("eval", help="score on tasks of lm-eval or local LAMBADA-like files")
    _add_model(evaluate)
    evaluate.add_argument(
        "--tasks", required=True, help="comma-separated names of lm-eval tasks and .jsonl files"
    )
    evaluate.add_argument("--batch-size", type=int, default=8, help="(default: %(default)s)")
    evaluate.add_argument("--limit", type=int, help="only the first so many examples of each task")
    evaluate.add_argument("--newline-prefix", action="store_true", help="a line break before every context")
    evaluate.add_argument("--json", type=Path, help="write the results here")
    evaluate.set_defaults(run=_evaluate)

    generate = commands.add_parser("generate", help="continue a text, token by token as they come")
    _add_model(generate)
    generate.add_argument("--prompt", required=True)
    generate.add_argument("--max-new-tokens", type=int, default=200, help="(default: %(default)s)")
    generate.add_argument(
        "--temperature", type=_temperature, default=1.0, help="0 is greedy (default: %(default)s)"
    )
    generate.add_argument("--top-p", type=_top_p, default=0.9, help="(default: %(default)s)")
    generate.add_argument("--seed", type=int, help="makes sampling repeatable")
    generate.set_defaults(run=_generate)

    harness = commands.add_parser(
        "lm-eval", help="lm-eval's own command line, which takes all that follows; its model `trwkv` is ours"
    )
    harness.set_defaults(run=_harness)
    return parser


def _top_p(text: str) -> float:
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0 and up to 1; got {text}")
    return float(text)


def _temperature(text: str) -> float:
    if not 0 <= float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of at least 0; got {text}")
    return float(text)


def _device(text: str) -> torch.device:
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:  # the latter from PyTorch built without CUDA
        raise argparse.ArgumentTypeError(f"{text} cannot be used: {error}") from error


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="see `trwkv --help`")
    parser.add_argument("--tokenizer", help="folder, tokenizer.json or hub id (default: the model's folder)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the parameters (default: the checkpoint's)")
    parser.add_argument(
        "--device",
        type=_device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="(default: %(default)s)",
    )


def load_model(source: str, dtype: str | None = None, **options: Any) -> TemporalRwkvForCausalLM:
    """A model of this package, or an RWKV-4 checkpoint as one; `options` are those of `from_rwkv4`, for the latter.

    Raises: as `from_rwkv4` and `from_pretrained`; ValueError for options that a model of this package cannot take.
    """
    from trwkv.models import TemporalRwkvConfig, TemporalRwkvForCausalLM

    config = Path(source, "config.json")
    is_ours = config.is_file() and f'"{TemporalRwkvConfig.model_type}"' in config.read_text(encoding="utf-8")
    if not is_ours:
        return TemporalRwkvForCausalLM.from_rwkv4(source, dtype=dtype, **options)
    if options:
        raise ValueError(
            f"{source} is a model of this package, whose perspectives are what they are; expected no "
            f"{', '.join(options)} (a model of one perspective can be converted to .pth first)"
        )
    return TemporalRwkvForCausalLM.from_pretrained(source, dtype=dtype or "auto")


def _convert(options: argparse.Namespace) -> None:
    _check_target(options)
    is_file = options.rwkv4 or options.target.suffix in (".pth", ".bin")
    if is_file and options.tokenizer:
        raise ValueError(f"--tokenizer: only for a folder of this package; the target is {options.target}")
    wanted = {
        "n_perspectives": options.perspectives,
        "placement": options.placement,
        "perspective_noise": options.noise,
    }
    model = load_model(
        options.source, options.dtype, **{name: x for name, x in wanted.items() if x is not None}
    )
    if is_file:
        model.to_rwkv4(options.target)
    else:
        save_tokenizer = _tokenizer_of(options, model)
        model.save_pretrained(options.target)
        save_tokenizer(options.target)
    count = model.count_parameters()
    print(f"{options.target}: {count.total:,} parameters, of which perspectives add {count.added:,}")


def _check_target(options: argparse.Namespace) -> None:
    """Raise ValueError where the target would replace the source, or is a file for a folder or the other way round."""
    source, target = Path(options.source), options.target
    if source.exists() and source.resolve() in (target.resolve(), (target / "model.safetensors").resolve()):
        raise ValueError(
            f"target: expected another place than the source, which it would replace; got {target}"
        )
    if target.suffix in (".pth", ".bin"):
        if target.is_dir():
            raise ValueError(f"{target}: expected a file, as it ends in {target.suffix}; it is a folder")
    elif target.is_file():
        raise ValueError(f"{target}: expected a folder, or a name that ends in .pth or .bin; it is a file")
    elif target.suffix in _FILE_SUFFIXES and not target.is_dir():
        raise ValueError(f"{target}: expected the name of a folder, or one that ends in .pth or .bin")


def _tokenizer_of(options: argparse.Namespace, model: TemporalRwkvForCausalLM) -> Callable[[Path], Any]:
    """What puts the tokenizer into a folder: that of --tokenizer, else the source's, else a word that there is none.

    The model's configurations get the ids of its special tokens.
    """
    from trwkv.data import is_hub_id, load_tokenizer, set_special_tokens

    if options.tokenizer:
        tokenizer = load_tokenizer(options.tokenizer)
        set_special_tokens(model, tokenizer)
        return tokenizer.save_pretrained
    folder = Path(options.source)
    if is_hub_id(options.source):
        from huggingface_hub import constants, snapshot_download

        offline = constants.HF_HUB_OFFLINE
        patterns = list(TOKENIZER_FILES)
        folder = Path(snapshot_download(options.source, allow_patterns=patterns, local_files_only=offline))
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if folder / "tokenizer.json" in files:
        try:
            set_special_tokens(model, load_tokenizer(str(folder)))
        except ValueError as error:
            print(f"{error}; the ids of special tokens stay those of {options.source}")

    def copy(target: Path) -> None:
        for file in files:
            (target / file.name).write_bytes(file.read_bytes())
        if not files:
            print(f"{options.source} has no tokenizer: name one with --tokenizer, here or in what comes next")

    return copy


def _evaluate(options: argparse.Namespace) -> None:
    from trwkv.data import load_tokenizer
    from trwkv.evaluate import check_tasks, evaluate
    from trwkv.report import format_table

    tasks = options.tasks.split(",")
    check_tasks(tasks)
    if options.json and not options.json.absolute().parent.is_dir():
        raise ValueError(f"--json: expected a file in a folder that exists; got {options.json}")
    model = load_model(options.model, options.dtype).to(options.device)
    results = evaluate(
        model,
        load_tokenizer(options.tokenizer or options.model),
        tasks,
        batch_size=options.batch_size,
        limit=options.limit,
        newline_prefix=options.newline_prefix,
    )
    rows = [(task, name, x) for task, metrics in results.items() for name, x in metrics.items()]
    print(format_table(("task", "metric", "value"), rows))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def _harness(options: argparse.Namespace) -> None:
    from trwkv.harness import run_harness

    run_harness(options.theirs)


def _generate(options: argparse.Namespace) -> None:
    from transformers import TextStreamer, set_seed

    from trwkv.data import check_vocabulary, load_tokenizer

    model = load_model(options.model, options.dtype).to(options.device).eval()
    tokenizer = load_tokenizer(options.tokenizer or options.model)
    check_vocabulary(tokenizer, model.config.vocab_size)
    prompt = tokenizer(options.prompt, return_tensors="pt").to(options.device)
    if not prompt["input_ids"].shape[1]:
        raise ValueError("--prompt: expected at least one token; got none")
    if options.seed is not None:
        set_seed(options.seed)
    sampling = (
        {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p}
        if options.temperature > 0
        else {"do_sample": False}
    )
    start = time.perf_counter()
    tokens = model.generate(
        prompt["input_ids"],
        streamer=TextStreamer(tokenizer),
        max_new_tokens=options.max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **sampling,
    )
    seconds = time.perf_counter() - start
    n = tokens.shape[1] - prompt["input_ids"].shape[1]
    print(f"{n} tokens in {seconds:.1f} s, {n / seconds:.0f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    main()
