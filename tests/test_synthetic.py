"""The generated passages and the byte-level tokenizer."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trwkv.synthetic import TARGETS, byte_tokenizer, lambada_passages


def test_last_word_occurs_once_before_and_early():
    for row in lambada_passages(500, seed=1):
        context, _, target = row["text"].rpartition(" ")
        sentences = context.split(". ")
        told = [f'"{target}"' in sentence for sentence in sentences]
        assert target in TARGETS
        assert 6 <= len(sentences) <= 11
        assert told.count(True) == 1 and True in told[:2] and not told[-1]


def test_no_other_target_is_named():
    for row in lambada_passages(500, seed=2):
        words = re.findall(r"\w+", row["text"])
        assert [word for word in words if word in TARGETS] == [words[-1]] * 2


def test_targets_are_uniform_and_distinct_in_their_first_letter():
    assert len({word[0] for word in TARGETS}) == len(TARGETS)
    targets = [row["text"].rpartition(" ")[2] for row in lambada_passages(4800)]
    counts = [targets.count(word) for word in TARGETS]
    assert sum(counts) == 4800
    assert all(130 < count < 280 for count in counts)  # 200 expected, standard deviation 14


@pytest.mark.parametrize("clue", [r"(\w+) \w+ the word", r"(\w+) the word", r"(\w+)$"])
def test_target_is_independent_of_what_else_is_said(clue):
    """Names and verbs: the best guess from one of them is hardly better than chance."""
    targets: dict[str, list[str]] = {}
    rows = lambada_passages(12000)
    for row in rows:
        context, _, target = row["text"].rpartition(" ")
        targets.setdefault(re.search(clue, context)[1], []).append(target)
    right = sum(max(found.count(word) for word in TARGETS) for found in targets.values())
    assert 2 <= len(targets) <= 20
    assert right / len(rows) < 1.5 / len(TARGETS)


def test_splits_differ_and_a_seed_repeats():
    train, evaluation = lambada_passages(20000), lambada_passages(1000, seed=1, split="eval")
    assert not {row["text"] for row in train} & {row["text"] for row in evaluation}
    assert lambada_passages(50) == train[:50]
    assert lambada_passages(50, seed=3) != train[:50]


def test_one_passage_is_the_same_on_every_machine():
    assert lambada_passages(1, seed=7)[0]["text"] == EXPECTED


EXPECTED = (
    'At noon it grew warm. Karin heard the word "lantern". The road was snowy. It was a rainy '
    "day. Nobody spoke. The crow and the wolf slept. The wolf and the wolf slept. Then she said "
    "lantern"
)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"n": 0}, "n: expected at least 1"),
        ({"n": 1, "split": "test"}, 'split: expected "train" or "eval"'),
        ({"n": 1, "n_fillers": (3, 2)}, "n_fillers: expected 0 <= least <= largest"),
    ],
)
def test_bad_arguments(arguments, named):
    with pytest.raises(ValueError, match=named):
        lambada_passages(**arguments)


TOKENIZER = byte_tokenizer()


@given(st.text())
@settings(derandomize=True, deadline=None)
def test_ids_are_the_utf8_bytes(text):
    ids = TOKENIZER(text).input_ids
    assert ids == list(text.encode())
    assert TOKENIZER.decode(ids) == text


def test_byte_tokenizer_loads_again(tmp_path):
    from transformers import AutoTokenizer

    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert len(loaded) == 256
    assert loaded.eos_token_id == loaded.pad_token_id == 0
    assert loaded("Ā\n a\0").input_ids == list("Ā\n a\0".encode())
