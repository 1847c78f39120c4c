"""The `trwkv` command: what it writes is read again, what it prints is true, and wrong input is said in a line."""

import json
import subprocess
import sys

import pytest
import torch

from trwkv import cli
from trwkv.cli import load_model
from trwkv.data import load_tokenizer
from trwkv.models import TemporalRwkvConfig, TemporalRwkvForCausalLM
from trwkv.synthetic import byte_tokenizer

TOKENS = torch.tensor([[5, 6, 7, 8, 250]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small RWKV-4 with a tokenizer, in a folder."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    config = TemporalRwkvConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, eos_token_id=None
    )
    TemporalRwkvForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def logits(source, **options):
    with torch.no_grad():
        return cli.load_model(str(source), **options)(TOKENS).logits


def test_convert_there_and_back(folder, tmp_path, capsys) -> None:
    """To an official file, to perspectives without noise, and to Hugging Face's RWKV-4: always the same function."""
    expected = logits(folder)
    cli.main(["convert", str(folder), str(tmp_path / "rwkv4.pth")])
    torch.testing.assert_close(logits(tmp_path / "rwkv4.pth"), expected, rtol=0, atol=0)
    arguments = ["--perspectives", "3", "--placement", "stream", "--dtype", "float32"]
    cli.main(["convert", str(tmp_path / "rwkv4.pth"), str(tmp_path / "three"), *arguments])
    assert "of which perspectives add" in capsys.readouterr().out
    three = cli.load_model(str(tmp_path / "three"))
    assert (three.config.n_perspectives, three.config.placement) == (3, "stream")
    torch.testing.assert_close(logits(tmp_path / "three"), expected)
    cli.main(["convert", "--rwkv4", str(folder), str(tmp_path / "hf")])
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == "rwkv"
    torch.testing.assert_close(logits(tmp_path / "hf"), expected, rtol=0, atol=0)


def test_a_converted_folder_keeps_its_tokenizer(folder, tmp_path) -> None:
    cli.main(["convert", str(folder), str(tmp_path / "copy"), "--dtype", "bfloat16"])
    copied = {file.name for file in (tmp_path / "copy").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "model.safetensors"} <= copied
    assert cli.load_model(str(tmp_path / "copy")).head.weight.dtype == torch.bfloat16


def test_a_converted_file_is_given_a_tokenizer(folder, tmp_path, capsys) -> None:
    cli.main(["convert", str(folder), str(tmp_path / "rwkv4.pth")])
    cli.main(["convert", str(tmp_path / "rwkv4.pth"), str(tmp_path / "without")])
    assert "has no tokenizer: name one with --tokenizer" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"expected a folder with tokenizer\.json"):
        cli.main(["generate", "--model", str(tmp_path / "without"), "--prompt", "a"])
    with pytest.raises(SystemExit, match=r"expected a tokenizer\.json"):
        cli.main(["generate", "--model", str(tmp_path / "rwkv4.pth"), "--prompt", "a"])
    cli.main(["convert", str(tmp_path / "rwkv4.pth"), str(tmp_path / "with"), "--tokenizer", str(folder)])
    assert load_tokenizer(str(tmp_path / "with"))("a b")["input_ids"] == byte_tokenizer()("a b")["input_ids"]
    with pytest.raises(SystemExit, match="--tokenizer: only for a folder"):
        cli.main(["convert", str(folder), str(tmp_path / "again.pth"), "--tokenizer", str(folder)])
    assert not (tmp_path / "again.pth").exists()


def with_end_at(token: int, folder):
    """A byte tokenizer's folder, but that its end-of-text token is another."""
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = tokenizer.pad_token = tokenizer.convert_ids_to_tokens(token)
    tokenizer.save_pretrained(folder)
    return folder


def special_tokens(folder) -> list[tuple]:
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    files = [json.loads((folder / name).read_text()) for name in ("config.json", "generation_config.json")]
    return [tuple(file.get(name) for name in names) for file in files]


def test_a_converted_folder_has_the_special_tokens_of_its_tokenizer(folder, tmp_path, capsys) -> None:
    """That of --tokenizer, and the source's, whose configuration may say otherwise."""
    official, other = str(tmp_path / "rwkv4.pth"), with_end_at(7, tmp_path / "tokenizer")
    cli.main(["convert", str(folder), official])
    cli.main(["convert", official, str(tmp_path / "named"), "--tokenizer", str(other)])
    assert special_tokens(tmp_path / "named") == [(0, 7, 7)] * 2
    cli.main(["convert", official, str(tmp_path / "source")])
    assert special_tokens(tmp_path / "source") == [(0, 0, None)] * 2
    with_end_at(9, tmp_path / "source")
    cli.main(["convert", str(tmp_path / "source"), str(tmp_path / "copied"), "--dtype", "bfloat16"])
    assert special_tokens(tmp_path / "copied") == [(0, 9, 9)] * 2
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    cli.main(["convert", str(tmp_path / "source"), str(tmp_path / "broken")])
    assert "the ids of special tokens stay those of " in capsys.readouterr().out
    assert special_tokens(tmp_path / "broken") == [(0, 0, None)] * 2


