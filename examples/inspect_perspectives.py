"""What the perspectives of a model have become: their decays, whom the selectors believe, whether they differ.

    python examples/inspect_perspectives.py --model three-perspectives --text "The old man went back to the sea."

Prints a table and draws three pictures into one PNG: the tokens after which half of a memory is gone, per layer and
perspective; the weights of the perspectives over the tokens of the text; and how far apart the perspectives' vectors
are in each layer, relative to their size: 0 is a perspective that collapsed onto another.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from trwkv.cli import load_model
from trwkv.data import check_vocabulary, load_tokenizer
from trwkv.diversity import half_lives, selector_weights, vector_distances
from trwkv.report import format_table

QUANTILES = (0.1, 0.5, 0.9)


def draw(
    path: Path, lives: list[Tensor], weights: list[Tensor], apart: list[float], tokens: list[str]
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(16, 4.5), layout="constrained")
    for p in range(max(len(x) for x in lives)):
        low, half, high = ([float(x[min(p, len(x) - 1)].quantile(q)) for x in lives] for q in QUANTILES)
        left.plot(half, marker="o", label=f"perspective {p}")
        left.fill_between(range(len(half)), low, high, alpha=0.15)
    left.set(yscale="log", xlabel="layer", ylabel="half-life in tokens", title="Memory: median, 10 % to 90 %")
    left.legend()
    mean = torch.stack(weights).mean(0)
    for p in range(mean.shape[1]):
        middle.plot(mean[:, p], marker=".", label=f"perspective {p}")
    middle.set(
        ylabel="weight", title=f"Selector{' (mean of the layers)' if len(weights) > 1 else ''}", ylim=(0, 1)
    )
    middle.set_xticks(range(len(tokens)), [x.replace("$", r"\$") for x in tokens], rotation=90, fontsize=7)
    right.bar(range(len(apart)), apart)
    right.set(xlabel="layer", ylabel="relative distance", title="The two closest perspectives")
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a model with two perspectives or more")
    parser.add_argument("--tokenizer", help="(default: the model's folder)")
    parser.add_argument(
        "--text", default="The old man went back to the sea, because the sea was all he knew."
    )
    parser.add_argument(
        "--output", type=Path, default=Path("perspectives.png"), help="(default: %(default)s)"
    )
    options = parser.parse_args()
    if not options.output.absolute().parent.is_dir():
        parser.error(f"--output: expected a file in a folder that exists; got {options.output}")
    try:
        model = load_model(options.model, "float32").eval()
        tokenizer = load_tokenizer(options.tokenizer or options.model)
        check_vocabulary(tokenizer, model.config.vocab_size)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    P = model.config.n_perspectives
    if P < 2:
        parser.error(f"--model: expected two perspectives or more; {options.model} has {P}")
    input_ids = tokenizer(options.text, return_tensors="pt")["input_ids"]
    if not input_ids.shape[1]:
        parser.error("--text: expected at least one token; got none")
    lives, apart = half_lives(model), vector_distances(model)
    weights = selector_weights(model, input_ids)
    rows = []
    for i, (life, distance) in enumerate(zip(lives, apart, strict=True)):
        medians = [float(life[min(p, len(life) - 1)].median()) for p in range(P)]
        own = weights[i].mean(0).tolist() if len(weights) == len(lives) else [None] * P
        rows.append([i, *medians, *own, distance])
    header = [
        "layer",
        *(f"half-life {p}" for p in range(P)),
        *(f"weight {p}" for p in range(P)),
        "closest two",
    ]
    print(format_table(header, rows))
    if len(weights) != len(lives):
        print("weights of the last selector:", ", ".join(f"{x:.3f}" for x in weights[-1].mean(0).tolist()))
    tokens = [tokenizer.decode([i]) for i in input_ids[0].tolist()]
    draw(options.output, lives, weights, apart, tokens)
    print(f"drawn: {options.output}")


if __name__ == "__main__":
    main()
