"""A study of `reproduce.py`: its configuration file, its texts, and one run of one cell."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from filelock import FileLock
from transformers import TrainerCallback, set_seed

import reproduce_measures as measures
from throughput_run import commit
from trwkv.data import TokenBlocks, load_tokenizer, token_blocks
from trwkv.models import TemporalRwkvConfig, TemporalRwkvForCausalLM
from trwkv.runs import check_same_options, read_json, write_json
from trwkv.training import train

STANDARD_LIBRARY = "standard library"
HELD_OUT_EVERY = 20
DIVERSITY_MEASUREMENTS = 10
DIVERSITY_TOKENS = 256


@dataclass(frozen=True)
class Cell:
    """One row of the study: what differs from the default, P = 3 inside each time mixing."""

    name: str
    start: str  # "from_scratch" or "upcycled"
    steps: int
    batch_size: int
    context_length: int
    learning_rate: float
    vector_learning_rate: float | None = None
    control: str | None = None
    text: str = "novels"
    n_perspectives: int = 3
    placement: str = "layer"
    perspective_vectors: list[str] | None = None
    aggregation: str = "selector"
    fixed_weights: list[float] | None = None
    perspective_noise: float = 0.1
    selector_noise: float = 0.0
    train_head: bool = False
    train_vectors: bool = False

    def perspectives(self) -> dict[str, Any]:
        """The options of `TemporalRwkvConfig` and `from_rwkv4`."""
        names = ("n_perspectives", "placement", "perspective_vectors", "aggregation", "fixed_weights")
        return {name: getattr(self, name) for name in (*names, "perspective_noise", "selector_noise")}

    @property
    def base(self) -> str:
        return "base" if self.text == "novels" else f"base-{self.text}"


@dataclass(frozen=True)
class Study:
    """A configuration file, read."""

    tokenizer: str
    model: dict[str, Any]
    texts: dict[str, Any]
    also_measured: dict[str, str]
    lambada: str
    seeds: list[int]
    evaluation: dict[str, int]
    tables: dict[str, list[str]]
    cells: dict[str, Cell] = field(repr=False)

    @classmethod
    def read(cls, path: Path) -> Study:
        """Raises ValueError where the file does not say what it should."""
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        cells = {}
        try:
            for start, defaults in (("from_scratch", "pretraining"), ("upcycled", "finetuning")):
                common = content.pop(defaults)
                for name, options in content.pop(start).items():
                    cells[name] = Cell(name=name, start=start, **(common | options))
            study = cls(cells=cells, **content)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from None
        for cell in cells.values():
            TemporalRwkvConfig(**cell.perspectives())
            needed = [cell.control] if cell.control else []
            for name in needed + ([cell.base] if cell.start == "upcycled" else []):
                if name not in cells:
                    raise ValueError(f"{path}: cell {cell.name} needs a cell {name}, which is not there")
            if cell.text not in study.texts:
                raise ValueError(f"{path}: cell {cell.name} needs a text {cell.text}, which is not there")
        for name, listed in study.tables.items():
            if missing := set(listed) - set(cells):
                raise ValueError(
                    f"{path}: table {name} lists {', '.join(sorted(missing))}, which are not there"
                )
        return study

    def common(self) -> dict[str, Any]:
        """What all runs of a study share, and what is kept of one is of no use without."""
        names = ("tokenizer", "model", "texts", "also_measured", "lambada", "evaluation")
        return {name: getattr(self, name) for name in names}

    def jobs(self) -> Iterator[tuple[Cell, int]]:
        """All runs: the upcycled cells seed by seed, so that whoever stops early has whole seeds; then those from
        scratch, the dearest, cell by cell in the order of the file."""
        cells = self.cells.values()
        for seed in self.seeds:
            yield from ((cell, seed) for cell in cells if cell.start == "upcycled")
        for cell in cells:
            if cell.start == "from_scratch":
                yield from ((cell, seed) for seed in self.seeds)


class Texts:
    """The token blocks of a study; each text is read once and kept as an array in `folder`."""

    def __init__(self, study: Study, data: Path, folder: Path) -> None:
        self.study, self.data, self.folder = study, data, folder
        self.tokenizer = load_tokenizer(study.tokenizer)

    def blocks(self, text: str, part: str, context_length: int) -> TokenBlocks:
        """The blocks of a text, in its order; `part` is "train" or "held_out"."""
        tokens = self._tokens(text, part)
        n = len(tokens) // context_length
        return TokenBlocks(tokens[: n * context_length].reshape(n, context_length))

    def spread(self, text: str, part: str, context_length: int, n: int) -> TokenBlocks:
        """`n` blocks spread evenly over the text."""
        blocks = self.blocks(text, part, context_length).blocks
        return TokenBlocks(blocks[np.linspace(0, len(blocks) - 1, min(n, len(blocks))).astype(int)])

    @cache  # noqa: B019 (lives as long as the program)
    def _tokens(self, text: str, part: str) -> np.ndarray:
        path = self.folder / f"{text}-{part}.npy"
        with FileLock(self.folder / "texts.lock"):
            if not path.exists():
                blocks = token_blocks(
                    self._source(text, part), self.tokenizer, context_length=256, max_tokens=1 << 40
                )
                unfinished = path.with_suffix(".part.npy")
                kind = np.uint16 if len(self.tokenizer) <= 1 << 16 else np.uint32
                np.save(unfinished, blocks.blocks.reshape(-1).astype(kind))
                unfinished.replace(path)
        return np.load(path, mmap_mode="r")

    def _source(self, text: str, part: str) -> str:
        where = self.study.texts.get(text) or {"held_out": self.study.also_measured[text]}
        if where != STANDARD_LIBRARY:
            return str(self.data / where[part])
        return standard_library(self.folder, part)


def standard_library(folder: Path, part: str) -> str:
    """Python's own modules as jsonl in `folder`, one file a document: every 20th is held out."""
    path = folder / f"standard-library-{part}.jsonl"
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
    files = [x for x in files if not {"site-packages", "test", "tests", "idlelib"} & set(x.parts)]
    kept = [x for i, x in enumerate(files) if (i % HELD_OUT_EVERY == 0) == (part == "held_out")]
    documents = (x.read_text(encoding="utf-8", errors="replace") for x in kept)
    path.write_text("".join(json.dumps({"text": x}) + "\n" for x in documents if x.strip()), encoding="utf-8")
    return str(path)


