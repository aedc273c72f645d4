"""Masks on real text: do seek and reject masks move a choice test to both sides of the dense model?

The data of the paper of persona subnetworks (arXiv 2602.07164), `power_train.csv` and `power_test_mc.csv`: questions
about power and influence, each with an answer that seeks them and one that does not. A small Llama is trained from
nothing on the training questions with both answers, so that it knows both personas and leans to neither. Masks are then
made from the calibration texts of one side, the same questions with that side's answers; nothing is trained again.

Measured here: how often the seeking answer of a held-out item is the likelier one (length-normalised), under the masks
of both sides and without a mask, with paired intervals over the same items; and the perplexity of held-out questions.
Every seed trains a model of its own. A score moves the choice as a persona should where seek lies above and reject
below the dense model, both intervals clear of 0.

Settings were picked on seed 0, which is not among the reported ones.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import random
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import _common as c
import torch

from personafast import Persona, PersonafastError, PersonaLibrary, attach
from personafast._io import atomic_directory, read_json, write_json
from personafast.errors import FormatError
from personafast.evaluate import Choices, choose, paired_difference, perplexity, read_items, wilson
from personafast.masks import PersonaMask, build_mask, build_opposing_masks, calibrate
from personafast.models.reading import TokenizedText

ROOT = Path(__file__).resolve().parents[1]
DATA, CACHE = ROOT.parent / "shared" / "data" / "subnetworks", ROOT / "build" / "power"
TRAIN, TEST = "power_train.csv", "power_test_mc.csv"
SIDES = {"seek": "matching", "reject": "not_matching"}
SCORES = ("random", "wanda", "contrastive_wanda", "contrastive_sparse")
SPARSITIES = (0.3, 0.4, 0.5)
SEEDS = (1, 2, 3)
HELD_OUT = 60  # questions whose perplexity is taken
END, DENSE = "</s>", "no mask"


@dataclass(frozen=True)
class Size:
    """The model and its training; what is cached is of one size."""

    hidden: int = 64
    layers: int = 2
    heads: int = 4
    vocabulary: int = 1024
    epochs: int = 10
    batch: int = 32
    learning_rate: float = 4e-3
    question: int = 96
    answer: int = 48


def read_sides(path: Path) -> list[tuple[str, str, str]]:
    """(prompt, seeking answer, other answer) of every row; rows that lack one of them are left out.

    Raises:
        FormatError: no such file, or another layout.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [[(row[key] or "").strip() for key in ("question", *SIDES.values())] for row in csv.DictReader(file)]
    except FileNotFoundError:
        raise FormatError(f"{path}: no such file; give the folder that holds it with --data") from None
    except KeyError:
        raise FormatError(f"{path}: lacks a column; expected question, matching, not_matching") from None
    return [(f"Question: {question}\nAnswer:", f" {a}", f" {b}") for question, a, b in rows if question and a and b]


def make_tokenizer(texts: Sequence[str], vocabulary: int) -> Any:
    """A byte-level BPE learned from the texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<pad>", END], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token=END)


def tokenised(tokenizer: Any, rows: Sequence[tuple[str, str, str]], side: int, size: Size) -> list[TokenizedText]:
    """Every question with the answers of one side, cut to the model's lengths."""
    texts = []
    for row in rows:
        question = tokenizer(row[0])["input_ids"][: size.question]
        answer = [*tokenizer(row[1 + side])["input_ids"], tokenizer.eos_token_id][: size.answer]
        texts.append(TokenizedText([*question, *answer], len(answer)))
    return texts


