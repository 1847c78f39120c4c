"""Training under Hugging Face's Trainer and PyTorch: docs/finetuning.md runs, groups, accumulation, what PEFT keeps."""

import itertools
import re
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from trwkv.adapters import PerspectiveCheckpoints, load_perspectives, save_perspectives
from trwkv.data import TokenBlocks
from trwkv.models import TemporalRwkvConfig, TemporalRwkvForCausalLM
from trwkv.training import held_out_loss, parameter_groups, train

GUIDE = Path(__file__).parents[1] / "docs" / "finetuning.md"
TIME_MIXING = r".*\.att\.(key|value|receptance|output)"


def random_model(seed=0, **options):
    """A model none of whose values is zero or that of another perspective."""
    settings = {"vocab_size": 19, "hidden_size": 8, "num_hidden_layers": 2, "n_perspectives": 3} | options
    torch.manual_seed(seed)
    model = TemporalRwkvForCausalLM(TemporalRwkvConfig(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)
    return model


class Rows(torch.utils.data.Dataset):
    """Random rows, each with labels for another number of its tokens."""

    def __len__(self):
        return 24

    def __getitem__(self, index):
        ids = torch.randint(19, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids.where(torch.arange(8) <= 1 + index % 7, -100)}


def arguments(folder, **options):
    settings = {"max_steps": 4, "learning_rate": 1e-2, "report_to": "none", "use_cpu": True} | options
    return TrainingArguments(output_dir=str(folder), disable_tqdm=True, **settings)


@pytest.mark.parametrize("is_peft", [False, True])
def test_label_smoothing_is_of_the_next_token(is_peft, tmp_path):
    """Trainer shifts labels itself for it, if it knows that the model is a causal one."""
    model = random_model()
    rows = [{**Rows()[i], "labels": Rows()[i]["input_ids"]} for i in range(8)]
    ids = torch.stack([row["input_ids"] for row in rows])
    with torch.no_grad():
        logits = model(ids).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), label_smoothing=0.1)
    if is_peft:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=TIME_MIXING))
    trainer = Trainer(model=model, args=arguments(tmp_path, label_smoothing_factor=0.1), eval_dataset=rows)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)


def sections():
    """Heading and Python blocks of each part of the guide."""
    parts = re.split(r"^##? (.+)$", GUIDE.read_text(), flags=re.MULTILINE)[1:]
    blocks = [re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL) for text in parts[1::2]]
    return dict(zip(parts[::2], blocks, strict=True))


def run_blocks(blocks):
    names = {}
    for block in blocks:
        exec(compile(block, str(GUIDE), "exec"), names)
    return names


LORA = "LoRA, together with the perspectives"


def test_the_guide_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_blocks(itertools.chain(*(blocks for title, blocks in sections().items() if title != LORA)))
    assert names["losses"][-1] < names["losses"][0]
    tuned = TemporalRwkvForCausalLM.from_pretrained("tuned")
    base = TemporalRwkvForCausalLM.from_pretrained("base").freeze_base(train_head=True)
    for (name, before), after in zip(base.named_parameters(), tuned.parameters(), strict=True):
        assert torch.equal(before, after) != before.requires_grad, name


def test_the_guide_to_lora_runs(tmp_path, monkeypatch):
    pytest.importorskip("peft", reason="needs peft")
    monkeypatch.chdir(tmp_path)
    parts = sections()
    names = run_blocks([*parts["Fine-tuning"], *parts["Plain PyTorch"], *parts[LORA]])
    ids = names["train_blocks"][:2]["input_ids"]
    tuned = names["model"].eval()(ids).logits
    torch.testing.assert_close(TemporalRwkvForCausalLM.from_pretrained("merged")(ids).logits, tuned)


def test_parameter_groups_decay_matrices_alone():
    model = random_model(perspective_vectors=["time_decay", "time_mix_k"])
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, learning_rate=1.0, vector_learning_rate=3.0, weight_decay=0.5)
    vectors, matrices, others = [{names[x] for x in group["params"]} for group in groups]
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(3.0, 0.0), (1.0, 0.5), (1.0, 0.0)]
    assert vectors == {name for name, _ in model.vector_parameters()}
    assert all(
        re.search(r"(att|ffn)\.(key|value|receptance|output)\.weight|head\.weight", name) for name in matrices
    )
    assert len(matrices) == 2 * 7 + 1
    assert {"rwkv.emb.weight", "rwkv.blocks.1.ln1.weight"} <= others
    assert len(vectors) + len(matrices) + len(others) == len(names)


def test_parameter_groups_of_what_trains():
    (group,) = parameter_groups(random_model().freeze_base(), learning_rate=0.1)
    assert group["lr"] == 0.1 and group["weight_decay"] == 0
    with pytest.raises(ValueError, match="at least one parameter that requires a gradient"):
        parameter_groups(random_model().requires_grad_(False), learning_rate=0.1)


