"""Training text as token blocks."""

import gzip
import json

import numpy as np
import pytest

from trwkv.data import TokenBlocks, check_train_source, is_hub_id, load_tokenizer, token_blocks
from trwkv.synthetic import byte_tokenizer

TOKENIZER = byte_tokenizer()


def read_back(blocks):
    return bytes(blocks.blocks.reshape(-1).tolist())


def test_text_and_jsonl_files_and_where_documents_end(tmp_path):
    text, packed, rows = tmp_path / "a.txt", tmp_path / "b.txt.gz", tmp_path / "c.jsonl"
    text.write_text("one\ntwö\n")
    with gzip.open(packed, "wt") as file:
        file.write("three\n")
    rows.write_text("".join(json.dumps({"text": word}) + "\n" for word in ("four\nfive", "six")))
    source = f"{text},{packed},{rows}"
    whole = "one\ntwö\n\0three\n\0four\nfive\0six\0".encode()
    blocks = token_blocks(source, TOKENIZER, context_length=4, max_tokens=1000)
    assert blocks.blocks.shape == (len(whole) // 4, 4)
    assert read_back(blocks) == whole[: len(whole) // 4 * 4]
    assert read_back(token_blocks(source, TOKENIZER, context_length=4, max_tokens=9)) == whole[:8]


def test_embedded_passages():
    blocks = token_blocks("embedded", TOKENIZER, context_length=64, max_tokens=6400, seed=3)
    assert len(blocks) == 100
    assert b"\0" in read_back(blocks) and b"heard the word" in read_back(blocks)
    again = token_blocks("embedded", TOKENIZER, context_length=64, max_tokens=6400, seed=3)
    other = token_blocks("embedded", TOKENIZER, context_length=64, max_tokens=6400, seed=4)
    assert np.array_equal(blocks.blocks, again.blocks) and not np.array_equal(blocks.blocks, other.blocks)
    short = read_back(token_blocks("embedded-short", TOKENIZER, context_length=64, max_tokens=6400))
    assert short.count(b"\0") > 1.5 * read_back(blocks).count(b"\0")


def test_split_keeps_every_block_once():
    blocks = TokenBlocks(np.arange(40, dtype=np.int32).reshape(10, 4))
    train, held_out = blocks.split(3, seed=1)
    assert (len(train), len(held_out)) == (7, 3)
    together = sorted([*train.blocks[:, 0].tolist(), *held_out.blocks[:, 0].tolist()])
    assert together == blocks.blocks[:, 0].tolist()
    assert train[0]["input_ids"].tolist() == train[0]["labels"].tolist() == train.blocks[0].tolist()
    with pytest.raises(ValueError, match=r"n_held_out: expected 1\.\.9"):
        blocks.split(10, seed=1)


def test_errors(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"words": "a"}\n')
    with pytest.raises(ValueError, match='expected a "text" field, got words'):
        token_blocks(str(path), TOKENIZER, context_length=4, max_tokens=100)
    path.write_text('{"text": "abc"}\n')
    with pytest.raises(ValueError, match="at least 2 blocks of 4 tokens, got 4 tokens"):
        token_blocks(str(path), TOKENIZER, context_length=4, max_tokens=100)
    with pytest.raises(ValueError, match="does not exist"):
        check_train_source(str(tmp_path / "missing.txt"))
    with pytest.raises(ValueError, match=r"expected .*\.txt\.gz"):
        check_train_source(str(tmp_path / "picture.png"))
    with pytest.raises(ValueError, match="tokenizer"):
        load_tokenizer(str(tmp_path / "missing"))


@pytest.mark.parametrize("context_length", [0, -1])
def test_a_block_has_a_token(context_length):
    with pytest.raises(ValueError, match=f"context_length: expected a .* at least 1; got {context_length}"):
        token_blocks("embedded", TOKENIZER, context_length=context_length, max_tokens=100)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"caf\xe9\n", "expected UTF-8; .*position 3"),
        ("a.jsonl", b'{"text": "caf\xe9"}\n', "expected UTF-8; "),
        ("a.txt.gz", gzip.compress(b"caf\xe9\n", mtime=0), "expected UTF-8; "),
        ("b.txt.gz", b"text", "cannot be read: Not a gzipped file"),
        ("b.jsonl", b'{"text": "a"}\nno json\n', "cannot be read: JSON parse error"),
        ("c.jsonl", b"", "expected text; the file has none"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_file_that_cannot_be_read_is_named(name, content, message, tmp_path):
    (tmp_path / "first.txt").write_text("fine\n")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"^training text .*{name}: {message}"):
        token_blocks(
            f"{tmp_path / 'first.txt'},{tmp_path / name}", TOKENIZER, context_length=4, max_tokens=100
        )


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("owner/name", True),
        ("owner/name:part", True),
        ("a/b.txt", False),
        ("../name", False),
        ("name", False),
    ],
)
def test_is_hub_id(source, expected):
    assert is_hub_id(source) is expected


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "rwkv.pth").write_bytes(b"\x80")
    (tmp_path / "folder").mkdir()
    for name in ("tokenizer.json", "rwkv.pth", "folder", "missing"):
        with pytest.raises(ValueError, match=f"{name}'?: expected .*tokenizer.json"):
            load_tokenizer(str(tmp_path / name))


def test_a_vocabulary_of_world_models_is_refused(tmp_path):
    (tmp_path / "rwkv_vocab_v20230424.txt").write_text("1 '\\x00' 1\n")
    with pytest.raises(
        ValueError, match=r"expected a tokenizer\.json or a folder; got a vocabulary of the World models"
    ):
        load_tokenizer(str(tmp_path / "rwkv_vocab_v20230424.txt"))


def test_a_row_without_text_is_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "abc"}\n{"text": null}\n')
    with pytest.raises(ValueError, match=r'rows\.jsonl: expected text in every "text" field'):
        token_blocks(str(tmp_path / "rows.jsonl"), load_tokenizer("bytes"), context_length=2, max_tokens=100)


@pytest.mark.parametrize("source", ["missing.txt", "text.csv"])
def test_a_text_that_cannot_be_read_is_refused(source):
    with pytest.raises(ValueError, match=f"training text .*{source}"):
        token_blocks(source, load_tokenizer("bytes"), context_length=8, max_tokens=100)


def test_a_tokenizer_file_without_an_end_of_text_gets_one(tmp_path):
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"<|endoftext|>": 0, "a": 1}, unk_token="a")).save(
        str(tmp_path / "tokenizer.json")
    )
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "other.json"))
    with pytest.raises(ValueError, match="end-of-text token"):
        load_tokenizer(str(tmp_path / "other.json"))
