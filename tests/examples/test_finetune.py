"""examples/finetune.py: options from a file and from the command line, a LoRA, a run continued, two processes."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import finetune as script
import pytest
import torch
import yaml
from transformers import TrainingArguments

from trwkv.adapters import load_perspectives
from trwkv.models import TemporalRwkvForCausalLM

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "finetune.py"
TINY = {
    "hidden_size": 8,
    "n_perspectives": 3,
    "perspective_noise": 0.1,
    "train_parameters": "all",
    "context_length": 16,
    "max_tokens": 1000,
    "held_out_blocks": 4,
    "max_steps": 4,
    "save_steps": 2,
    "per_device_train_batch_size": 4,
    "learning_rate": "1e-2",  # which YAML takes for text
    "vector_learning_rate": 0.1,
    "lr_scheduler_kwargs": {"min_lr_rate": 0.5},
    "lr_scheduler_type": "cosine_with_min_lr",
    "label_names": ["labels"],
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}


def on_command_line(options):
    words = []
    for name, value in options.items():
        values = (
            value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        )
        words += [f"--{name}", *map(str, values)]
    return words


def run(folder, **changed):
    """Run in this process with options from the command line alone; the weights of the model it leaves."""
    kept = {name: value for name, value in (TINY | changed).items() if value is not None}
    assert script.main(on_command_line(kept | {"output_dir": folder})) == 0
    return weights(folder / "model")


def weights(folder):
    return TemporalRwkvForCausalLM.from_pretrained(folder).state_dict()


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name, x in one.items():
        assert torch.equal(x, other[name]), name


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetune") / "run"
    run(folder)
    return folder


def test_a_file_of_options_is_the_command_line(finished, tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text(
        yaml.safe_dump(TINY | {"output_dir": str(tmp_path / "run"), "max_steps": 3, "fp16": None})
    )
    assert script.main([str(file), "--max_steps", "4"]) == 0  # the command line comes first
    assert_equal(weights(tmp_path / "run" / "model"), weights(finished / "model"))
    results = json.loads((tmp_path / "run" / "all_results.json").read_text())
    assert 0 < results["eval_loss"] < 6 and results["train_loss"] > 0
    file = file.rename(tmp_path / "options.json")
    file.write_text(json.dumps(TINY))
    model, data, training = script.parse([str(file)])
    assert (model.n_perspectives, data.max_tokens, training.learning_rate) == (3, 1000, 0.01)
    assert training.lr_scheduler_kwargs == {"min_lr_rate": 0.5}


def test_the_committed_file_and_the_guide_have_options_that_exist():
    model, data, training = script.parse([str(SCRIPT.with_suffix(".yaml"))])
    assert (model.train_parameters, data.train, training.max_steps) == ("all", "embedded", 40)
    guide = (ROOT / "docs" / "finetuning.md").read_text()
    shell = "".join(re.findall(r"^```sh\n(.*?)^```", guide, re.MULTILINE | re.DOTALL))
    known = {field.name for kind in (type(model), type(data), TrainingArguments) for field in fields(kind)}
    named = set(re.findall(r" --([a-z]\w+)(?= |$)", shell, re.MULTILINE))
    assert {"base", "max_steps", "lora_rank"} <= named <= known


def test_a_new_model_trains_whole_by_default(finished, tmp_path):
    assert_equal(run(tmp_path / "run", train_parameters=None), weights(finished / "model"))
    defaults = [script.parse(["--output_dir", "x", *more])[0] for more in ([], ["--base", "x"])]
    defaults += [script.parse(["--output_dir", "x", "--lora_rank", "2"])[0]]
    assert [model.train_parameters for model in defaults] == ["all", "vectors", "vectors"]


def test_a_run_is_continued_bit_for_bit(finished, tmp_path):
    shutil.copytree(finished / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    continued = run(tmp_path / "run", resume_from_checkpoint="latest")
    assert (
        json.loads((tmp_path / "run" / "checkpoint-4" / "trainer_state.json").read_text())["global_step"] == 4
    )
    assert_equal(continued, weights(finished / "model"))


def test_perspectives_and_a_lora_on_a_base(finished, tmp_path):
    peft = pytest.importorskip("peft", reason="needs peft")
    base = finished / "model"
    changed = {"base": base, "n_perspectives": None, "perspective_noise": None, "lora_rank": 2}
    changed |= {"train_parameters": "vectors+head", "lora_channel_mixing": True}
    merged = run(tmp_path / "run", **changed)
    shutil.copytree(tmp_path / "run" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    assert_equal(run(tmp_path / "again", resume_from_checkpoint="latest", **changed), merged)
    before = weights(base)
    trained = {name for name, x in merged.items() if not torch.equal(x, before[name])}
    assert trained == {name for name in before if re.search(r"time_|selector|(att|ffn)\.[a-z]+\.|head", name)}
    loaded = TemporalRwkvForCausalLM.from_pretrained(base)
    loaded = peft.PeftModel.from_pretrained(loaded, tmp_path / "run" / "adapter")
    load_perspectives(loaded, tmp_path / "run" / "adapter")
    assert_equal(loaded.merge_and_unload().state_dict(), merged)


@pytest.mark.parametrize(
    ("which", "learning_rate"), [("vectors", None), ("perspectives", None), ("all", 0.0)]
)
def test_what_trains_on_a_base(finished, tmp_path, which, learning_rate):
    changed = {"n_perspectives": None, "perspective_noise": None, "train_parameters": which}
    changed["vector_learning_rate"] = learning_rate
    after, before = run(tmp_path / "run", base=finished / "model", **changed), weights(finished / "model")
    trained = {name for name, x in after.items() if not torch.equal(x, before[name])}
    model = TemporalRwkvForCausalLM.from_pretrained(finished / "model")
    vectors = {name for name, _ in model.vector_parameters()}
    perspectives = {name for name, _ in model.perspective_parameters()}
    assert trained == {"vectors": vectors, "perspectives": perspectives, "all": set(before) - vectors}[which]


def test_the_optimizer_has_the_groups_that_were_asked_for(finished, tmp_path):
    model = TemporalRwkvForCausalLM.from_pretrained(finished / "model")
    options = {"weight_decay": 0.25, "learning_rate": 0.5, "adam_beta2": 0.75, "use_cpu": True}
    trainer = script.GroupsTrainer(model=model, args=TrainingArguments(str(tmp_path), **options))
    trainer.vector_learning_rate = 2.0
    groups = trainer.create_optimizer().param_groups
    settings = [(group["lr"], group["weight_decay"], group["betas"][1]) for group in groups]
    assert settings == [(2.0, 0, 0.75), (0.5, 0.25, 0.75), (0.5, 0, 0.75)]


@pytest.mark.slow  # tests/test_sharded.py has the step itself
def test_two_processes_are_one_with_twice_the_batch(tmp_path):
    options = {"optim": "sgd", "learning_rate": 0.3, "vector_learning_rate": 0.3, "save_strategy": "no"}
    expected = run(tmp_path / "one", **options)
    words = on_command_line(
        TINY | options | {"per_device_train_batch_size": 2, "output_dir": tmp_path / "two"}
    )
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launch, str(SCRIPT), *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("The model is in") == 1
    for name, x in weights(tmp_path / "two" / "model").items():
        torch.testing.assert_close(x, expected[name], msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"learning_rat": 1}, "unknown options learning_rat"),
        ({"hidden_size": "wide"}, "invalid int value"),
        ({"train_parameters": "vector"}, "train_parameters: expected one of vectors, vectors+head, persp"),
        ({"placement": "sideways"}, "placement: expected one of layer, stream; got 'sideways'"),
        ({"train_parameters": "vectors"}, "train_parameters: expected all for a base from scratch"),
        ({"train_parameters": "perspectives+head"}, "no vector has a gradient; got perspectives+head"),
        ({"base": "missing.pth"}, "missing.pth"),
        ({"train": "missing.txt"}, "missing.txt does not exist"),
        ({"lora_rank": 2, "train_parameters": "all"}, "with a LoRA; got all"),
        ({"lora_rank": 2, "train_parameters": "perspectives", "fsdp": True}, "expected 0 with fsdp"),
        ({"resume_from_checkpoint": "latest"}, "No valid checkpoint"),
    ],
    ids=str,
)
def test_wrong_options(changed, message, tmp_path, monkeypatch, capsys):
    if "got all" in message:
        pytest.importorskip("peft", reason="needs peft")
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "options.yaml"
    file.write_text(yaml.safe_dump(TINY | {"output_dir": "run"} | changed))
    try:
        assert script.main([str(file)]) == 1
    except SystemExit as stop:
        assert stop.code == 2
    assert message in capsys.readouterr().err


def test_neither_a_list_nor_an_abbreviation(tmp_path, capsys):
    file = tmp_path / "options.yaml"
    file.write_text("- base\n")
    assert script.main([str(file)]) == 1
    assert "expected options as `name: value`; got list" in capsys.readouterr().err
    assert script.main(["--output_dir", str(tmp_path), "--learning_rat", "1"]) == 1
    assert "--learning_rat" in capsys.readouterr().err


def test_a_lora_without_peft_says_what_to_do(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    options = TINY | {"lora_rank": 2, "train_parameters": "perspectives", "output_dir": tmp_path / "run"}
    assert script.main(on_command_line(options)) == 1
    assert "pip install peft" in capsys.readouterr().err