def test_train_with_a_learning_rate_for_the_vectors(tmp_path):
    blocks = TokenBlocks(torch.randint(19, (6, 8)).numpy())
    model = random_model().freeze_base(train_head=True)
    vectors = {name for name, _ in model.vector_parameters()}
    for rates, expected in (((0.1, 0.0), {"head.weight"}), ((0.0, 0.1), vectors)):
        before = {name: x.clone() for name, x in model.state_dict().items()}
        settings = {"learning_rate": rates[0], "vector_learning_rate": rates[1]}
        train(model, blocks, tmp_path / "run", steps=2, batch_size=2, seed=0, **settings)
        assert {
            name for name, x in model.state_dict().items() if not torch.equal(x, before[name])
        } == expected


def test_a_training_killed_after_its_last_step_takes_no_other(tmp_path, monkeypatch):
    blocks = TokenBlocks(torch.randint(19, (6, 8)).numpy())
    settings = {"steps": 4, "batch_size": 2, "learning_rate": 0.1, "seed": 0}
    whole, killed, again = random_model(), random_model(), random_model()
    history = train(whole, blocks, tmp_path / "whole", **settings).history

    def kill(*_, **__):
        raise RuntimeError("killed")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr("trwkv.training.shutil.rmtree", kill)
        train(killed, blocks, tmp_path / "run", **settings)
    result = train(again, blocks, tmp_path / "run", **settings)
    assert (result.steps, result.tokens_per_second, result.history) == (0, 0, history)
    for name, x in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], x), name
    assert not (tmp_path / "run").exists()


def small_training(folder, **changed):
    settings = {"steps": 2, "batch_size": 2, "learning_rate": 0.1, "seed": 0} | changed
    model = settings.pop("model", None) or random_model()
    return train(model, TokenBlocks(torch.randint(19, (6, 8)).numpy()), folder, **settings)


@pytest.mark.parametrize("name", ["thesis.txt", "checkpoint-old"])
@pytest.mark.parametrize("with_checkpoint", [False, True])
def test_a_folder_with_other_things_is_left_alone(name, with_checkpoint, tmp_path):
    if with_checkpoint:
        (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"folder: expected a new or empty one.*holds {name}"):
        small_training(tmp_path)
    assert (tmp_path / name).read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 1 + with_checkpoint
    with pytest.raises(ValueError, match="folder: expected a folder; got "):
        small_training(tmp_path / name)