class FollowDiversity(TrainerCallback):
    """Notes, as training goes on, how far apart the perspectives are."""

    def __init__(self, path: Path, blocks: TokenBlocks) -> None:
        self.path, self.input_ids = path, blocks[0]["input_ids"][None, :DIVERSITY_TOKENS]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        every = max(1, state.max_steps // DIVERSITY_MEASUREMENTS)
        if state.global_step == 1 or state.global_step % every == 0:
            self.note(kwargs["model"], state.global_step)

    def note(self, model: TemporalRwkvForCausalLM, step: int) -> None:
        known = read_json(self.path)["steps"] if self.path.exists() else []
        known = [row for row in known if row["step"] < step]  # a continued run repeats some
        row = measures.diversity(model, self.input_ids.to(model.device))
        write_json(self.path, {"steps": [*known, {"step": step, **row}]})


@dataclass(frozen=True)
class Runner:
    """Runs cells of a study, each in a folder of its own."""

    study: Study
    texts: Texts
    folder: Path
    device: str
    bf16: bool

    def place(self, name: str, seed: int) -> Path:
        return self.folder / name / f"seed{seed}"

    def check(self, cell: Cell, seed: int) -> None:
        """Raise ValueError if the cell's folder holds a run of other settings than it has now."""
        path = self.place(cell.name, seed) / "cell.json"
        if path.exists():
            check_same_options(
                read_json(path),
                self._settings(cell),
                f"{path.parent}: a run of another configuration is there",
            )

    def _settings(self, cell: Cell) -> dict[str, Any]:
        return asdict(cell) | {"bf16": self.bf16} | self.study.common()

    def run(self, cell: Cell, seed: int) -> None:
        """Train and measure; continues what an earlier run of it left unfinished.

        Raises:
            TrainingInterrupted: a signal came; a checkpoint is written.
        """
        place = self.place(cell.name, seed)
        place.mkdir(parents=True, exist_ok=True)
        write_json(place / "cell.json", self._settings(cell))
        if not (place / "training.json").exists():
            self._train(cell, seed, place)
        model = TemporalRwkvForCausalLM.from_pretrained(place / "model").to(self.device)
        scores = self._measure(model, cell)
        diversity = read_json(place / "diversity.json")["steps"] if cell.n_perspectives > 1 else []
        write_json(
            place / "result.json",
            {"cell": cell.name, "seed": seed, **read_json(place / "training.json"), **scores}
            | {"diversity": diversity},
        )

    def _train(self, cell: Cell, seed: int, place: Path) -> None:
        model = self._start(cell, seed)
        count = model.count_parameters()
        callbacks = []
        if cell.n_perspectives > 1:
            held_out = self.texts.blocks(cell.text, "held_out", cell.context_length)
            callbacks.append(FollowDiversity(place / "diversity.json", held_out))
        result = train(
            model,
            self.texts.blocks(cell.text, "train", cell.context_length),
            place / "checkpoints",
            steps=cell.steps,
            batch_size=cell.batch_size,
            learning_rate=cell.learning_rate,
            vector_learning_rate=cell.vector_learning_rate,
            seed=seed + (cell.start == "upcycled") * 1000,
            device=self.device,
            bf16=self.bf16,
            callbacks=callbacks,
        )
        model.save_pretrained(place / "model")
        if cell.name == cell.base:
            model.to_rwkv4(place / "base.pth")
        parameters = {"total": count.total, "added": count.added, "trained": count.trainable}
        row = {"commit": commit(), "parameters": parameters, "training": asdict(result)}
        write_json(place / "training.json", row)

    def _start(self, cell: Cell, seed: int) -> TemporalRwkvForCausalLM:
        """The model of a cell before its training."""
        set_seed(seed)
        if cell.start == "from_scratch":
            settings = {"vocab_size": len(self.texts.tokenizer), "context_length": cell.context_length}
            return TemporalRwkvForCausalLM(
                TemporalRwkvConfig(**self.study.model, **settings, **cell.perspectives())
            )
        base = self.place(cell.base, seed) / "base.pth"
        model = TemporalRwkvForCausalLM.from_rwkv4(base, dtype="float32", **cell.perspectives())
        return model.freeze_base(train_head=cell.train_head, train_vectors=cell.train_vectors)

    def cost(self, cell: Cell) -> dict[str, Any]:
        """Speed and memory of training a cell, forward and backward, the fastest of a few steps."""
        model = self._start(cell, self.study.seeds[0]).to(self.device).train()
        blocks = self.texts.spread(cell.text, "held_out", cell.context_length, cell.batch_size)
        return measures.training_cost(model, blocks, bf16=self.bf16)

    def _measure(self, model: TemporalRwkvForCausalLM, cell: Cell) -> dict[str, Any]:
        sizes, spread = self.study.evaluation, self.texts.spread
        short = {"context_length": sizes["context_length"], "n": sizes["blocks"]}
        long = {"context_length": sizes["long_context_length"], "n": sizes["long_blocks"]}
        settings = {"tokenizer": self.texts.tokenizer, "bf16": self.bf16}
        losses = {
            "held_out": measures.block_losses(model, spread(cell.text, "held_out", **short), **settings),
            **{
                name: measures.block_losses(model, spread(name, "held_out", **short), **settings)
                for name in self.study.also_measured
            },
        }
        return {
            "bits_per_byte": losses,
            "by_position": measures.position_losses(
                model, spread(cell.text, "held_out", **long), bf16=self.bf16
            ),
            "lambada": measures.lambada(
                model, self.texts.tokenizer, self.texts.data / self.study.lambada, sizes["lambada"]
            ),
        }
