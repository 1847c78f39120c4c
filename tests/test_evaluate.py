"""lm-eval's numbers, checked against scores computed here, and the errors of the entry."""

import json
import math
import socket

import pytest
import torch

from trwkv.evaluate import check_tasks, evaluate
from trwkv.models import TemporalRwkvConfig, TemporalRwkvForCausalLM
from trwkv.synthetic import byte_tokenizer, lambada_passages

TOKENIZER = byte_tokenizer()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = TemporalRwkvConfig(
        vocab_size=256, hidden_size=16, num_hidden_layers=2, n_perspectives=2, perspective_noise=0.1
    )
    model = TemporalRwkvForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():  # the start is a near-uniform model: make its scores differ
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.train()


@pytest.fixture(scope="module")
def passages(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "passages.jsonl"
    texts = [row["text"] for row in lambada_passages(13, split="eval")]
    texts.append('"Ça va?" she asked.\n\nHe said\u2028nothing about the weather')
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
    return path, texts


def scores_by_hand(model, texts, prefix=""):
    """Log-likelihood of each last word, with the space before it, and whether greedy decoding gives it."""
    likelihoods, hits = [], []
    model.eval()
    for text in texts:
        context, target = (prefix + text[: text.rindex(" ")]).encode(), text[text.rindex(" ") :].encode()
        ids = torch.tensor([list(context + target)])
        with torch.no_grad():
            log_p = model(ids).logits.log_softmax(-1)[0, len(context) - 1 : -1]
        labels = ids[0, len(context) :]
        likelihoods.append(log_p.gather(1, labels[:, None]).sum().item())
        hits.append(bool((log_p.argmax(-1) == labels).all()))
    model.train()
    return math.exp(-sum(likelihoods) / len(texts)), sum(hits) / len(texts)


@pytest.mark.parametrize("newline_prefix", [False, True])
def test_equals_scores_by_hand_whatever_the_batch_size(model, passages, newline_prefix):
    path, texts = passages
    perplexity, accuracy = scores_by_hand(model, texts, "\n" * newline_prefix)
    for batch_size in (1, 3, 64):
        results = evaluate(model, TOKENIZER, [path], batch_size=batch_size, newline_prefix=newline_prefix)
        assert list(results) == ["passages.jsonl"]
        scores = results["passages.jsonl"]
        assert scores["perplexity"] == pytest.approx(perplexity, rel=1e-4)
        assert scores["acc"] == accuracy
        assert scores["n"] == len(texts)
    assert model.training


def test_prefix_matters_and_limit_limits(model, passages):
    path, texts = passages
    plain = evaluate(model, TOKENIZER, [str(path)], limit=5)["passages.jsonl"]
    prefixed = evaluate(model, TOKENIZER, [str(path)], limit=5, newline_prefix=True)["passages.jsonl"]
    assert plain["n"] == 5
    assert plain["perplexity"] == pytest.approx(scores_by_hand(model, texts[:5])[0], rel=1e-4)
    assert plain["perplexity"] != prefixed["perplexity"]


def test_a_model_that_knows_the_answers_is_right(passages):
    """Accuracy 1 and perplexity 1 for a model that was told what to say."""
    path, texts = passages
    known = {
        text.encode()[:end]: text.encode()[end] for text in texts for end in range(1, len(text.encode()))
    }

    class Oracle(TemporalRwkvForCausalLM):
        def forward(self, input_ids, **kwargs):
            logits = torch.zeros(*input_ids.shape, 256)
            for row, ids in enumerate(input_ids.tolist()):
                for place in range(len(ids)):
                    logits[row, place, known.get(bytes(ids[: place + 1]), 0)] = 100.0
            return type("Output", (), {"logits": logits})

    config = TemporalRwkvConfig(vocab_size=256, hidden_size=8, num_hidden_layers=1)
    scores = evaluate(Oracle(config), TOKENIZER, [path])["passages.jsonl"]
    assert scores["acc"] == 1.0
    assert scores["perplexity"] == pytest.approx(1.0)


def test_random_state_is_left_alone(model, passages):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    evaluate(model, TOKENIZER, [passages[0]], limit=1)
    assert torch.rand(1) == expected


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "does not exist"),
        ("", "holds no passage"),
        ('{"passage": "a b"}\n', "passage 1: expected"),
        ('{"text": "a b"}\nnot json\n', "passage 2: expected"),
        ('{"text": "word"}\n', "a context and a last word"),
        (b'{"text": "a caf\xe9"}\n', r"x\.jsonl: expected UTF-8; "),
    ],
)
def test_bad_files(model, tmp_path, content, named):
    path = tmp_path / "x.jsonl"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=named):
        evaluate(model, TOKENIZER, [path])


def test_groups_filters_and_metrics_of_several_numbers():
    """As lm-eval reports them; a group is no task, and has no samples."""
    from trwkv import evaluate as module

    several = {"exact_match,strict": 0.1, "exact_match,flexible": 0.4, "exact_match_stderr,strict": "N/A"}
    report = {
        "results": {
            "mmlu": {"name": "mmlu", "sample_len": 5, "acc,none": 0.5},
            "gsm8k": {"sample_len": 2, **several},
            "wikitext": {"sample_len": 1, "word_perplexity,none": 9.0},
        },
        "n-samples": {"gsm8k": {"effective": 2}, "wikitext": {"effective": 1}},
        "samples": {
            "gsm8k": [
                {"doc_id": i, "filter": name, "metrics": ["exact_match"], "exact_match": value}
                for name, values in (("strict", (0, 1)), ("flexible", (2, 3)))
                for i, value in ((1, values[1]), (0, values[0]))
            ],
            "wikitext": [
                {
                    "doc_id": 0,
                    "filter": "none",
                    "metrics": ["word_perplexity", "acc"],
                    "word_perplexity": (1.0, 2),
                }
                | {"acc": True}
            ],
        },
    }
    assert module._metrics(report, None) == {
        "mmlu": {"acc": 0.5, "n": 5},
        "gsm8k": {"exact_match,strict": 0.1, "exact_match,flexible": 0.4, "n": 2},
        "wikitext": {"word_perplexity": 9.0, "n": 1},
    }
    assert module._samples(report, None) == {
        "gsm8k": {"exact_match,strict": [0.0, 1.0], "exact_match,flexible": [2.0, 3.0]},
        "wikitext": {"acc": [1.0]},
    }


def test_bad_arguments(model, passages):
    with pytest.raises(ValueError, match="tasks: expected a list"):
        check_tasks([])
    with pytest.raises(ValueError, match="tasks: expected a list"):
        check_tasks("passages.jsonl")
    with pytest.raises(ValueError, match="batch_size: expected a number of at least 1"):
        evaluate(model, TOKENIZER, [passages[0]], batch_size=0)
    with pytest.raises(ValueError, match="limit: expected None or at least 1"):
        evaluate(model, TOKENIZER, [passages[0]], limit=0)


def test_hub_task_without_a_network_says_what_to_do(monkeypatch):
    from huggingface_hub import constants

    def unreachable(*args, **kwargs):
        raise socket.gaierror("no network")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ValueError, match=r"sciq has to come from the Hugging Face hub.*HF_HUB_OFFLINE=1"):
        check_tasks(["sciq"])