def test_generate_stops_at_the_end_of_text_of_the_tokenizer(folder, tmp_path, capsys) -> None:
    arguments = ["generate", "--model", str(folder), "--prompt", "abc", "--max-new-tokens", "6"]
    arguments += ["--temperature", "0", "--device", "cpu"]
    cli.main(arguments)
    assert "6 tokens in" in capsys.readouterr().err
    first = load_model(str(folder)).generate(
        byte_tokenizer()("abc", return_tensors="pt").input_ids, do_sample=False, max_new_tokens=1
    )[0, -1]
    cli.main([*arguments, "--tokenizer", str(with_end_at(int(first), tmp_path))])
    assert "1 tokens in" in capsys.readouterr().err


def test_convert_says_where_it_cannot_write(folder, tmp_path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(
        SystemExit, match=r"expected a folder, or a name that ends in \.pth or \.bin; it is a file"
    ):
        cli.main(["convert", str(folder), str(tmp_path / "file")])
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(SystemExit, match=r"expected a folder.*it is a file"):
        cli.main(["convert", "--rwkv4", str(folder), str(tmp_path / "file")])
    for name in ("new.safetensors", "new.txt"):
        with pytest.raises(
            SystemExit, match=f"{name}: expected the name of a folder, or one that ends in .pth"
        ):
            cli.main(["convert", str(folder), str(tmp_path / name)])
        assert not (tmp_path / name).exists()
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(SystemExit, match=r"expected a file, as it ends in \.pth; it is a folder"):
        cli.main(["convert", str(folder), str(tmp_path / "folder.pth")])
    cli.main(["convert", str(folder), str(tmp_path / "RWKV-4-1.5")])  # no suffix, but a version
    assert (tmp_path / "RWKV-4-1.5" / "model.safetensors").is_file()
    for name in ("new.pth", "new.bin"):
        cli.main(["convert", str(folder), str(tmp_path / "made" / name)])
        assert (tmp_path / "made" / name).stat().st_size > 1000


def test_convert_does_not_replace_its_source(folder, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    cli.main(["convert", "--rwkv4", str(folder), "hf"])
    cli.main(["convert", str(folder), "base.pth"])
    (tmp_path / "link").symlink_to(tmp_path / "hf")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for source, target in (
        ("hf", "hf"),
        ("hf", str(tmp_path / "hf") + "/"),
        ("link", "hf"),
        ("base.pth", "./base.pth"),
        ("hf/model.safetensors", "hf"),
    ):
        with pytest.raises(SystemExit, match=r"target: expected another place than the source.*; got "):
            cli.main(["convert", source, target, "--dtype", "bfloat16"])
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


WITHOUT = """
import sys
sys.modules[sys.argv.pop(1)] = None  # as if it were not installed
from trwkv.cli import main
main()
"""


@pytest.mark.parametrize(
    ("module", "extra", "command"),
    [
        ("transformers", "hf", ["convert", "FOLDER", "x"]),
        ("transformers", "hf", ["generate", "--model", "FOLDER", "--prompt", "a"]),
        ("safetensors", "hf", ["generate", "--model", "FOLDER", "--prompt", "a"]),
        ("lm_eval", "eval", ["eval", "--model", "FOLDER", "--tasks", "PASSAGES"]),
        ("lm_eval", "eval", ["lm-eval", "--model", "trwkv"]),
        ("datasets", "eval", ["eval", "--model", "FOLDER", "--tasks", "PASSAGES"]),
    ],
)
def test_a_missing_extra_is_named(module, extra, command, folder, tmp_path) -> None:
    (tmp_path / "passages.jsonl").write_text('{"text": "a b c"}\n')
    words = {"FOLDER": str(folder), "PASSAGES": str(tmp_path / "passages.jsonl")}
    arguments = [words.get(word, word) for word in command]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, module, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    how = f'pip install -e ".[{extra}]" in a clone of trwkv'
    expected = f"trwkv {command[0]}: needs {module}, which is not installed: {how}"
    assert done.stderr.splitlines()[-1] == expected
    assert "Traceback" not in done.stderr


def test_a_missing_module_of_no_extra_is_not_hidden(monkeypatch) -> None:
    def fail(*_):
        import no_such_module  # noqa: F401

    monkeypatch.setattr(cli, "_convert", fail)
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        cli.main(["convert", "a", "b"])


def test_a_hub_id_brings_its_tokenizer(folder, tmp_path, monkeypatch) -> None:
    import huggingface_hub

    asked = []

    def snapshot_download(repository, *, allow_patterns, local_files_only):
        asked.append((repository, allow_patterns))
        return str(folder)

    cli.main(["convert", "--rwkv4", str(folder), str(tmp_path / "remote")])
    monkeypatch.setattr(cli, "load_model", lambda source, *_, **__: load_model(str(tmp_path / "remote")))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    cli.main(["convert", "someone/rwkv4", str(tmp_path / "ours")])
    assert asked == [("someone/rwkv4", list(cli.TOKENIZER_FILES))]
    assert load_tokenizer(str(tmp_path / "ours")).eos_token_id is not None


def test_generate_warns_of_nothing(folder) -> None:
    command = [sys.executable, "-m", "trwkv.cli", "generate", "--model", str(folder), "--prompt", "a"]
    command += ["--max-new-tokens", "2", "--seed", "0"]  # which ends no text
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "You are using a model of type" not in done.stderr
    assert "2 tokens in" in done.stderr


def test_generate(folder, capsys) -> None:
    arguments = [
        "generate",
        "--model",
        str(folder),
        "--prompt",
        "abc",
        "--max-new-tokens",
        "6",
        "--device",
        "cpu",
    ]
    printed = []
    for more in (["--seed", "3"], ["--seed", "3"], ["--temperature", "0"], ["--temperature", "0"]):
        cli.main(arguments + more)
        out, err = capsys.readouterr()
        assert out.startswith("abc")
        assert "6 tokens in " in err
        printed.append(out)
    assert printed[0] == printed[1]
    assert printed[2] == printed[3]


def test_eval(folder, tmp_path, capsys) -> None:
    """The same figures in any batch and from any format of one checkpoint."""
    passages = tmp_path / "passages.jsonl"
    texts = ["the cat saw the dog", "one two three four", "a b c a b c", "to be or not to be"]
    passages.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    cli.main(["convert", str(folder), str(tmp_path / "rwkv4.pth")])
    results = []
    for model, batch in ((folder, "1"), (folder, "4"), (tmp_path / "rwkv4.pth", "2")):
        cli.main([
            "eval", "--model", str(model), "--tokenizer", str(folder), "--tasks", str(passages), "--device", "cpu",
            "--batch-size", batch, "--json", str(tmp_path / "results.json"),
        ])  # fmt: skip
        assert "perplexity" in capsys.readouterr().out
        results.append(json.loads((tmp_path / "results.json").read_text()))
    assert results[0]["passages.jsonl"]["n"] == 4
    for other in results[1:]:
        assert other["passages.jsonl"] == pytest.approx(results[0]["passages.jsonl"], rel=1e-6)


WRONG = [
    (["convert", "nowhere", "x"], "no file or folder 'nowhere'"),
    (["convert", "FOLDER", "x", "--perspectives", "2"], "expected no n_perspectives"),
    (
        ["eval", "--model", "FOLDER", "--tasks", "nothing.jsonl", "--json", "no/where/x"],
        "nothing.jsonl does not exist",
    ),
    (
        ["eval", "--model", "FOLDER", "--tasks", "piqa", "--json", "no/where/x"],
        "--json: expected a file in a folder",
    ),
    (["generate", "--model", "nowhere", "--prompt", "a"], "no file or folder 'nowhere'"),
    (["eval", "--model", "FOLDER", "--tasks", "nothing.jsonl"], "nothing.jsonl does not exist"),
    (["generate", "--model", "FOLDER", "--prompt", ""], "--prompt: expected at least one token"),
    (["generate", "--model", "FOLDER", "--prompt", "a", "--tokenizer", "no/where/x"], "tokenizer"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=lambda x: x if isinstance(x, str) else "")
def test_wrong_input(arguments, message, folder) -> None:
    with pytest.raises(SystemExit) as error:
        cli.main([str(folder) if x == "FOLDER" else x for x in arguments])
    assert str(error.value).startswith(f"trwkv {arguments[0]}: ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    "option, value",
    [
        ("--temperature", "nan"),
        ("--temperature", "-1"),
        ("--device", "nope"),
        ("--top-p", "2"),
        ("--top-p", "0"),
        ("--top-p", "nan"),
    ],
)
def test_wrong_options(option, value, folder, capsys) -> None:
    with pytest.raises(SystemExit):
        cli.main(["generate", "--model", str(folder), "--prompt", "a", option, value])
    assert f"argument {option}: " in capsys.readouterr().err


def test_a_tokenizer_of_more_tokens_than_the_model_has(tmp_path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    TemporalRwkvForCausalLM(
        TemporalRwkvConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1)
    ).save_pretrained(tmp_path)
    passages = tmp_path / "passages.jsonl"
    passages.write_text('{"text": "a b c"}\n')
    for arguments in (["generate", "--prompt", "a"], ["eval", "--tasks", str(passages)]):
        with pytest.raises(SystemExit, match="tokenizer: expected at most the model's 9 tokens; got "):
            cli.main([*arguments, "--model", str(tmp_path)])
