"""The reproduction study: its statistics, what it measures, stopping and continuing, its tables."""

import gzip
import json
import math
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="trains models")
pytest.importorskip("lm_eval", reason="evaluates on LAMBADA")

import reproduce
import reproduce_measures as measures
import reproduce_report as report
import reproduce_study as studies
from trwkv.data import TokenBlocks, load_tokenizer
from trwkv.models import TemporalRwkvConfig, TemporalRwkvForCausalLM
from trwkv.runs import read_json
from trwkv.synthetic import lambada_passages

ROOT = Path(__file__).parents[2]
CONFIG = """
tokenizer: bytes
model: {hidden_size: 8, num_hidden_layers: 2}
texts: {novels: {train: train.txt, held_out: held_out.txt.gz}}
also_measured: {wikitext: other.txt}
lambada: lambada.jsonl
seeds: [0, 1]
pretraining: {steps: 3, batch_size: 2, context_length: 32, learning_rate: 1.0e-2}
finetuning: {steps: 4, batch_size: 2, context_length: 64, learning_rate: 1.0e-2}
evaluation: {blocks: 3, context_length: 32, long_blocks: 2, long_context_length: 256, lambada: 3}
from_scratch:
  base: {n_perspectives: 1}
upcycled:
  p1: {n_perspectives: 1}
  p3: {control: p1}
  stream: {control: p1, placement: stream, n_perspectives: 2, train_head: true}
tables:
  summary: [base, p1, p3, stream]
  brief: [p3, stream]
  positions: [p1, p3]
  diversity: [p3, stream]
"""


@pytest.fixture
def study(tmp_path):
    """A configuration file and its data."""
    data = tmp_path / "data"
    data.mkdir()
    text = "\n".join(row["text"] for row in lambada_passages(40, seed=0))
    (data / "train.txt").write_text(text)
    (data / "other.txt").write_text(text[::-1])
    with gzip.open(data / "held_out.txt.gz", "wt") as file:
        file.write(text[1000:])
    rows = lambada_passages(5, seed=1)
    (data / "lambada.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    return tmp_path


def run(study, *more):
    arguments = ["--config", "tiny.yaml", "--data", "data", "--output", "out"]
    arguments = [str(study / x) if not x.startswith("--") else x for x in arguments]
    return reproduce.main([*arguments, *more])


def test_a_study(study, capsys, monkeypatch):
    """Stopped in the middle of a training and continued, it ends as if it had run through."""
    assert run(study, "--cells", "p3") == 0
    whole = read_json(study / "out" / "results.json")
    assert [(x["cell"], x["seed"]) for x in whole["runs"]] == [("p3", 0), ("p3", 1), ("base", 0), ("base", 1)]

    (study / "out").rename(study / "first")
    step, before = studies.FollowDiversity.on_step_end, signal.getsignal(signal.SIGTERM)

    def interrupt(self, args, state, control, **kwargs):
        step(self, args, state, control, **kwargs)
        if state.global_step == 1:  # heard by the next step
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(studies.FollowDiversity, "on_step_end", interrupt)
        assert run(study, "--cells", "p3") == 130
    assert "the same command continues" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) is before
    assert list((study / "out/p3/seed0/checkpoints").iterdir())
    assert run(study, "--cells", "p3") == 0
    again = read_json(study / "out" / "results.json")
    for was, now in zip(whole["runs"], again["runs"], strict=True):
        for name in ("bits_per_byte", "by_position", "lambada", "diversity", "parameters"):
            assert was[name] == now[name], (was["cell"], name)

    assert run(study) == 0
    results = read_json(study / "out" / "results.json")
    assert len(results["runs"]) == 8
    assert all(re.fullmatch(r"[0-9a-f]{12}(-dirty)?|unknown", run["commit"]) for run in results["runs"])
    assert set(results["cost"]) == {"base", "p1", "p3", "stream"}
    assert [row["step"] for row in results["runs"][1]["diversity"]] == [1, 2, 3, 4]
    # the base of a seed is what its cells start from
    base = torch.load(study / "out/base/seed1/base.pth", weights_only=True)
    model = TemporalRwkvForCausalLM.from_pretrained(study / "out/p3/seed1/model")
    assert torch.equal(model.rwkv.blocks[0].att.value.weight, base["blocks.0.att.value.weight"])
    shown(study, results, capsys)


