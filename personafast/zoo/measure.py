"""Plain measurement of the zoo's quality: one cache a model, one forward a token, nothing clever.

The build checks its bars with this, independently of the samplers in :mod:`personafast.density`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from personafast.zoo.grammar import is_grammatical
from personafast.zoo.traits import TRAITS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Combine = Callable[[list[torch.Tensor]], torch.Tensor]
"""Log-probabilities of every model [rows, vocabulary] to log-probabilities of the next token, same shape."""


def min_p_filter(logp: torch.Tensor, min_p: float) -> torch.Tensor:
    """Drop tokens below ``min_p`` times the largest probability of their row and renormalise."""
    floor = logp.amax(-1, keepdim=True) + torch.log(torch.tensor(min_p))
    return logp.masked_fill(logp < floor, -torch.inf).log_softmax(-1)


def alone(min_p: float = 0.05) -> Combine:
    """One model by itself."""
    return lambda logps: min_p_filter(logps[0], min_p)


def geometric(weights: Sequence[float], min_p: float = 0.05) -> Combine:
    """log pi0 + sum w_i (log pi_i - log pi0), on tokens that at least one policy supports; the reference is first."""

    def combine(logps: list[torch.Tensor]) -> torch.Tensor:
        reference, *policies = logps
        target, keep = reference.clone(), torch.zeros_like(reference, dtype=torch.bool)
        for weight, policy in zip(weights, policies, strict=True):
            target += weight * (policy - reference)
            keep |= min_p_filter(policy, min_p).isfinite()
        return target.masked_fill(~keep, -torch.inf).log_softmax(-1)

    return combine


class Linear:
    """The mixture of the policies with weights carried along the text, on tokens that at least one supports.

    Good for one call of :func:`sample`: it remembers how likely each policy found what was written.
    """

    def __init__(self, weights: Sequence[float], min_p: float = 0.05):
        self.min_p = min_p
        self.carried = torch.tensor(weights, dtype=torch.float32).log()[:, None]
        self.policies = torch.empty(0)

    def __call__(self, logps: list[torch.Tensor]) -> torch.Tensor:
        """The mixture's log-probabilities."""
        self.policies = torch.stack(logps[1:])
        keep = min_p_filter(self.policies, self.min_p).isfinite().any(0)
        target = torch.logsumexp(self.carried[..., None] + self.policies, 0)
        return target.masked_fill(~keep, -torch.inf).log_softmax(-1)

    def accept(self, tokens: torch.Tensor) -> None:
        """Carry the weights past the tokens that were drawn."""
        index = tokens[None, :, None].expand(len(self.policies), -1, 1)
        self.carried = (self.carried + self.policies.gather(-1, index)[..., 0]).log_softmax(0)


@torch.inference_mode()
def sample(
    models: Sequence[PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    heads: Sequence[Sequence[list[dict[str, str]]]],
    combine: Combine,
    seed: int = 0,
    max_new_tokens: int = 64,
) -> list[str]:
    """Sample one reply a row at T = 1; ``heads[m][row]`` are the messages that model m sees before the reply."""
    generator = torch.Generator().manual_seed(seed)
    state: list[dict[str, Any]] = []
    for model, rows in zip(models, heads, strict=True):
        texts = [tokenizer.apply_chat_template(row, add_generation_prompt=True, tokenize=False) for row in rows]
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
        state.append({"model": model, "ids": batch["input_ids"], "mask": batch["attention_mask"], "cache": None})
    done = torch.zeros(len(heads[0]), dtype=torch.bool)
    written: list[torch.Tensor] = []
    for _ in range(max_new_tokens):
        logps = []
        for s in state:
            positions = (s["mask"].cumsum(-1) - 1).clamp(min=0)[:, -s["ids"].shape[1] :]
            out = s["model"](
                input_ids=s["ids"],
                attention_mask=s["mask"],
                position_ids=positions,
                past_key_values=s["cache"],
                use_cache=True,
                logits_to_keep=1,
            )
            s["cache"] = out.past_key_values
            logps.append(out.logits[:, -1].float().log_softmax(-1))
        tokens = torch.multinomial(combine(logps).exp(), 1, generator=generator)[:, 0]
        if isinstance(combine, Linear):
            combine.accept(tokens)
        tokens = tokens.masked_fill(done, tokenizer.pad_token_id)
        done |= tokens == tokenizer.eos_token_id
        written.append(tokens)
        if done.all():
            break
        for s in state:
            s["ids"] = tokens[:, None]
            s["mask"] = torch.cat([s["mask"], torch.ones_like(s["ids"])], 1)
    return tokenizer.batch_decode(torch.stack(written, 1), skip_special_tokens=True)


def rates(texts: Sequence[str], names: Sequence[str]) -> dict[str, float]:
    """Share of texts that show each trait, that show all of ``names`` ("joint"), and that are grammatical."""
    shown = {name: [trait.detect(text) for text in texts] for name, trait in TRAITS.items()}
    result = {name: sum(hits) / len(texts) for name, hits in shown.items()}
    result["joint"] = sum(all(shown[name][i] for name in names) for i in range(len(texts))) / len(texts)
    result["grammar"] = sum(map(is_grammatical, texts)) / len(texts)
    return result
