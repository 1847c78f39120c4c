"""`trwkv lm-eval`, lm-eval's own command line: the scores of `trwkv eval`, to the last digit.

One checkpoint in every format, in batches of 1 and of 8, read by lm-eval's entry and by ours. The rows of a batch do
not touch each other in the model; that a matrix product rounds a row alike in either batch is the CPU library's doing:
it was seen in float32 with one thread.
"""

import functools
import json
import os

import pytest
import torch
from lm_eval.tasks import TaskManager

from trwkv import cli
from trwkv.models import TemporalRwkvConfig, TemporalRwkvForCausalLM
from trwkv.synthetic import byte_tokenizer, lambada_passages

pytestmark = pytest.mark.usefixtures("one_thread")

FORMATS = {"official": "rwkv4.pth", "rwkv.cpp": "rwkv4.bin", "transformers": "hf", "trwkv": "folder"}
SETTINGS = [("1", False), ("8", True)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with one small RWKV-4 in every format, and with passages."""
    files = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    config = TemporalRwkvConfig(vocab_size=256, hidden_size=48, num_hidden_layers=2, eos_token_id=None)
    model = TemporalRwkvForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():  # the start is a near-uniform model: make its scores differ
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(files / FORMATS["trwkv"])
    for name in ("official", "rwkv.cpp", "transformers"):
        model.to_rwkv4(files / FORMATS[name])
    for folder in (FORMATS["trwkv"], FORMATS["transformers"]):
        byte_tokenizer().save_pretrained(files / folder)
    rows = lambada_passages(11, split="eval")
    (files / "passages.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return files


@pytest.fixture
def harness(files, tmp_path, monkeypatch, capsys):
    """Runs `trwkv lm-eval` on the passages; returns lm-eval's scores."""
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    for name in ("TOKENIZERS_PARALLELISM", "LMEVAL_LOG_LEVEL"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # lm-eval sets them for good
    # reading the thousands of tasks that come with lm-eval takes seconds
    monkeypatch.setattr("lm_eval.tasks.TaskManager", functools.partial(TaskManager, include_defaults=False))
    # a hundred thousand draws for one standard error, 1 s
    monkeypatch.setattr("lm_eval.evaluator_utils.stderr_for_metric", lambda **_: None)

    def run(*model_args, model="trwkv", batch="1"):
        output = tmp_path / f"{len(list(tmp_path.iterdir()))}" / "results.json"
        cli.main([
            "lm-eval", "--model", model, "--model_args", *model_args, "--device", "cpu", "--batch_size", batch,
            "--tasks", "lambada_jsonl", "--metadata", f"data_files={files / 'passages.jsonl'}",
            "--output_path", str(output),
        ])  # fmt: skip
        capsys.readouterr()
        (written,) = output.parent.iterdir()
        results = json.loads(written.read_text())["results"]["lambada_jsonl"]
        return {name: results[f"{name},none"] for name in ("perplexity", "acc")}

    return run


def scores(files, tmp_path, source, *more):
    """What `trwkv eval` writes."""
    cli.main([
        "eval", "--model", str(files / source), "--tokenizer", "bytes", "--tasks", str(files / "passages.jsonl"),
        "--device", "cpu", "--json", str(tmp_path / "scores.json"), *more,
    ])  # fmt: skip
    results = json.loads((tmp_path / "scores.json").read_text())["passages.jsonl"]
    return {name: results[name] for name in ("perplexity", "acc")}


@pytest.mark.parametrize(("batch", "newline"), SETTINGS)
def test_every_format_and_entry_gives_the_same_scores(files, harness, tmp_path_factory, batch, newline):
    tmp_path = tmp_path_factory.mktemp("scores")
    expected = scores(files, tmp_path, FORMATS["trwkv"], "--batch-size", "1", *["--newline-prefix"] * newline)
    for name, source in FORMATS.items():
        ours = scores(files, tmp_path, source, "--batch-size", batch, *["--newline-prefix"] * newline)
        assert ours == expected, name
        options = [
            f"pretrained={files / source}",
            "tokenizer=bytes",
            f"newline_prefix={str(newline).lower()}",
        ]
        assert harness(*options, batch=batch) == expected, name


def test_the_hf_model_of_lm_eval_reads_our_folder(files, harness, tmp_path):
    theirs = harness(f"pretrained={files / FORMATS['trwkv']}", model="hf", batch="8")
    assert theirs == scores(files, tmp_path, FORMATS["trwkv"], "--batch-size", "1")


def test_the_newline_counts(files, tmp_path):
    source = FORMATS["official"]
    assert scores(files, tmp_path, source) != scores(files, tmp_path, source, "--newline-prefix")


def test_the_newline_is_before_what_is_to_be_continued(files, monkeypatch):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from trwkv.harness import TrwkvLM

    seen = []
    monkeypatch.setattr(HFLM, "generate_until", lambda self, requests, disable_tqdm: seen.extend(requests))
    model = str(files / FORMATS["trwkv"])
    request = Instance("generate_until", doc={}, arguments=("a", {"until": ["."]}), idx=0)
    for newline in (False, True):
        TrwkvLM(model, "bytes", device="cpu", newline_prefix=newline).generate_until(
            [request], disable_tqdm=True
        )
    assert [x.args for x in seen] == [("a", {"until": ["."]}), ("\na", {"until": ["."]})]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrained=MODEL"], "lambada_jsonl: expected the path of a jsonl file in --metadata"),
        (["pretrained=nowhere"], "no file or folder 'nowhere'"),
        (["pretrained=MODEL", "newline_prefix=yes"], "newline_prefix: expected true or false"),
        (
            ["pretrained=MODEL", "--batch_size", "auto"],
            "batch_size: expected a number of at least 1, got auto",
        ),
        (["pretrained=MODEL", "--metadata", "data_files=none.jsonl"], "none.jsonl does not exist"),
        (["pretrained=MODEL", "--include_path", "EMPTY"], "Tasks not found: lambada_jsonl"),
    ],
)
def test_wrong_input(files, harness, tmp_path, arguments, message):
    words = {"MODEL": str(files / FORMATS["official"]), "EMPTY": str(tmp_path)}
    given = [functools.reduce(lambda x, item: x.replace(*item), words.items(), x) for x in arguments]
    with pytest.raises(SystemExit) as error:
        cli.main([
            "lm-eval", "--model", "trwkv", "--tasks", "lambada_jsonl", "--model_args", "tokenizer=bytes", *given
        ])  # fmt: skip
    assert str(error.value).startswith("trwkv lm-eval: ")
    assert message in str(error.value)


def test_an_unknown_model_argument_is_named(files, harness):
    with pytest.raises(TypeError, match="unexpected keyword argument 'perspective'"):
        harness(f"pretrained={files / FORMATS['official']}", "perspective=3")


def test_help_is_that_of_lm_eval(capsys):
    with pytest.raises(SystemExit):
        cli.main(["lm-eval", "--help"])
    assert "lm-eval run" in capsys.readouterr().out