def shown(study, results, capsys):
    path = study / "out" / "results.json"
    capsys.readouterr()
    assert reproduce.main(["--results", str(path), "--table", "summary"]) == 0
    printed = capsys.readouterr().out.strip()
    assert printed == report.table(results, "summary")
    assert printed.count("\n") == 5
    document = study / "text.md"
    command = f"<!-- python benchmarks/reproduce.py --results {path} --table summary -->"
    document.write_text(f"before\n{command}\nold\n<!-- end -->\nafter\n")
    assert reproduce.main(["--results", str(path), "--document", str(document)]) == 0
    assert document.read_text() == f"before\n{command}\n{printed}\n<!-- end -->\nafter\n"
    for name in ("effects", "diversity", "positions"):
        assert path.with_name(f"results_{name}.png").stat().st_size > 5000
    assert "0" in report.table(results, "positions")
    assert (
        len(report.table(results, "diversity").splitlines())
        == len(report.table(results, "brief").splitlines())
        == 4
    )


def test_runs_of_another_configuration_are_not_taken_for_this_one(study, capsys):
    assert run(study, "--cells", "base") == 0
    before = read_json(study / "out" / "results.json")
    for old, new, named in (
        ("steps: 3,", "steps: 2,", "steps was 3, now 2"),
        ("blocks: 3", "blocks: 2", "blocks"),
    ):
        (study / "tiny.yaml").write_text(CONFIG.replace(old, new))
        with pytest.raises(SystemExit):
            run(study)
        error = capsys.readouterr().err
        assert "a run of another configuration is there" in error and named in error
    assert read_json(study / "out" / "results.json") == before
    (study / "tiny.yaml").write_text(CONFIG + "  learned: [p3]\n")  # more tables, and more cells, are welcome
    assert run(study, "--cells", "base") == 0


def test_two_processes_share_the_work(study, monkeypatch):
    """What another process holds is left to it at first, and waited for at the end."""
    from filelock import FileLock

    done = []
    runner = studies.Runner(studies.Study.read(study / "tiny.yaml"), None, study / "out", "cpu", False)

    def pretend(self, cell, seed):
        done.append((cell.name, seed))
        (self.place(cell.name, seed) / "result.json").write_text("{}")

    monkeypatch.setattr(studies.Runner, "run", pretend)
    place = runner.place("p1", 0)
    place.mkdir(parents=True)
    runner.place("base", 1).mkdir(parents=True)
    cells = runner.study.cells
    with FileLock(place / "lock"):
        reproduce._ensure(runner, cells["p1"], 0, wait=False)
    assert done == [("base", 0)]
    reproduce._ensure(runner, cells["p1"], 0, wait=True)
    reproduce._ensure(runner, cells["p1"], 0, wait=True)
    assert done == [("base", 0), ("p1", 0)]
    with FileLock(runner.place("base", 1) / "lock"):
        reproduce._ensure(runner, cells["p1"], 1, wait=False)
    assert ("p1", 1) not in done


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """Examples that differ alike for all seeds: their spread is what the interval has to show."""
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        differences = np.tile(rng.normal(0.3, 1.0, size=(1, 60)), (3, 1))
        mean, low, high = report.interval(differences, draws=400)
        assert mean == pytest.approx(differences.mean())
        hits += low <= 0.3 <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_the_interval_sees_seeds_that_disagree():
    alike = np.full((3, 50), 0.1)
    assert report.interval(alike)[1:] == pytest.approx((0.1, 0.1))
    apart = np.array([[-0.2], [0.1], [0.4]]) + np.zeros((3, 50))
    mean, low, high = report.interval(apart)
    assert mean == pytest.approx(0.1)
    assert low < -0.1
    assert high > 0.3


def test_differences_are_paired_by_seed():
    runs = [
        {"cell": cell, "seed": seed, "x": [base + seed, base + seed + 1]}
        for seed in (2, 0, 1)
        for cell, base in (("p1", 5.0), ("p3", 4.5))
        if (cell, seed) != ("p3", 0)
    ]
    results = {"cells": {"p1": {"control": None}, "p3": {"control": "p1"}}, "runs": runs}
    assert report.difference(results, "p1", "x") is None
    assert report.difference(results, "p3", "x") == pytest.approx((-0.5, -0.5, -0.5))


def tiny_model():
    torch.manual_seed(0)
    config = TemporalRwkvConfig(vocab_size=256, hidden_size=8, num_hidden_layers=1)
    return TemporalRwkvForCausalLM(config)