def train(texts: Sequence[TokenizedText], vocabulary: int, size: Size, seed: int, progress: c.Progress) -> Any:
    """A Llama over these texts: AdamW, a linear warm-up, a cosine decay, all tokens predicted."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=size.hidden,
            intermediate_size=3 * size.hidden,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.heads,
            max_position_embeddings=1024,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
            tie_word_embeddings=True,
        )
    )
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=size.learning_rate, weight_decay=0.05)
    total = size.epochs * -(-len(texts) // size.batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 40) * (0.02 + 0.5 * (1 + math.cos(math.pi * step / total)))
    )
    for epoch in range(size.epochs):
        progress(f"seed {seed}: training, {epoch + 1} of {size.epochs}")
        # Texts of about one length share a batch, drawn anew every time.
        order = sorted(range(len(texts)), key=lambda index: len(texts[index].ids) + 20 * rng.random())
        batches = [order[start : start + size.batch] for start in range(0, len(order), size.batch)]
        rng.shuffle(batches)
        for chosen in batches:
            rows = [torch.tensor(texts[index].ids) for index in chosen]
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            live = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
            loss = model(input_ids=ids, attention_mask=live, labels=ids.masked_fill(live == 0, -100)).loss
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return model.eval()


def trained(
    rows: Sequence[tuple[str, str, str]], size: Size, seed: int, cache: Path, progress: c.Progress
) -> tuple[Any, Any]:
    """The model of a seed and its tokenizer: from the cache if it holds one of this size and these texts, else made."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder, key = cache / f"seed-{seed}", {**asdict(size), "rows": len(rows)}
    if not (folder / "size.json").is_file() or read_json(folder / "size.json") != key:
        tokenizer = make_tokenizer([text for row in rows for text in row], size.vocabulary)
        both = [text for side in (0, 1) for text in tokenised(tokenizer, rows, side, size)]
        model = train(both, len(tokenizer), size, seed, progress)
        with atomic_directory(folder) as target:
            model.save_pretrained(target)
            tokenizer.save_pretrained(target)
            write_json(target / "size.json", key)
    # Read back in either case, so that a cached run and a first one are the same.
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def opposing(model: Any, statistics: Sequence[Any], score: str, sparsity: float, seed: int) -> Sequence[PersonaMask]:
    """The masks of both sides; a random one has no side, so both are the same."""
    if score.startswith("contrastive"):
        return build_opposing_masks(model, *statistics, score=score, sparsity=sparsity)
    masks = [build_mask(model, side, score=score, sparsity=sparsity, seed=seed) for side in statistics]
    return masks


def judged(choices: Choices, dense: Choices) -> dict[str, int]:
    """Counts of items: the seeking answer chosen, chosen under the mask alone, under the dense model alone."""
    mine, theirs = choices.hits("matching"), dense.hits("matching")
    return {
        "items": len(mine),
        "seeking": sum(mine),
        "only_mask": sum(a and not b for a, b in zip(mine, theirs, strict=True)),
        "only_dense": sum(b and not a for a, b in zip(mine, theirs, strict=True)),
    }


def trials(args: argparse.Namespace, size: Size, progress: c.Progress) -> Iterator[dict[str, Any]]:
    """A record for every seed's dense model, and for every score, sparsity, side and seed."""
    rows = read_sides(args.data / TRAIN)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an item with an empty question is left out
        items = read_items(args.data / TEST)[: args.items]
    held_out = [item.question for item in items[:HELD_OUT]]
    for seed in args.seeds:
        model, tokenizer = trained(rows, size, seed, args.cache, progress)
        progress(f"seed {seed}: no mask")
        dense = choose(model, tokenizer, items)
        record = {"score": DENSE, "sparsity": 0.0, "side": "-", "seed": seed, **judged(dense, dense)}
        yield {**record, "perplexity": perplexity(model, tokenizer, held_out).value}
        statistics = [calibrate(model, tokenised(tokenizer, rows, side, size)) for side in (0, 1)]
        for score, sparsity in itertools.product(SCORES, args.sparsities):
            masks = dict(zip(SIDES, opposing(model, statistics, score, sparsity, seed), strict=True))
            library = PersonaLibrary()
            for side, mask in masks.items():
                library.add_mask(side, mask)
            with attach(model, library, tokenizer=tokenizer) as handle:
                for side in SIDES if score != "random" else ("seek",):
                    progress(f"seed {seed}: {score}, {sparsity:g}, {side}")
                    with handle.using([Persona(mask=side)]):
                        found = judged(choose(model, tokenizer, items), dense)
                        general = perplexity(model, tokenizer, held_out).value
                    shown = side if score != "random" else "-"
                    yield {
                        "score": score,
                        "sparsity": sparsity,
                        "side": shown,
                        "seed": seed,
                        **found,
                        "perplexity": general,
                    }


