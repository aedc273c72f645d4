"""What holds each operator back, in words; the figures beside them come from the results."""

from __future__ import annotations

# Operator, or "decode" -> what the page says above its table, in Markdown.
NOTES: dict[str, str] = {
    "linear": (
        "Bound by memory for few rows. At 1 row what is missing is the start of each thread's part, before its fetches "
        "run ahead; from 5 rows on, x and the fetched weights share L1 and L2 with what is multiplied, and from 17 the "
        "multiply-adds take about as long as the memory, of which only part runs at the same time. The ratio to "
        "`F.linear` moves with the speed of memory, seen between 37 and 70 GB/s on this shared machine: torch is bound "
        "by other things and hardly changes. int8 and int4 are weight-only quantisation as it runs on a CPU here. They "
        "read 8 and about 4.5 bits a weight where bf16 has 16, and what they lose stands beside them as relative error."
    ),
    "masked_linear": (
        "The weight once and a bit a weight and row. Each mask word costs a load into a mask register (0.7 cycles), a "
        "masked move and a multiply-add, so that from about 8 distinct masks arithmetic takes as long as memory."
    ),
    "sparse_linear": (
        "A weight costs 9 bits on average at one half kept: a bit of the map, and 16 bits for every other weight. That "
        "beats the 16 bits of a dense weight and does not beat the 4 to 5 of int4; a compressed mask is exact, int4 is "
        "not. Spreading takes about 2 cycles a word, which is close to what the memory takes when it is fast."
    ),
    "lora_delta_": (
        "A few percent of the bytes of the layer beside it, read while nothing else is: the cost is their own reading "
        "and the call."
    ),
    "token_logprobs": (
        "Bound by reading the head up to some 16 rows, by the multiply-adds at 64, where torch's matrix product is "
        "nearly as fast and the logits' memory is what is saved."
    ),
    "decode": (
        "Between the linears a step spends 5 to 7 ms in Python and small operators of torch (attention 1.5 to 2.5, "
        "rotary embedding, residuals, caches), the same with and without personas; with weights compressed that is a "
        "quarter of the step. The tied head of the Qwen shape, 27 % of its bytes, is dense in every row of the table."
    ),
    "chunk_scores": "A few hundred bytes a call: what is measured is the call itself, not memory.",
    "philox.uniform": "A few numbers a call: what is measured is the call itself, not memory.",
    "blend": (
        "Members that share a base share its reads: what policies add is their factors, their own keys and values, "
        "and, from about 16 rows, arithmetic, so that the time of 16 policies against that of one moves between 1.4 "
        "and 1.65 with what else the shared cores do. PEFT's loop has its four adapters loaded and keeps a cache for "
        "each member. Token-level rejection proposes again from the logits it has, at no cost, though one proposal in "
        "ten stands; a chunk of four gives `scr` 2.0 tokens for its four passes of the reference and one of each "
        "policy. The published 3x over token-level rejection needs proposals that cost passes of the policies."
    ),
}
