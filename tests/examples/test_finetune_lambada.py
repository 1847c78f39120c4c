"""examples/finetune_lambada.py from the command line to its results, with models of a few thousand parameters."""

import gzip
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import finetune_lambada as script
import pytest
import torch

from trwkv.models import TemporalRwkvForCausalLM
from trwkv.synthetic import lambada_passages

pytestmark = pytest.mark.usefixtures("one_thread")  # as in `run_until`

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "finetune_lambada.py"
DATA = Path(os.environ.get("TRWKV_DATA", ROOT.parent / "shared" / "data"))
TINY = shlex.split(
    "--hidden-size 8 --layers 2 --context-length 32 --batch-size 2 --base-steps 20 --steps 20 --eval-limit 8 "
    "--selector-noise 0.1 --device cpu"
)


def run_until(arguments, folder, wait_for, signal_number):
    """Run the script in a process of its own, and send it a signal as soon as `wait_for` exists in `folder`."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments, "--output", str(folder)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 180
    while not list(folder.glob(wait_for)) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    assert list(folder.glob(wait_for)), process.communicate()[0]
    process.send_signal(signal_number)
    return process.communicate(timeout=120)[0], process.returncode


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that was never stopped, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *TINY, "--output", str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


MEASURED = ("steps", "seconds", "tokens_per_second", "peak_memory_mib")


def outcome(folder):
    """The results without what a clock or the memory says, and every weight of every model."""
    results = json.loads((folder / "results.json").read_text())
    rows = [{name: value for name, value in row.items() if name not in MEASURED} for row in results["rows"]]
    weights = {
        (name, P): tensor
        for P in (1, 3)
        for name, tensor in TemporalRwkvForCausalLM.from_pretrained(folder / f"p{P}" / "model")
        .state_dict()
        .items()
    }
    return rows, weights


def test_results(finished):
    folder, printed = finished
    results = json.loads((folder / "results.json").read_text())
    assert [row["perspectives"] for row in results["rows"]] == ["base", 1, 3]
    for row in results["rows"]:
        assert 0 < row["held_out_loss"] < math.log(256) + 0.1
        scores = row["tasks"]["embedded.jsonl"]
        assert scores["n"] == 8 and scores["perplexity"] > 1 and 0 <= scores["acc"] <= 1
    control, temporal = results["rows"][1:]
    assert control["trained_parameters"] == 7 * 2 * 8  # the vectors of two layers
    assert control["added_percent"] == 0
    assert temporal["trained_parameters"] > control["trained_parameters"]
    assert temporal["added_percent"] > 0
    assert [step for step, _ in temporal["history"]] == list(range(1, 21))
    for row in (control, temporal):
        assert row["tokens_per_second"] > 0
        assert row["peak_memory_mib"] is None or row["peak_memory_mib"] > 50
    assert results["environment"]["versions"]["torch"] == torch.__version__
    assert results["command"].startswith("python examples/finetune_lambada.py --hidden-size 8")
    assert results["options"]["seed"] == 0
    assert not re.search(r'["\s=]/\w', (folder / "results.json").read_text())  # no absolute path
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "| base |" in printed and "accuracy" in printed and "results.json" in printed
    assert not list(folder.rglob("checkpoint-*"))


def test_only_vectors_and_selectors_were_trained(finished):
    folder, _ = finished
    base = TemporalRwkvForCausalLM.from_rwkv4(folder / "base" / "base.pth")
    for P in (1, 3):
        model = TemporalRwkvForCausalLM.from_pretrained(folder / f"p{P}" / "model")
        trained = {name for name, _ in model.vector_parameters()}
        before = base.state_dict()
        for name, tensor in model.state_dict().items():
            if name not in trained:
                assert torch.equal(tensor, before[name]), name
            elif name in before:
                assert not torch.equal(tensor.expand(P, -1), before[name].expand(P, -1)), name


def test_models_load_with_their_tokenizer(finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, _ = finished
    tokenizer = AutoTokenizer.from_pretrained(folder / "p3" / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "p3" / "model")
    inputs = tokenizer("Ada left", return_tensors="pt", return_token_type_ids=False)
    assert model.generate(**inputs, max_new_tokens=4, do_sample=False).shape == (1, 12)


@pytest.mark.parametrize(
    ("wait_for", "number", "code"),
    [
        ("base/checkpoints/checkpoint-8/trainer_state.json", signal.SIGKILL, -signal.SIGKILL),
        ("p3/checkpoints/checkpoint-8/trainer_state.json", signal.SIGINT, 130),
    ],
    ids=["killed in the base", "Ctrl-C in P = 3"],
)
def test_resume_ends_as_if_never_stopped(finished, tmp_path, wait_for, number, code):
    folder = tmp_path / "stopped"
    printed, returncode = run_until(TINY, folder, wait_for, number)
    assert returncode == code, printed
    assert not (folder / "results.json").exists()
    if number == signal.SIGINT:
        assert "continue with --resume --output" in printed
    assert script.main(["--resume", "--output", str(folder)]) == 0
    stage = "base" if number == signal.SIGKILL else "p3"
    assert 0 < json.loads((folder / stage / "training.json").read_text())["steps"] <= 12  # not all over again
    rows, weights = outcome(folder)
    expected_rows, expected_weights = outcome(finished[0])
    assert weights.keys() == expected_weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, expected_weights[name]), name
    for row, expected in zip(rows, expected_rows, strict=True):
        if number == signal.SIGINT:  # a stop between two log entries moves the one that follows
            row.pop("history", None), expected.pop("history", None)
        assert row == expected


def test_given_base_text_and_passages(finished, tmp_path, capsys):
    text, passages = tmp_path / "text.txt.gz", tmp_path / "passages.jsonl"
    with gzip.open(text, "wt") as file:
        file.writelines(row["text"] + "\n" for row in lambada_passages(60, seed=4))
    passages.write_text("".join(json.dumps(row) + "\n" for row in lambada_passages(5, seed=4)))
    folder = tmp_path / "run"
    arguments = [
        "--base",
        str(finished[0] / "base" / "base.pth"),
        "--tokenizer",
        "bytes",
        "--train",
        str(text),
    ]
    arguments += ["--eval", f"{passages},embedded", "--perspectives", "2", "--placement", "stream"]
    arguments += ["--aggregation", "fixed", "--fixed-weights", "0.75,0.25", "--train-parameters", "all"]
    arguments += ["--steps", "3", "--context-length", "64", "--eval-limit", "4", "--newline-prefix"]
    assert script.main([*arguments, "--output", str(folder), "--device", "cpu"]) == 0
    rows = json.loads((folder / "results.json").read_text())["rows"]
    assert [row["perspectives"] for row in rows] == ["base", 2]
    assert rows[1]["trained_parameters"] == rows[1]["parameters"]
    assert set(rows[1]["tasks"]) == {"passages.jsonl", "embedded.jsonl"}
    model = TemporalRwkvForCausalLM.from_pretrained(folder / "p2" / "model")
    assert model.config.placement == "stream" and model.config.fixed_weights == [0.75, 0.25]
    assert "accuracy (passages.jsonl)" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        script.main(["--resume", "--output", str(folder), "--steps", "4"])
    assert "steps was 3, now 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--perspectives", "0"], "--perspectives"),
        (["--perspectives", "1,x"], "--perspectives"),
        (["--perspectives", "2,2"], "expected different values"),
        (["--steps", "0"], "of at least 1, got 0"),
        (["--learning-rate", "nan"], "above 0, got nan"),
        (["--base", "missing.pth", "--tokenizer", "bytes"], 'expected "scratch", a file or folder here'),
        (["--base", "missing.pth"], "name one with --tokenizer"),
        (["--base", "some/model", "--hidden-size", "8"], "--hidden-size: only with --base scratch"),
        (["--train", "missing.txt"], "missing.txt does not exist"),
        (["--train", "novels"], "hub dataset owner/name"),
        (["--eval", "missing.jsonl"], "missing.jsonl does not exist"),
        (["--placement", "layer", "--perspective-vectors", "channel_mix_k"], "perspective_vectors"),
        (["--aggregation", "fixed"], "fixed_weights"),
        (["--device", "cuda"], "no CUDA device"),
        (["--resume"], "there is no run"),
        (["--tokenizer", "missing.json"], "tokenizer 'missing.json'"),
    ],
)
def test_bad_arguments_end_it_before_any_work(arguments, message, tmp_path, monkeypatch, capsys):
    if arguments == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    monkeypatch.chdir(tmp_path)
    try:
        assert script.main(arguments) == 1
    except SystemExit as stop:
        assert stop.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--base", "--train"])
def test_hub_id_without_a_network_says_what_to_do(option, tmp_path, monkeypatch, capsys):
    import socket

    from huggingface_hub import constants

    def unreachable(*args, **kwargs):
        raise socket.gaierror("no network")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        script.main([option, "someone/something"])
    message = capsys.readouterr().err
    assert (
        "someone/something has to come from the Hugging Face hub" in message
        and "Connect to a network" in message
    )


def test_a_used_output_folder_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "precious").write_text("")
    with pytest.raises(SystemExit):
        script.main(["--output", str(tmp_path)])
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.skipif(not (DATA / "tokenizer").is_dir(), reason=f"no real data in {DATA.name} (see TRWKV_DATA)")
def test_real_text_with_the_tokenizer_of_rwkv4(tmp_path):
    arguments = ["--train", str(DATA / "novels" / "valid.txt.gz")]
    arguments += ["--eval", str(DATA / "lambada" / "lambada_openai_even.jsonl"), "--eval-limit", "3"]
    arguments += ["--tokenizer", str(DATA / "tokenizer" / "20B_tokenizer.json"), "--perspectives", "2"]
    arguments += shlex.split(
        "--hidden-size 8 --layers 1 --context-length 16 --batch-size 2 --base-steps 2 --steps 2"
    )
    assert script.main([*arguments, "--output", str(tmp_path / "run"), "--device", "cpu"]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["rows"][0]["held_out_loss"] == pytest.approx(math.log(50277), rel=0.1)
