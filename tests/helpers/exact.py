"""A world so small that its texts can be enumerated: 8 words, Hugging Face models of one block, targets by hand.

Nothing here uses our scorers, rules or operators: members are plain forward passes over whole texts, in copies of the
models that carry a LoRA policy in their weights.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import personafast as pf
from personafast.density.lora import LoraFactors, LoraPolicy
from personafast.models.anatomy import anatomy

WORDS = ["a", "b", "c", "d", "e", "f", "g", "h"]
VOCAB, LENGTH = len(WORDS), 3
PROMPT = [2, 5, 3]
# What the members of the prompt kind see before a row, and a draft of another size.
TEXTS = {"p": "h g h", "q": "a a b"}
KINDS = ("lora", "separate", "prompts")


def model(seed: int, hidden: int = 16, vocab: int = VOCAB) -> Any:
    """A random Llama of one block in fp32, its distributions neither flat nor certain."""
    import transformers as t

    torch.manual_seed(seed)
    config = t.LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    found = t.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in found.parameters():
            if parameter.dim() > 1:
                parameter.mul_(12)
        found.lm_head.weight.mul_(1.3)
    return found


def tokenizer() -> Any:
    """The eight words, without a chat template: a system text stands before the row."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="a")


def lora(net: Any, seed: int, scale: float = 0.4) -> LoraPolicy:
    """A random policy over every linear of the block."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for path, linear in anatomy(net).linears.items():
        out, width = linear.weight.shape
        a = torch.randn(3, width, generator=generator)
        factors[path] = LoraFactors(a, torch.randn(out, 3, generator=generator) / width**0.5, scale)
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 3 * scale, "target_modules": sorted(factors)}
    return LoraPolicy(factors, config, VOCAB)


def in_weights(net: Any, policy: LoraPolicy) -> Any:
    """A copy of the model with a policy added to its weights."""
    found = copy.deepcopy(net)
    with torch.no_grad():
        for path, factors in policy.factors.items():
            found.get_submodule(path).weight.add_(factors.scale * factors.b @ factors.a)
    return found


@dataclass
class World:
    """A reference and the policies p and q, and plain copies of all three.

    Attributes:
        net: what personas are attached to.
        attach: attaches them; gives the handle.
        plain: None, "p", "q" -> (model, tokens that it sees before a row).
    """

    net: Any
    attach: Callable[[], pf.PersonaHandle]
    plain: Mapping[str | None, tuple[Any, list[int]]]

    @torch.no_grad()
    def logits(self, name: str | None, texts: torch.Tensor) -> torch.Tensor:
        """Of a member after whole rows [n, L], by one plain forward pass; float64 [n, V]."""
        net, before = self.plain[name]
        whole = torch.cat([torch.tensor(before, dtype=torch.long).expand(len(texts), -1), texts], dim=1)
        return net(whole, use_cache=False).logits[:, -1].double()


def world(kind: str, seed: int = 0) -> World:
    """Policies of one kind, the same objects for the same seed."""
    net = model(seed)
    reference = copy.deepcopy(net)
    plain: dict[str | None, tuple[Any, list[int]]] = {None: (reference, [])}
    if kind == "lora":
        library = pf.PersonaLibrary(anatomy(net).shape)
        for name, own in (("p", 1), ("q", 2)):
            policy = lora(net, 10 * seed + own)
            library.add_policy(name, policy)
            plain[name] = (in_weights(reference, policy), [])
        return World(net, lambda: pf.attach(net, library), plain)
    if kind == "separate":
        models = {name: in_weights(reference, lora(net, 10 * seed + own)) for name, own in (("p", 3), ("q", 4))}
        with torch.no_grad():  # what no adapter of the block could do
            for own in models.values():
                own.lm_head.weight.add_(torch.randn(VOCAB, 16) * 0.1)
        plain |= {name: (copy.deepcopy(own), []) for name, own in models.items()}
        policies = pf.PolicySet.from_models(net, models)
    else:
        plain |= {name: (reference, [WORDS.index(word) for word in text.split()]) for name, text in TEXTS.items()}
        policies = pf.PolicySet.from_prompts(net, TEXTS)
    return World(net, lambda: pf.attach(net, policies=policies, tokenizer=tokenizer()), plain)


def target(
    logp: Mapping[str | None, torch.Tensor],
    persona: pf.Persona | None,
    min_p: float = 0.0,
) -> torch.Tensor:
    """The token-level target [n, V] from log-probabilities [n, V] a member, as METHODS 3.2 writes it."""
    if persona is None:
        return logp[None]
    weights = {name: weight for name, weight in persona.policies.items() if weight}
    rule, reference = persona.aggregator, logp[None]
    ratios = torch.stack([logp[name] - reference for name in weights])
    alpha = torch.tensor(list(weights.values()), dtype=torch.float64)
    share = (alpha / alpha.abs().sum())[:, None, None]
    members = [logp[name] for name in weights]
    if callable(rule):
        log_g = torch.stack([rule(ratios[:, n], alpha) for n in range(len(reference))])
        members.append(reference)
    elif rule == "geometric":
        log_g = (alpha[:, None, None] * ratios).sum(0)
        if (1 if persona.base is None else 0) - float(alpha.sum()) > 1e-6:
            members.append(reference)
    elif rule == "linear":
        log_g = (alpha[:, None, None] * ratios.exp()).sum(0).clamp(min=0).log()
        members = [logp[name] for name, weight in weights.items() if weight > 0]
    elif rule in ("power", "harmonic"):
        p = -1.0 if rule == "harmonic" else persona.p
        log_g = (share * (p * ratios).exp()).sum(0).log() / p
    elif rule == "jensen_shannon":
        log_s = (share * (ratios - ratios.exp().log1p())).sum(0)
        log_g = log_s - torch.log1p(-log_s.exp())
    else:
        log_g = ratios.amin(0) if rule == "min" else ratios.amax(0)
    if persona.base is not None:
        members.append(logp[persona.base])
    found = logp[persona.base] + log_g
    if min_p:
        likely = torch.stack([m.exp() >= min_p * m.exp().amax(-1, keepdim=True) for m in members]).any(0)
        found = found.masked_fill(~likely, -torch.inf)
    return found.log_softmax(-1)


def prefixes(count: int) -> torch.Tensor:
    """Every text of so many tokens, int64 [V ** count, count], in the order of their codes."""
    return torch.tensor(list(itertools.product(range(VOCAB), repeat=count)), dtype=torch.long).view(VOCAB**count, count)


def law(
    world: World,
    persona: pf.Persona | None,
    texts: torch.Tensor,
    min_p: float = 0.0,
    temperature: float = 1.0,
    policy_temperature: float = 1.0,
    bias: tuple[int, int, float] | None = None,
    plain_min_p: float = 0.0,
) -> torch.Tensor:
    """Next-token probabilities after whole rows, float64 [n, V].

    bias (a, b, x) adds x to the logit of b after a; plain_min_p is stock min-p, after the temperature.
    """
    logp = {name: (world.logits(name, texts) / policy_temperature).log_softmax(-1) for name in world.plain}
    found = target(logp, persona, min_p)
    if bias is not None:
        found[texts[:, -1] == bias[0], bias[1]] += bias[2]
    found = (found / temperature).softmax(-1)
    found = torch.where(found >= plain_min_p * found.amax(-1, keepdim=True), found, 0)
    return found / found.sum(-1, keepdim=True)


def joint(world: World, persona: pf.Persona | None, prompt: Sequence[int] = PROMPT, eos: int = -1, **more: Any):
    """Probability of every text of LENGTH tokens, by code."""
    found = torch.ones(1, dtype=torch.float64)
    for count in range(LENGTH):
        texts = prefixes(count)
        whole = torch.cat([torch.tensor(prompt).expand(len(texts), -1), texts], dim=1)
        found = (found[:, None] * law(world, persona, whole, **more)).flatten()
    return by_code(found, eos)


def mixture(world: World, weights: Mapping[str, float], chunk: int, min_p: float = 0.0, temperature: float = 1.0):
    """Probability of every text whose chunks each come from one policy, drawn with these weights anew."""
    found = torch.ones(1, dtype=torch.float64)
    for start in range(0, LENGTH, chunk):
        mixed: Any = 0
        for name, weight in weights.items():
            of = torch.ones(VOCAB**start, dtype=torch.float64)
            for count in range(start, min(start + chunk, LENGTH)):
                texts = prefixes(count)
                whole = torch.cat([torch.tensor(PROMPT).expand(len(texts), -1), texts], dim=1)
                p = (world.logits(name, whole) / temperature).softmax(-1)
                p = torch.where(p >= min_p * p.amax(-1, keepdim=True), p, 0)
                of = (of[:, None] * p / p.sum(-1, keepdim=True)).flatten()
            mixed = mixed + weight / sum(weights.values()) * of
        found = found.repeat_interleave(len(mixed) // len(found)) * mixed
    return by_code(found)


def by_code(probabilities: torch.Tensor, eos: int = -1) -> torch.Tensor:
    """Sum the probabilities of full texts over what follows an EOS."""
    found = torch.zeros((VOCAB + 1) ** LENGTH, dtype=torch.float64)
    return found.index_add(0, codes(prefixes(LENGTH), eos), probabilities)


def codes(texts: torch.Tensor, eos: int = -1) -> torch.Tensor:
    """Texts [n, LENGTH] as numbers of base V + 1; V stands for whatever follows an EOS."""
    ends = (texts == eos).long()
    texts = torch.where(ends.cumsum(1) - ends > 0, VOCAB, texts)
    return (texts * (VOCAB + 1) ** torch.arange(LENGTH - 1, -1, -1)).sum(1)


def texts(
    world: World, handle: pf.PersonaHandle, personas: Any, rows: int, batch: int, seed: int = 1, eos: int = -1, **more
):
    """Codes of so many texts through the public `generate`, and the statistics of the last call."""
    found = []
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": LENGTH, "pad_token_id": 0, "min_p": 0.0, **more}
    if eos >= 0:
        options["eos_token_id"] = eos
    for start in range(0, rows, batch):
        out = world.net.generate(
            torch.tensor([PROMPT]).repeat(min(batch, rows - start), 1),
            custom_generate=handle.generate,
            personas=personas,
            seed=seed * rows + start,
            return_dict_in_generate=True,
            **options,
        )
        new = out.sequences[:, len(PROMPT) :]
        found.append(codes(torch.nn.functional.pad(new, (0, LENGTH - new.shape[1])), eos))
    return torch.cat(found), out.stats