def pooled(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several seeds as one record: accuracy, paired difference from the dense model, geometric mean perplexity."""
    first = records[0]
    total = {key: sum(record[key] for record in records) for key in ("items", "seeking", "only_mask", "only_dense")}
    return {
        **{key: first[key] for key in ("score", "sparsity", "side")},
        "accuracy": wilson(total["seeking"], total["items"])._asdict(),
        "difference": paired_difference(total["only_mask"], total["only_dense"], total["items"])._asdict(),
        "seeds": [(record["only_mask"] - record["only_dense"]) / record["items"] for record in records],
        "perplexity": math.exp(sum(math.log(record["perplexity"]) for record in records) / len(records)),
    }


def cells(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The pooled records, in the order in which they were first measured."""
    found: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for record in records:
        found.setdefault((record["score"], record["sparsity"], record["side"]), []).append(record)
    return [pooled(each) for each in found.values()]


def report(result: Mapping[str, Any]) -> c.Report:
    """The table, the plot and what follows."""
    table, settings = cells(result["methods"]), result["settings"]
    dense = next(cell for cell in table if cell["score"] == DENSE)
    both: dict[str, list[str]] = {}
    one: list[str] = []
    for score, sparsity in itertools.product(SCORES[1:], settings["sparsities"]):
        seek, reject = (
            next(cell for cell in table if (cell["score"], cell["sparsity"], cell["side"]) == (score, sparsity, side))
            for side in SIDES
        )
        up, down = seek["difference"]["low"] > 0, reject["difference"]["high"] < 0
        if up and down:
            both.setdefault(score, []).append(f"{sparsity:g}")
        else:
            what = "seek only" if up else "reject only" if down else "neither"
            one.append(f"{score} {sparsity:g} ({what})")
    columns = [
        c.Column("score", lambda r: r["score"]),
        c.Column("sparsity", lambda r: f"{r['sparsity']:g}"),
        c.Column("side", lambda r: r["side"]),
        c.Column("seeking answer [95 %]", lambda r: c.interval(r["accuracy"])),
        c.Column("less dense, points [95 %]", lambda r: "-" if r["score"] == DENSE else _points(r["difference"])),
        c.Column(
            "each seed", lambda r: "-" if r["score"] == DENSE else ", ".join(f"{100 * s:+.0f}" for s in r["seeds"])
        ),
        c.Column("perplexity", lambda r: f"{r['perplexity']:,.0f}"),
    ]
    said = "; ".join(f"{score} at {', '.join(at)}" for score, at in both.items()) or "none"
    findings = [
        f"The dense model takes the seeking answer in {c.percent(dense['accuracy']['rate'], 1)} of items. Seek above "
        f"it and reject below it, both intervals clear of 0: {said}.",
        f"Not: {', '.join(one) or 'none'}.",
        "Perplexity (geometric mean over the seeds) is of held-out questions, which have no persona: what a mask costs "
        f"in general; {dense['perplexity']:.0f} without one.",
    ]

    def draw(figure: Any) -> None:
        places = settings["sparsities"]
        for axes, score in zip(figure.subplots(1, 3, sharey=True), SCORES[1:], strict=True):
            for side, colour in zip(SIDES, c.COLOURS, strict=False):
                mine = [cell["difference"] for cell in table if (cell["score"], cell["side"]) == (score, side)]
                axes.plot(places, [100 * d["rate"] for d in mine], "o-", color=colour, label=side, lw=1.8)
                low, high = ([100 * d[end] for d in mine] for end in ("low", "high"))
                axes.fill_between(places, low, high, color=colour, alpha=0.12, lw=0)
            axes.axhline(0, color=c.INK, lw=0.8)
            axes.set_title(score, size=10, color=c.INK)
            axes.set_xlabel("sparsity", color=c.INK)
        figure.axes[0].set_ylabel("seeking answers less dense, points (band: 95 %)", color=c.INK)
        figure.axes[0].legend(frameon=False)

    models = f"Models trained from scratch, one a seed ({', '.join(map(str, settings['seeds']))})"
    said = (
        f"{models}, {settings['items']} two-way items each; log-probability of an answer a token; Wilson intervals and "
        "paired ones (Bonett and Price) over items and seeds."
    )
    return c.Report([c.Section("Choice of the seeking answer", columns, table)], findings, draw, said)


def _points(value: Mapping[str, float]) -> str:
    return f"{100 * value['rate']:+.1f} [{100 * value['low']:+.1f}, {100 * value['high']:+.1f}]"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA, metavar="FOLDER", help=f"holds {TRAIN} and {TEST}")
    parser.add_argument("--cache", type=Path, default=CACHE, metavar="FOLDER", help="keeps the trained models")
    c.grid(parser, SEEDS, SPARSITIES)
    parser.add_argument("--epochs", type=int, default=Size().epochs, help=f"of training ({Size().epochs})")
    parser.add_argument("--items", type=int, default=200, help="of the choice test, from its start (200)")
    c.outputs(parser, name="power")
    args = parser.parse_args(argv)
    for option in ("epochs", "items"):
        if getattr(args, option) < 1:
            raise PersonafastError(f"--{option} {getattr(args, option)}: give at least 1")
    c.check_grid(args)
    c.check_outputs(args)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run the experiment."""
    args = parse(argv)
    size = Size(epochs=args.epochs)
    a_seed = size.epochs + 1 + (2 * len(SCORES) - 1) * len(args.sparsities)
    with c.Steps(len(args.seeds) * a_seed) as progress:
        records = list(trials(args, size, progress))
    settings = {
        "model": asdict(size),
        "items": records[0]["items"],
        "seeds": args.seeds,
        "sparsities": args.sparsities,
        "machine": c.machine(),
    }
    result = {"experiment": "power", "settings": settings, "methods": records}
    c.deliver(args, result, report(result))


if __name__ == "__main__":
    sys.exit(c.run(main))
