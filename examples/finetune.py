"""Fine-tune perspectives, a LoRA, both or everything with Hugging Face's Trainer; options from a file or the shell.

    python examples/finetune.py examples/finetune.yaml
    python examples/finetune.py examples/finetune.yaml --lora_rank 8 --learning_rate 1e-3
    torchrun --nproc-per-node 2 examples/finetune.py examples/finetune.yaml

The file needs no network and some seconds on a CPU. Its names are those of the command line, where all of Trainer's
own options (TrainingArguments) are too: report_to, bf16, gradient_accumulation_steps, resume_from_checkpoint, fsdp,
deepspeed and so on. What the command line says comes before what the file says. `--resume_from_checkpoint latest`
continues a run that was stopped.

The output folder gets `model`, which loads with `TemporalRwkvForCausalLM.from_pretrained` (with a LoRA: merged into
it), with a LoRA also `adapter` (PEFT's, and perspectives.safetensors), and Trainer's metrics and checkpoints.
"""

import argparse
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml
from transformers import HfArgumentParser, Trainer, TrainingArguments, set_seed

from trwkv.adapters import PerspectiveCheckpoints, save_perspectives
from trwkv.cli import load_model
from trwkv.data import TokenBlocks, check_vocabulary, load_tokenizer, token_blocks
from trwkv.models import TemporalRwkvConfig, TemporalRwkvForCausalLM
from trwkv.training import parameter_groups

TIME_MIXING = r".*\.att\.(key|value|receptance|output)"
BOTH_MIXINGS = r".*\.(att|ffn)\.(key|value|receptance|output)"


@dataclass
class ModelArguments:
    base: str = field(
        default="scratch",
        metadata={"help": '"scratch" (a small new model), an RWKV-4 .pth, a folder or a hub id'},
    )
    hidden_size: int = field(default=64, metadata={"help": "of a model from scratch"})
    num_hidden_layers: int = field(default=2, metadata={"help": "of a model from scratch"})
    n_perspectives: int | None = field(
        default=None, metadata={"help": "P; nothing for a base that has its perspectives already"}
    )
    placement: Literal["layer", "stream"] | None = field(
        default=None, metadata={"help": "layer if not given"}
    )
    aggregation: Literal["selector", "learned", "mean"] | None = field(
        default=None, metadata={"help": "selector if not given"}
    )
    perspective_noise: float | None = field(
        default=None, metadata={"help": "sets the perspectives apart at the start, such as 0.1"}
    )
    train_parameters: (
        Literal["vectors", "vectors+head", "perspectives", "perspectives+head", "all"] | None
    ) = field(
        default=None,
        metadata={
            "help": "vectors: all seven of every block, and the selectors; perspectives: not those they share "
            "(if not given: vectors, but all of a model from scratch without a LoRA)"
        },
    )
    vector_learning_rate: float | None = field(
        default=None, metadata={"help": "of vectors and selectors; learning_rate if not given"}
    )
    lora_rank: int = field(
        default=0, metadata={"help": "above 0: train a LoRA of this rank too (needs peft)"}
    )
    lora_alpha: float = field(default=16.0, metadata={"help": "the LoRA is scaled by lora_alpha / lora_rank"})
    lora_channel_mixing: bool = field(
        default=False, metadata={"help": "on the channel mixing's matrices too"}
    )

    def __post_init__(self) -> None:
        is_new = self.base == "scratch" and not self.lora_rank
        if self.train_parameters is None:
            self.train_parameters = "all" if is_new else "vectors"
        if is_new and self.train_parameters != "all":
            raise ValueError(
                "train_parameters: expected all for a base from scratch, whose time mixing starts from zero matrices: "
                f"while these are frozen no vector has a gradient; got {self.train_parameters}"
            )


@dataclass
class DataArguments:
    train: str = field(
        default="embedded",
        metadata={"help": '"embedded", .txt or .jsonl files separated by commas, or a hub dataset'},
    )
    tokenizer: str | None = field(
        default=None,
        metadata={"help": '"bytes", a tokenizer.json, a folder or a hub id; else that of the base'},
    )
    context_length: int = field(default=1024, metadata={"help": "tokens per sequence"})
    max_tokens: int = field(default=10_000_000, metadata={"help": "read so much of the text"})
    held_out_blocks: int = field(default=16, metadata={"help": "sequences to evaluate on, not trained on"})


def parse(arguments: list[str]) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """Options of a .yaml or .json file, if the first argument names one, and of the command line after it."""
    kinds = (ModelArguments, DataArguments, TrainingArguments)
    parser = HfArgumentParser(
        kinds,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if arguments and arguments[0].endswith((".yaml", ".yml", ".json")):
        file, *arguments = arguments
        options = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        if not isinstance(options, dict):
            raise ValueError(f"{file}: expected options as `name: value`; got {type(options).__name__}")
        known = {option.name for kind in kinds for option in fields(kind) if option.init}
        if unknown := sorted(set(options) - known):
            raise ValueError(f"{file}: unknown options {', '.join(unknown)}")
        for option in parser._actions:  # argparse checks no default
            value = options.get(option.dest)
            if option.choices and value is not None and str(value) not in map(str, option.choices):
                raise ValueError(
                    f"{file}: {option.dest}: expected one of {', '.join(map(str, option.choices))}; got {value!r}"
                )
        parser.set_defaults(**options)  # text is still parsed: YAML takes 1e-3 for text
    return parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)


