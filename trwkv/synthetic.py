"""Text that needs no download: LAMBADA-like passages and a byte-level tokenizer.

LAMBADA (Paperno et al. 2016) asks for the last word of a passage that people can guess only from the whole
passage. The passages made here have the same shape, in English simple enough for a model trained in
minutes: in an early sentence somebody hears or reads a word, sentences about other things follow, and the
closing sentence stops where she repeats it. Nothing but the early sentence tells which word it is, so a
model that forgets it can only guess.
"""

from __future__ import annotations

import random
import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["TARGETS", "byte_tokenizer", "lambada_passages"]


def _words(line: str) -> tuple[str, ...]:
    return tuple(line.split())


#: The words that can end a passage. Their first letters differ, so one byte decides which word it is.
TARGETS = _words(
    "apple basket candle drum engine flute globe hammer inkwell jar kettle lantern "
    "mirror needle organ piano quilt ribbon saddle trumpet umbrella violin whistle yarn"
)

_NAMES = _words("Ada Clara Elena Greta Irma Karin Mina Olga")
_WEATHER = _words("cold dark dry foggy grey mild rainy snowy still sunny warm windy")
_ANIMALS = _words("cat crow dog fox goat hen horse mouse sparrow wolf")
_TIMES = _words("dawn noon dusk night midnight")

_FACTS = (
    '{name} heard the word "{target}".',
    '{name} read the word "{target}".',
)
_FILLERS = (
    "It was a {weather} day.",
    "At {time} it grew {weather}.",
    "A {animal} ran by.",
    "The {animal} and the {animal2} slept.",
    "Nobody spoke.",
    "The road was {weather}.",
    "The letters came late.",
)
_CLOSINGS = (
    "Then she said {target}",
    "At last she wrote {target}",
)


def lambada_passages(
    n: int, *, seed: int = 0, split: str = "train", n_fillers: tuple[int, int] = (4, 8)
) -> list[dict[str, str]]:
    """Make `n` LAMBADA-like passages, each `{"text": passage}`; the last word is the target.

    The target is drawn uniformly from :data:`TARGETS`, independently of everything else in the passage, and
    occurs exactly twice: in the first or second sentence, and as the last word. Guessing without that
    sentence is right once in `len(TARGETS)` times, with a last-word perplexity of at least `len(TARGETS)`.

    Args:
        n: how many passages, at least 1.
        seed: the same `(seed, split, n_fillers)` gives the same passages, on every machine; more of them
            with larger `n`.
        split: "train" or "eval"; no passage is in both, whatever the seeds.
        n_fillers: least and largest number of sentences between the fact and the closing sentence.

    Raises:
        ValueError: `n`, `split` or `n_fillers` is out of its range.
    """
    if n < 1:
        raise ValueError(f"n: expected at least 1 passage, got {n}")
    if split not in ("train", "eval"):
        raise ValueError(f'split: expected "train" or "eval", got {split!r}')
    low, high = n_fillers
    if not 0 <= low <= high:
        raise ValueError(f"n_fillers: expected 0 <= least <= largest, got {n_fillers}")
    rng = random.Random(f"{split}-{seed}")
    return [{"text": _passage_of_split(rng, split, low, high)} for _ in range(n)]


def _passage_of_split(rng: random.Random, split: str, low: int, high: int) -> str:
    """The next passage that belongs to the split: a checksum gives one passage in eight to "eval"."""
    while True:
        passage = _passage(rng, low, high)
        if (zlib.crc32(passage.encode()) % 8 == 0) == (split == "eval"):
            return passage


def _passage(rng: random.Random, low: int, high: int) -> str:
    words = {"name": rng.choice(_NAMES), "target": rng.choice(TARGETS)}
    opening = [_filler(rng)] if rng.random() < 0.5 else []
    fillers = [_filler(rng) for _ in range(rng.randint(low, high))]
    fact = rng.choice(_FACTS).format(**words)
    closing = rng.choice(_CLOSINGS).format(**words)
    return " ".join([*opening, fact, *fillers, closing])


def _filler(rng: random.Random) -> str:
    return rng.choice(_FILLERS).format(
        weather=rng.choice(_WEATHER),
        animal=rng.choice(_ANIMALS),
        animal2=rng.choice(_ANIMALS),
        time=rng.choice(_TIMES),
    )


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer without a vocabulary file: the ids of a text are its UTF-8 bytes, 0..255.

    Byte 0 (NUL, which text does not contain) doubles as the end-of-text and padding token. It is an
    ordinary fast tokenizer of Hugging Face: it saves to `tokenizer.json` and loads again with
    `AutoTokenizer.from_pretrained`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    nul = "\0"
    vocab = {character: byte for byte, character in enumerate(_byte_characters())}
    del vocab[_byte_characters()[0]]
    vocab[nul] = 0
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=nul, pad_token=nul)


def _byte_characters() -> list[str]:
    """The visible character that the byte-level pre-tokenizer writes for each byte 0..255.

    Printable Latin-1 stands for itself; the others, in order, are U+0100 onwards.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