def test_bits_per_byte_of_a_model_that_knows_nothing():
    """Equal logits: 8 bits for each of 255 predicted bytes; an end of text costs and counts for no byte."""
    model, tokenizer = tiny_model(), load_tokenizer("bytes")
    torch.nn.init.zeros_(model.head.weight)
    blocks = np.random.default_rng(0).integers(1, 256, size=(3, 256))
    assert measures.block_losses(model, TokenBlocks(blocks), tokenizer) == [8.0] * 3
    blocks[1, 7] = 0
    assert measures.block_losses(model, TokenBlocks(blocks), tokenizer)[1] == pytest.approx(
        8 * 255 / 254, abs=1e-4
    )


def test_losses_by_position():
    model = tiny_model().eval()
    blocks = TokenBlocks(np.random.default_rng(0).integers(1, 256, size=(2, 300)))
    found = measures.position_losses(model, blocks)
    assert list(found) == ["1-64", "64-256"]
    ids = blocks[1]["input_ids"][None]
    with torch.no_grad():
        logits = model(ids).logits[0]
    expected = [
        float(torch.nn.functional.cross_entropy(logits[t - 1 : t], ids[0, t : t + 1])) for t in range(64, 256)
    ]
    assert found["64-256"][1] == pytest.approx(sum(expected) / len(expected), abs=2e-5)


def test_lambada_agrees_with_itself(study):
    found = measures.lambada(tiny_model(), load_tokenizer("bytes"), study / "data" / "lambada.jsonl", 4)
    assert len(found["log_probability"]) == len(found["right"]) == 4
    assert found["perplexity"] == pytest.approx(math.exp(-np.mean(found["log_probability"])), rel=1e-3)
    assert found["accuracy"] == np.mean(found["right"])


@pytest.mark.parametrize("part", ["train", "held_out"])
def test_the_standard_library_as_text(tmp_path, part):
    path = studies.standard_library(tmp_path, part)
    rows = [json.loads(line)["text"] for line in Path(path).read_text().splitlines()]
    assert len(rows) > 20
    other = studies.standard_library(tmp_path, "held_out" if part == "train" else "train")
    assert not set(rows) & {json.loads(line)["text"] for line in Path(other).read_text().splitlines()} - {""}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("control: p1}", "control: p7}"), "needs a cell p7"),
        (("seeds: [0, 1]", "sedes: [0, 1]"), "sedes"),
        (("p1: {n_perspectives: 1}", "p1: {n_perspective: 1}"), "n_perspective"),
        (("p1: {n_perspectives: 1}", "p1: {n_perspectives: 0}"), "at least 1"),
        (("p1: {n_perspectives: 1}", "p1: {text: poems}"), "needs a"),
        (("positions: [p1, p3]", "positions: [p1, p9]"), "p9"),
        (("  base: {n_perspectives: 1}", "  other: {n_perspectives: 1}"), "needs a cell base"),
    ],
)
def test_a_wrong_configuration_is_refused(study, capsys, change, message):
    text = CONFIG.replace(*change, 1)
    assert text != CONFIG
    (study / "tiny.yaml").write_text(text)
    with pytest.raises(SystemExit):
        run(study)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [[], ["--config", "x.yaml", "--results", "y.json"], ["--config", "x.yaml"]]
)
def test_wrong_options_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        reproduce.main(arguments)
    assert "expected" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks/reproduce").glob("*.yaml")), ids=lambda x: x.stem)
def test_the_shipped_studies_are_well_formed(path):
    study = studies.Study.read(path)
    assert {"summary", "positions", "diversity"} <= set(study.tables)
    listed = {cell for cells in study.tables.values() for cell in cells}
    assert listed >= {name for name in study.cells if not re.match("base", name)}
    compared = [cell for cell in study.cells.values() if cell.control]
    for cell in compared:  # the same steps, the same kind of parameters
        control = study.cells[cell.control]
        assert (cell.start, cell.text, cell.train_head) == (control.start, control.text, control.train_head)
        if cell.start == "upcycled":
            assert (cell.steps, cell.learning_rate) == (control.steps, control.learning_rate)


def test_the_document_shows_the_committed_results():
    """Every table of docs/reproduction.md, and the README's, is what the named command prints."""
    found = 0
    for document in ("docs/reproduction.md", "README.md"):
        for command, shown in re.findall(
            r"<!-- python benchmarks/reproduce\.py (.+?) -->\n(.*?)<!-- end -->",
            (ROOT / document).read_text(),
            re.DOTALL,
        ):
            results, name = re.fullmatch(r"--results (\S+) --table (\S+)", command).groups()
            assert shown.strip() == report.table(read_json(ROOT / results), name)
            found += 1
    assert found >= 2


def test_it_stops_when_its_time_is_up(study, capsys):
    assert run(study, "--minutes", "0.001") == 130
    assert "the same command continues" in capsys.readouterr().out
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