def test_what_comes_into_the_folder_while_training_stays(tmp_path):
    class Log(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            (tmp_path / "log.txt").write_text(str(state.global_step))

    (tmp_path / ".DS_Store").write_text("")  # hidden: no reason to refuse
    small_training(tmp_path, callbacks=[Log()])
    assert {path.name for path in tmp_path.iterdir()} == {".DS_Store", "log.txt"}
    assert (tmp_path / "log.txt").read_text() == "2"


@pytest.mark.parametrize("steps", [0, -1])
def test_training_takes_a_step(steps, tmp_path):
    with pytest.raises(ValueError, match=f"steps: expected a whole number of at least 1; got {steps}"):
        small_training(tmp_path / "run", steps=steps)
    assert not (tmp_path / "run").exists()


def test_training_a_frozen_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one parameter that requires a gradient; got none"):
        small_training(tmp_path / "run", model=random_model().requires_grad_(False))
    assert not (tmp_path / "run").exists()


def test_a_device_that_is_not_here_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    blocks = TokenBlocks(torch.randint(19, (6, 8)).numpy())
    for device, message in (("cuda", "no CUDA device here; got 'cuda'"), ("tpu", "of cpu, cuda; got 'tpu'")):
        with pytest.raises(ValueError, match=f"device: expected .*{message}"):
            small_training(tmp_path / "run", device=device)
        with pytest.raises(ValueError, match=f"device: expected .*{message}"):
            held_out_loss(random_model(), blocks, batch_size=2, device=device)
    assert not (tmp_path / "run").exists()


def test_accumulation_is_the_large_batch(tmp_path):
    """2 x 4 rows = 1 x 8, although the halves have different numbers of labels."""
    models = []
    for batch, accumulate in ((8, 1), (4, 2)):
        model = random_model()
        options = {"optim": "sgd", "learning_rate": 0.3, "save_strategy": "no", "max_steps": 2}
        options |= {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulate}
        Trainer(model, arguments(tmp_path, **options), train_dataset=Rows()).train()
        models.append(model)
    start = random_model()
    for (name, whole), parts, before in zip(
        models[0].named_parameters(), models[1].parameters(), start.parameters(), strict=True
    ):
        torch.testing.assert_close(parts, whole, msg=lambda m, name=name: f"{name}: {m}")
        assert not torch.equal(whole, before), name


@pytest.mark.parametrize("options", [{}, {"placement": "stream"}, {"n_perspectives": 1}], ids=str)
def test_vectors_and_selectors_bring_a_tuned_model_back(tmp_path, options):
    tuned, base = random_model(1, **options), random_model(2, **options)
    trained = dict(tuned.vector_parameters())
    for name, x in tuned.state_dict().items():
        if name not in trained:
            base.state_dict()[name].copy_(x)
    ids = Rows()[0]["input_ids"][None]
    assert not torch.equal(base(ids).logits, tuned(ids).logits)
    assert save_perspectives(tuned, tmp_path / "new").name == "perspectives.safetensors"
    load_perspectives(base, tmp_path / "new")
    assert torch.equal(base(ids).logits, tuned(ids).logits)


def test_perspectives_of_another_configuration_are_refused(tmp_path):
    save_perspectives(random_model(aggregation="mean"), tmp_path)
    other = random_model(aggregation="fixed", fixed_weights=[0.2, 0.3, 0.5])
    with pytest.raises(ValueError, match='aggregation "fixed", as the model has; got "mean"'):
        load_perspectives(other, tmp_path)
    wider = random_model(hidden_size=12, aggregation="mean")
    before = [x.clone() for x in wider.parameters()]
    with pytest.raises(ValueError, match="names and shapes"):
        load_perspectives(wider, tmp_path)
    assert all(torch.equal(x, y) for x, y in zip(before, wider.parameters(), strict=True))
    with pytest.raises(FileNotFoundError, match="save_perspectives writes it"):
        load_perspectives(wider, tmp_path / "missing")


def lora_model(folder, **options):
    from peft import LoraConfig, get_peft_model

    set_seed(0)
    model = TemporalRwkvForCausalLM.from_pretrained(folder)
    config = {"r": 2, "lora_alpha": 8, "target_modules": TIME_MIXING, "task_type": "CAUSAL_LM"} | options
    model = get_peft_model(model, LoraConfig(**config))
    for _, parameter in model.vector_parameters():
        parameter.requires_grad_(True)
    return model


@pytest.mark.parametrize("placement", ["layer", "stream"])
def test_lora_and_perspectives_come_back_bit_for_bit(tmp_path, placement):
    peft = pytest.importorskip("peft", reason="needs peft")
    random_model(placement=placement).save_pretrained(tmp_path / "base")
    model = lora_model(tmp_path / "base", modules_to_save=["head"])
    before = {name: x.clone() for name, x in model.named_parameters()}
    options = {"save_strategy": "no", "optim": "sgd", "learning_rate": 1.0}
    Trainer(model, arguments(tmp_path / "run", **options), train_dataset=Rows()).train()
    changed = {name for name, x in model.named_parameters() if not torch.equal(x, before[name])}
    assert changed == {name for name, x in model.named_parameters() if x.requires_grad}
    n_matrices = 2 * 4
    assert len(changed) == 2 * n_matrices + 1 + len(list(model.vector_parameters()))
    model.eval().save_pretrained(tmp_path / "adapter")
    save_perspectives(model, tmp_path / "adapter")
    ids = Rows()[0]["input_ids"][None]
    expected = model(ids).logits

    loaded = TemporalRwkvForCausalLM.from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(loaded, tmp_path / "adapter")
    load_perspectives(loaded, tmp_path / "adapter")
    assert torch.equal(loaded(ids).logits, expected)
    loaded.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = TemporalRwkvForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(ids).logits, expected)


def trainer_of_the_best(model, folder, **options):
    """A Trainer with a checkpoint and an evaluation every second step, which ends with the best of them."""
    options |= {"save_steps": 2, "eval_steps": 2, "eval_strategy": "steps", "load_best_model_at_end": True}
    return Trainer(
        model,
        arguments(folder, **options),
        train_dataset=Rows(),
        eval_dataset=Rows(),
        callbacks=[PerspectiveCheckpoints()],
    )


def test_a_lora_trainer_resumes_with_its_perspectives(tmp_path):
    pytest.importorskip("peft", reason="needs peft")
    random_model().save_pretrained(tmp_path / "base")
    results = []
    for checkpoint in (None, tmp_path / "run" / "checkpoint-2"):
        model = lora_model(tmp_path / "base", lora_dropout=0.1)
        trainer = trainer_of_the_best(model, tmp_path / "run")
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        results.append({name: x for name, x in model.named_parameters() if x.requires_grad})
    for name, x in results[0].items():
        assert torch.equal(results[1][name], x), name
    (tmp_path / "run" / "checkpoint-2" / "perspectives.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="checkpoint-2"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


def test_the_best_checkpoint_has_its_own_perspectives(tmp_path):
    pytest.importorskip("peft", reason="needs peft")
    random_model().save_pretrained(tmp_path / "base")
    model = lora_model(tmp_path / "base")
    # greater is better, so the best is the first
    options = {"greater_is_better": True, "metric_for_best_model": "eval_loss", "optim": "sgd"}
    trainer = trainer_of_the_best(model, tmp_path / "run", **options)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    best = trainer.state.best_metric
    assert trainer.evaluate()["eval_loss"] == best
    load_perspectives(model, tmp_path / "run" / "checkpoint-4")
    assert trainer.evaluate()["eval_loss"] != best


def test_there_are_no_attentions_to_return():
    model, ids = random_model(), Rows()[0]["input_ids"][None]
    assert torch.equal(model(ids, output_attentions=False).logits, model(ids).logits)
    with pytest.raises(ValueError, match="output_attentions: expected False"):
        model(ids, output_attentions=True)
