"""Our directions beside those of repeng, steering-vectors and scikit-learn: one model, one set of text pairs.

    python -m benchmarks.peers_vectors          # writes benchmarks/results/peers/vectors.json

The two packages ask for versions that exclude each other, so they go without their dependencies into an environment of
their own, in which both work:

    pip install -e . scikit-learn gguf "numpy<2"
    pip install --no-deps repeng steering-vectors

What each package reads is what we read with `positions="response_last"` on plain pairs: the last token of every text.
repeng's last layer is left out: it reads that one behind the final norm, where nothing is ever injected.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import random
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.results import FOLDER
from personafast import zoo
from personafast._io import write_json
from personafast.models.anatomy import anatomy
from personafast.models.reading import TokenizedText
from personafast.vectors import TextPairs, extract_vectors
from personafast.vectors.means import TextMeans, read_means
from personafast.zoo.corpus import contrast

PAIRS, SEED = 48, 7
REACHED = 0.999


def text_pairs(tokenizer: Any, trait: str, count: int = PAIRS) -> TextPairs:
    """Rendered chats of the zoo's corpus, with and without a trait; their ends differ."""
    drawn = itertools.islice(contrast(trait, random.Random(SEED)), count)
    sides = zip(*((_text(tokenizer, a), _text(tokenizer, b)) for a, b in drawn), strict=True)
    return TextPairs(*map(list, sides))


def _text(tokenizer: Any, conversation: Any) -> str:
    # Without the end token, on which every reply would end alike.
    rendered: str = tokenizer.apply_chat_template(conversation.messages(), tokenize=False)
    return rendered.removesuffix(tokenizer.eos_token)


def repeng_directions(model: Any, tokenizer: Any, pairs: TextPairs, method: str) -> dict[int, torch.Tensor]:
    """Block -> direction of repeng's own training, without its last layer."""
    from repeng.extract import ControlVector, DatasetEntry

    entries = [DatasetEntry(a, b) for a, b in zip(pairs.positive, pairs.negative, strict=True)]
    found = ControlVector.train(model, tokenizer, entries, method=method, batch_size=8).directions
    last = model.config.num_hidden_layers - 1
    return {block: torch.as_tensor(row) for block, row in found.items() if block != last}


def steering_vectors_directions(model: Any, tokenizer: Any, pairs: TextPairs) -> dict[int, torch.Tensor]:
    """Block -> mean difference at the last token by steering-vectors."""
    from steering_vectors import train_steering_vector

    samples = list(zip(pairs.positive, pairs.negative, strict=True))
    return dict(train_steering_vector(model, tokenizer, samples, read_token_index=-1).layer_activations)


def sklearn_directions(model: Any, tokenizer: Any, pairs: TextPairs) -> dict[int, torch.Tensor]:
    """Block -> weights of scikit-learn's logistic regression on standardised activations, mapped back."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    sides = []
    for texts in (pairs.positive, pairs.negative):
        means = TextMeans(len(texts))
        tokenised = [TokenizedText.from_text(tokenizer, text) for text in texts]
        read_means(model, tokenised, means, positions="response_last")
        sides.append(means)
    labels = [1] * len(pairs.positive) + [0] * len(pairs.negative)
    found = {}
    for block in range(len(anatomy(model).blocks)):
        rows = torch.cat([side.block(block) for side in sides]).double().numpy()
        scaler = StandardScaler().fit(rows)
        probe = LogisticRegression(C=1.0, tol=1e-10, max_iter=10_000).fit(scaler.transform(rows), labels)
        found[block] = torch.as_tensor(probe.coef_[0] / scaler.scale_)
    return found


PEERS: dict[str, tuple[str, str, Callable[..., dict[int, torch.Tensor]]]] = {
    "repeng pca_diff": ("repeng", "pca_diff", lambda *args: repeng_directions(*args, "pca_diff")),
    "repeng pca_center": ("repeng", "pca_center", lambda *args: repeng_directions(*args, "pca_center")),
    "steering-vectors mean": ("steering-vectors", "mean_diff", steering_vectors_directions),
    "scikit-learn logistic regression": ("scikit-learn", "logistic", sklearn_directions),
}


def compare(peer: str, trait: str) -> dict[int, float]:
    """Block -> cosine between the peer's direction and ours."""
    model, tokenizer, _ = zoo.load()
    pairs = text_pairs(tokenizer, trait)
    _, method, theirs = PEERS[peer]
    ours = extract_vectors(model, tokenizer, {trait: pairs}, method=method, positions="response_last")[trait].directions
    return {
        block: float(torch.cosine_similarity(ours[block].double(), row.double(), dim=0))
        for block, row in sorted(theirs(model, tokenizer, pairs).items())
    }


def main() -> None:
    traits = sorted(zoo.DEMO_TRAITS)
    record: dict[str, Any] = {"pairs": PAIRS, "seed": SEED, "model": "zoo", "cosines": {}}
    for peer, (package, method, _) in PEERS.items():
        version = importlib.metadata.version(package)
        rows = {trait: {str(k): round(v, 6) for k, v in compare(peer, trait).items()} for trait in traits}
        lowest = min(value for row in rows.values() for value in row.values())
        record["cosines"][peer] = {"version": version, "ours": method, "lowest": lowest, "by_trait_and_block": rows}
        print(f"{peer} {version}: lowest cosine {lowest:.6f} over {', '.join(traits)}")
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy")}
    write_json(FOLDER / "peers" / "vectors.json", {**record, "versions": versions})


if __name__ == "__main__":
    main()
