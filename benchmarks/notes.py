"""What holds each operator back, in words; the figures beside them come from the results."""

from __future__ import annotations

# Operator, or "decode" -> what the page says above its table, in Markdown.
NOTES: dict[str, str] = {
    "linear": (
        "int8 and int4 baselines are weight-only quantisation as it runs on a CPU here. They read 8 and about 4.5 bits "
        "a weight where bf16 has 16, and what they lose stands beside them as relative error."
    ),
    "sparse_linear": (
        "A weight costs 9 bits on average at one half kept: a bit of the map, and 16 bits for every other weight. That "
        "beats the 16 bits of a dense weight and does not beat the 4 to 5 of int4; a compressed mask is exact, int4 is "
        "not."
    ),
    "chunk_scores": "A few hundred bytes a call: what is measured is the call itself, not memory.",
    "philox.uniform": "A few numbers a call: what is measured is the call itself, not memory.",
}