def make_model(options: ModelArguments, data: DataArguments, tokenizer: Any) -> TemporalRwkvForCausalLM:
    """The model, with its base frozen or not."""
    names = ("n_perspectives", "placement", "aggregation", "perspective_noise")
    wanted = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.base == "scratch":
        sizes = {"hidden_size": options.hidden_size, "num_hidden_layers": options.num_hidden_layers}
        config = TemporalRwkvConfig(
            vocab_size=len(tokenizer), context_length=data.context_length, **sizes, **wanted
        )
        model = TemporalRwkvForCausalLM(config)
    else:
        model = load_model(options.base, "float32", **wanted)
    check_vocabulary(tokenizer, model.config.vocab_size)
    if options.train_parameters != "all":
        which = options.train_parameters
        model.freeze_base(train_head=which.endswith("+head"), train_vectors=which.startswith("vectors"))
    return model


def with_lora(model: TemporalRwkvForCausalLM, options: ModelArguments) -> Any:
    """PEFT's model around `model`; the vectors that trained still do."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ValueError("lora_rank: needs peft; pip install peft") from error
    if options.train_parameters == "all":
        raise ValueError(
            "train_parameters: expected vectors or perspectives, +head or not, with a LoRA; got all"
        )
    lora = LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.lora_alpha,
        target_modules=BOTH_MIXINGS if options.lora_channel_mixing else TIME_MIXING,
        modules_to_save=["head"] if options.train_parameters.endswith("+head") else None,
        task_type="CAUSAL_LM",
    )
    vectors = [parameter for _, parameter in model.vector_parameters() if parameter.requires_grad]
    peft_model = get_peft_model(model, lora)
    for parameter in vectors:
        parameter.requires_grad_(True)
    return peft_model


def read_blocks(data: DataArguments, tokenizer: Any, seed: int) -> tuple[TokenBlocks, TokenBlocks]:
    settings = {"context_length": data.context_length, "max_tokens": data.max_tokens}
    blocks = token_blocks(data.train, tokenizer, **settings, seed=seed)
    return blocks.split(data.held_out_blocks, seed=seed)


class GroupsTrainer(Trainer):
    """Trainer, with weight decay for matrices alone, and a learning rate for the vectors if one is given."""

    vector_learning_rate: float | None = None

    def create_optimizer(self, model: Any = None) -> Any:
        optimizer, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        groups = parameter_groups(
            self.model if model is None else model,
            learning_rate=self.args.learning_rate,
            vector_learning_rate=self.vector_learning_rate,
            weight_decay=self.args.weight_decay,
        )
        self.optimizer = optimizer(groups, **settings)
        return self.optimizer


def finetune(options: ModelArguments, data: DataArguments, training: TrainingArguments) -> None:
    if options.lora_rank and (training.fsdp or training.deepspeed):
        raise ValueError(
            "lora_rank: expected 0 with fsdp or deepspeed, which shard the perspectives that are saved"
        )
    set_seed(training.seed)
    training._n_gpu = min(training.n_gpu, 1)  # several are for torchrun: DataParallel cannot gather a state
    tokenizer = load_tokenizer(data.tokenizer or ("bytes" if options.base == "scratch" else options.base))
    model: Any = make_model(options, data, tokenizer)
    if options.lora_rank:
        model = with_lora(model, options)
    train_blocks, held_out = read_blocks(data, tokenizer, training.seed)
    trainer = GroupsTrainer(
        model=model,
        args=training,
        train_dataset=train_blocks,
        eval_dataset=held_out,
        processing_class=tokenizer,
        callbacks=[PerspectiveCheckpoints()] if options.lora_rank else None,
    )
    trainer.vector_learning_rate = options.vector_learning_rate
    latest = training.resume_from_checkpoint == "latest"
    metrics = trainer.train(resume_from_checkpoint=latest or training.resume_from_checkpoint).metrics
    trainer.save_metrics("train", metrics)
    trainer.save_metrics("eval", trainer.evaluate())
    save(trainer, Path(training.output_dir))


def save(trainer: Trainer, output: Path) -> None:
    """The model; with a LoRA also the adapter and the perspectives by themselves."""
    model: Any = trainer.model
    if isinstance(model, TemporalRwkvForCausalLM):
        trainer.save_model(str(output / "model"))
    elif trainer.is_world_process_zero():
        model.save_pretrained(output / "adapter")
        save_perspectives(model, output / "adapter")
        model.merge_and_unload().save_pretrained(output / "model")
        trainer.processing_class.save_pretrained(output / "model")
    if trainer.is_world_process_zero():
        print(f"The model is in {output / 'model'}")


def main(arguments: list[str]) -> int:
    try:
        finetune(*parse(arguments))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
