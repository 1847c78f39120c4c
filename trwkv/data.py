"""Training text as token blocks, from files, the hub or the built-in generator; and tokenizers.

Files and hub datasets are read by Hugging Face `datasets`, as a stream: nothing is copied, and reading
stops at the number of tokens asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trwkv.synthetic import byte_tokenizer, lambada_passages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TokenBlocks", "check_hub", "check_train_source", "is_hub_id", "load_tokenizer", "token_blocks"]

EMBEDDED_PASSAGES = 20_000
# Sentences between a word and its repetition: a model trained on the short passages forgets it in the long ones.
_EMBEDDED_FILLERS = {"embedded": (4, 8), "embedded-short": (0, 2)}
_FILE_KINDS = {".txt": "text", ".jsonl": "json", ".json": "json"}
_BATCH_ROWS = 1000


class TokenBlocks(torch.utils.data.Dataset):
    """Blocks `[N, T]` of consecutive tokens as a dataset of int64 `{"input_ids": [T], "labels": [T]}`."""

    def __init__(self, blocks: np.ndarray):
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(self.blocks[index].astype(np.int64))
        return {"input_ids": ids, "labels": ids}

    def split(self, n_held_out: int, *, seed: int) -> tuple[TokenBlocks, TokenBlocks]:
        """All blocks but `n_held_out`, in a shuffled order, and those held out; fixed by `seed`."""
        if not 0 < n_held_out < len(self):
            raise ValueError(
                f"n_held_out: expected 1..{len(self) - 1} of {len(self)} blocks, got {n_held_out}"
            )
        order = np.random.default_rng(seed).permutation(len(self))
        return TokenBlocks(self.blocks[order[n_held_out:]]), TokenBlocks(self.blocks[order[:n_held_out]])


def token_blocks(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context_length: int,
    max_tokens: int,
    seed: int = 0,
) -> TokenBlocks:
    """Tokenize `source` and cut the token stream into blocks of `context_length`; a remainder is dropped.

    Args:
        source: "embedded" or "embedded-short" (generated passages, the short ones with a much shorter way
            between a word and its repetition), a file (`.txt`, one paragraph a line, or `.jsonl` with a "text"
            field; both also with `.gz`), several of them separated by commas, or a hub dataset, `owner/name` or
            `owner/name:configuration`, whose "train" split has a "text" column. Where a source consists of
            documents (files, rows of a jsonl file or a dataset, passages), the end-of-text token follows each.
        tokenizer: must have an end-of-text token.
        context_length: tokens per block.
        max_tokens: stop reading here.
        seed: of the embedded passages, and of the order of a hub dataset's documents.

    Raises:
        ValueError: `context_length` is less than 1, or the source cannot be read, has no text, or is shorter than two
            blocks.
    """
    if context_length < 1:
        raise ValueError(f"context_length: expected a whole number of at least 1; got {context_length}")
    check_train_source(source)
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer: expected one with an end-of-text token (eos_token), got one without")
    eos = tokenizer.eos_token_id
    parts, n_tokens = [], 0
    for texts, ends_document in _batches(source, seed):
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        ids = [[*row, eos] if end else row for row, end in zip(encoded, ends_document, strict=True)]
        parts.append(np.concatenate([np.asarray(row, dtype=np.int32) for row in ids]))
        n_tokens += len(parts[-1])
        if n_tokens >= max_tokens:
            break
    n_blocks = min(n_tokens, max_tokens) // context_length
    if n_blocks < 2:
        raise ValueError(
            f"training text {source}: expected at least 2 blocks of {context_length} tokens, "
            f"got {n_tokens} tokens"
        )
    return TokenBlocks(np.concatenate(parts)[: n_blocks * context_length].reshape(n_blocks, context_length))


def _batches(source: str, seed: int) -> Iterator[tuple[list[str], list[bool]]]:
    """Batches of texts, and for each text whether a document ends with it."""
    if source in _EMBEDDED_FILLERS:
        rows = lambada_passages(EMBEDDED_PASSAGES, seed=seed, n_fillers=_EMBEDDED_FILLERS[source])
        texts = [row["text"] for row in rows]
        for start in range(0, len(texts), _BATCH_ROWS):
            batch = texts[start : start + _BATCH_ROWS]
            yield batch, [True] * len(batch)
        return
    if is_hub_id(source):
        import datasets

        name, _, configuration = source.partition(":")
        rows = datasets.load_dataset(name, configuration or None, split="train", streaming=True)
        rows = rows.shuffle(seed=seed, buffer_size=_BATCH_ROWS)
        yield from _documents(rows.iter(batch_size=_BATCH_ROWS), source)
        return
    for path in source.split(","):
        kind = _file_kind(path)
        if kind == "json":
            yield from _documents(_file_batches(path, kind), path)
        else:
            for lines in _file_batches(path, kind):
                yield [line + "\n" for line in lines["text"]], [False] * len(lines["text"])
            yield [""], [True]


def _file_batches(path: str, kind: str | None) -> Iterator[dict[str, list[Any]]]:
    import datasets

    try:
        rows = datasets.load_dataset(kind, data_files=path, split="train", streaming=True)
        yield from rows.iter(batch_size=_BATCH_ROWS)
    except UnicodeDecodeError as error:
        raise ValueError(f"training text {path}: expected UTF-8; {error}") from error
    except StopIteration as error:  # load_dataset's, of a jsonl file without a row
        raise ValueError(f"training text {path}: expected text; the file has none") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"training text {path}: cannot be read: {error}") from error


def _documents(
    batches: Iterator[dict[str, list[Any]]], source: str
) -> Iterator[tuple[list[str], list[bool]]]:
    for batch in batches:
        if "text" not in batch:
            raise ValueError(f'training text {source}: expected a "text" field, got {", ".join(batch)}')
        if not all(isinstance(text, str) for text in batch["text"]):
            raise ValueError(f'training text {source}: expected text in every "text" field; one has none')
        yield batch["text"], [True] * len(batch["text"])


def _file_kind(path: str) -> str | None:
    """The `datasets` reader for a file of this name, or None if it is not named like a text file."""
    suffixes = Path(path).suffixes
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return _FILE_KINDS.get(suffixes[-1]) if suffixes else None


def is_hub_id(source: str) -> bool:
    """Whether `source`, not a local path, reads like a hub id: `owner/name`, perhaps `:configuration`."""
    name = source.partition(":")[0]
    parts = name.split("/")
    return (
        "," not in source
        and not Path(source).exists()
        and _file_kind(source) is None
        and len(parts) == 2
        and all(part and part.strip(".") for part in parts)
    )


def check_train_source(source: str) -> None:
    """Raise ValueError, saying what to do, if :func:`token_blocks` could not read `source` here."""
    if source in _EMBEDDED_FILLERS:
        return
    if is_hub_id(source):
        check_hub(source, '"embedded" or the path of a text file')
        return
    for path in source.split(","):
        if _file_kind(path) is None:
            raise ValueError(
                f'training text {path!r}: expected "embedded", .txt, .txt.gz, .jsonl or .jsonl.gz files '
                "separated by commas, or a hub dataset owner/name[:configuration]"
            )
        if not Path(path).is_file():
            raise ValueError(f"training text {path} does not exist")


def check_hub(what: str, instead: str) -> None:
    """Raise ValueError within seconds if the Hugging Face hub, which holds `what`, cannot be reached.

    With HF_HUB_OFFLINE=1 in the environment nothing is checked: then the libraries use the copies they have.
    """
    import huggingface_hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return
    try:
        huggingface_hub.get_session().head(constants.ENDPOINT, timeout=5)
    except Exception as error:
        raise ValueError(
            f"{what} has to come from the Hugging Face hub, which cannot be reached "
            f"({type(error).__name__}). Connect to a network, or set HF_HUB_OFFLINE=1 to use a copy "
            f"downloaded earlier, or give {instead}."
        ) from error


def check_vocabulary(tokenizer: Any, vocab_size: int) -> None:
    """Raises ValueError if the tokenizer has tokens for which a model of this size has no embedding."""
    if len(tokenizer) > vocab_size:
        raise ValueError(f"tokenizer: expected at most the model's {vocab_size} tokens; got {len(tokenizer)}")


def set_special_tokens(model: Any, tokenizer: Any) -> None:
    """Gives a model's two configurations the ids of the special tokens that the tokenizer has."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        token = getattr(tokenizer, name)
        if token is not None:
            setattr(model.config, name, token)
            setattr(model.generation_config, name, token)


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """A tokenizer with an end-of-text token.

    Args:
        source: "bytes" (:func:`trwkv.synthetic.byte_tokenizer`), a `tokenizer.json` file, a folder written by
            `save_pretrained`, or a hub id. A file that does not say which token ends a text, as that of the
            RWKV-4 Pile models does not, gets `<|endoftext|>`.

    Raises:
        ValueError: there is no such tokenizer, it cannot be read, or it has no end-of-text token.
    """
    if source == "bytes":
        return byte_tokenizer()
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = Path(source)
    if path.is_file():
        if path.suffix != ".json":
            is_world = path.name.startswith("rwkv_vocab")
            got = "a vocabulary of the World models, which is not read" if is_world else "another file"
            raise ValueError(f"tokenizer {source}: expected a tokenizer.json or a folder; got {got}")
        try:
            tokenizer: Any = PreTrainedTokenizerFast(tokenizer_file=str(path))
        except Exception as error:  # tokenizers raises no other
            raise ValueError(f"tokenizer {source}: expected a tokenizer.json; {error}") from error
    elif path.is_dir() and not any(path.glob("*token*")) and not any(path.glob("vocab*")):
        raise ValueError(f"tokenizer {source}: expected a folder with tokenizer.json; this one has none")
    elif path.is_dir() or is_hub_id(source):
        if not path.is_dir():
            check_hub(source, 'the path of a tokenizer.json file, or "bytes"')
        try:
            tokenizer = AutoTokenizer.from_pretrained(source)
        except Exception as error:  # of a broken file transformers raises whatever comes, a KeyError too
            raise ValueError(
                f"tokenizer {source}: cannot be loaded: {type(error).__name__}: {error}"
            ) from error
    else:
        raise ValueError(
            f'tokenizer {source!r}: expected "bytes", a tokenizer.json file, a folder that exists, '
            "or a hub id owner/name"
        )
    if tokenizer.eos_token_id is None:
        if "<|endoftext|>" not in tokenizer.get_vocab():
            raise ValueError(f"tokenizer {source}: expected an end-of-text token (eos_token), got none")
        tokenizer.eos_token = "<|endoftext|>"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
