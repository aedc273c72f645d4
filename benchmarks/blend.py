"""Blending while decoding: what density ratios of LoRA policies cost beside the reference alone, one row at a time.

All contenders take turns in one run, and every case is a view of it: what is compared with what. A sample is the
difference between a long and a short generation, as for `decode`.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import zlib
from typing import Any

import torch
from torch import nn

import personafast as pf
from benchmarks import machine
from benchmarks.bandwidth import reader
from benchmarks.case import Absent
from benchmarks.check import CheckFailed
from benchmarks.decode import PROMPT, Generate, Shape, drawn, model_bytes, per_token, sharing
from benchmarks.measure import READ, Measurement
from benchmarks.sampler import Sample, interleave
from benchmarks.views import Run, View
from personafast.models.anatomy import anatomy
from personafast.policies import Policy, PolicySet

SHAPE = Shape(
    "llama-12x768",
    {
        "vocab_size": 32000,
        "hidden_size": 768,
        "intermediate_size": 1856,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
    },
)
RANK, MOST = 8, 16
# The updates are as large as leaves a policy's next-token distribution near the reference's, as training does.
UPDATE = 0.004
CHECKED_TOKENS = 6

HF, ATTACHED = "unpatched transformers, reference alone", "attached, reference alone"
PEFT = "PEFT, set_adapter in turn, 4 policies and the reference"
MERGE = "merge of 4 policies"
TOKEN_RS, SCR = "token-level rejection, 2 LoRA policies", "scr, k = 4, 2 LoRA policies"
TOKEN_RS_MODELS, SCR_MODELS = "token-level rejection, 2 separate models", "scr, k = 4, 2 separate models"
SCR_LONG = "scr, k = 8, 2 separate models"


def direct(policies: int) -> str:
    return f"direct, {policies} polic{'y' if policies == 1 else 'ies'} and the reference"


VIEWS = (
    View("blend-reference", HF, {ATTACHED: None, MERGE: None, direct(4): 0.75}),
    View("blend-attached", ATTACHED, {MERGE: None, direct(4): 0.6}),
    View("blend-peft", PEFT, {direct(4): 5.0}),
    View("blend-policies", direct(1), {direct(4): None, direct(16): 1 / 1.5}),
    View("blend-scr-lora", TOKEN_RS, {SCR: 3.0}),
    View("blend-scr-models", TOKEN_RS_MODELS, {SCR_MODELS: 3.0, SCR_LONG: None}),
)


def peft_model(model: Any, adapters: int) -> Any:
    """A PEFT model of its own over the same parameters, with random adapters on every linear of the blocks."""
    try:
        import peft
    except ImportError as error:
        raise Absent(f"peft is not installed ({error})") from None
    wrapped: Any = None
    for index in range(adapters):
        config = peft.LoraConfig(
            r=RANK, lora_alpha=RANK, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
        )
        if wrapped is None:
            wrapped = peft.get_peft_model(sharing(model), config, adapter_name=f"policy{index}")
        else:
            wrapped.add_adapter(f"policy{index}", config)
    for name, parameter in wrapped.named_parameters():
        if ".lora_" in name:
            # The same numbers for the same adapter, however many there are.
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            parameter.data = (UPDATE**0.5 * torch.randn(parameter.shape, generator=generator)).to(torch.bfloat16)
    return wrapped.eval()


def merged(model: Any, policy: Policy) -> Any:
    """A model of its own, with the adapter added to its weights."""
    twin = sharing(model)
    linears = anatomy(twin).linears
    assert policy.lora is not None
    for path, factors in policy.lora.factors.items():
        update = factors.scale * factors.b.float() @ factors.a.float()
        linears[path].weight = nn.Parameter((linears[path].weight.float() + update).bfloat16(), requires_grad=False)
    return twin


def set_adapter_loop(wrapped: Any, ids: torch.Tensor, names: list[str], tokens: int, greedy: bool) -> torch.Tensor:
    """The geometric blend at weight 1 the plain way: a pass of the model for every member of every token."""
    caches: dict[str | None, Any] = dict.fromkeys([None, *names])
    new = ids
    for _ in range(tokens):
        logps = []
        for name in (None, *names):
            if name is not None:
                wrapped.set_adapter(name)
            with wrapped.disable_adapter() if name is None else contextlib.nullcontext():
                out = wrapped(new, past_key_values=caches[name], use_cache=True, logits_to_keep=1)
            caches[name] = out.past_key_values
            logps.append(out.logits[:, -1].float().log_softmax(-1))
        target = (1 - len(names)) * logps[0] + sum(logps[1:])
        if greedy:
            new = target.argmax(-1, keepdim=True)
        else:
            new = torch.multinomial(target.softmax(-1), 1)
        ids = torch.cat([ids, new], dim=1)
    return ids


class Contenders:
    """The models, and a way to decode with each contender."""

    def __init__(self, model: Any, ids: torch.Tensor, stack: contextlib.ExitStack) -> None:
        self.model, self.ids = model, ids
        self.names = [f"policy{index}" for index in range(MOST)]
        self.wrapped, self.four = peft_model(model, MOST), peft_model(model, 4)
        attached = sharing(model)
        policies = PolicySet.from_adapters(self.wrapped)
        apart = PolicySet.from_models(attached, {f"model{i}": merged(model, policies[f"policy{i}"]) for i in range(2)})
        library = pf.PersonaLibrary()
        for name in policies:
            lora = policies[name].lora
            assert lora is not None
            library.add_policy(name, lora)
        self.attached, self.handle = attached, stack.enter_context(pf.attach(attached, library, policies=apart))

    def persona(self, count: int, weight: float = 1.0, **more: Any) -> pf.Persona:
        return pf.Persona(policies=dict.fromkeys(self.names[:count], weight), **more)

    def generate(self, tokens: int, greedy: bool = False, model: Any = None, **options: Any) -> torch.Tensor:
        if model is None:
            model, options = self.attached, {**options, "custom_generate": self.handle.generate, "seed": 0}
        chosen = {"do_sample": False} if greedy else {"do_sample": True, "top_k": 0}
        return model.generate(self.ids, max_new_tokens=tokens, **chosen, **options)

    def runners(self) -> dict[str, Generate]:
        def of(**options: Any) -> Generate:
            return functools.partial(self.generate, **options)

        two = self.persona(2, 0.5, aggregator="linear")
        apart = pf.Persona(policies={"model0": 0.5, "model1": 0.5}, aggregator="linear")
        return {
            HF: of(model=self.model),
            ATTACHED: of(personas=None),
            MERGE: of(personas=self.persona(4), sampler="merge"),
            # At weight 1 a single policy needs no reference, and the cases would not differ in policies alone.
            direct(1): of(personas=self.persona(1, 0.5)),
            direct(4): of(personas=self.persona(4)),
            direct(16): of(personas=self.persona(16)),
            PEFT: lambda tokens: set_adapter_loop(self.four, self.ids, self.names[:4], tokens, False),
            SCR: of(personas=two, sampler="scr", chunk=4, min_p=0.0),
            TOKEN_RS: of(personas=two, sampler="token_rs", min_p=0.0),
            TOKEN_RS_MODELS: of(personas=apart, sampler="token_rs", min_p=0.0),
            SCR_MODELS: of(personas=apart, sampler="scr", chunk=4, min_p=0.0),
            SCR_LONG: of(personas=apart, sampler="scr", chunk=8, min_p=0.0),
        }

    def check(self) -> None:
        """Greedy tokens of ours and of the loop must be near the best of the blend in float32.

        Raises:
            CheckFailed: a token lies further below than bf16 explains.
        """
        names = self.names[:4]
        for label, tokens in (
            (direct(4), self.generate(CHECKED_TOKENS, True, personas=self.persona(4), min_p=0.0)),
            (PEFT, set_adapter_loop(self.four, self.ids, names, CHECKED_TOKENS, True)),
        ):
            usual = self._blend(tokens, names)
            self.wrapped.float()
            exact = self._blend(tokens, names)
            self.wrapped.to(torch.bfloat16)
            allowed = 4 * float((usual - exact).abs().max()) + 1e-6
            chosen = exact.gather(1, tokens[0, PROMPT:, None])[:, 0]
            if not float((exact.amax(1) - chosen).max()) <= allowed:
                raise CheckFailed(f"{label}: a greedy token is further from the best of the blend than bf16 explains")

    def _blend(self, ids: torch.Tensor, names: list[str]) -> torch.Tensor:
        def logp() -> torch.Tensor:
            return self.wrapped(ids[:, :-1]).logits[0, PROMPT - 1 :].double().log_softmax(-1)

        with self.wrapped.disable_adapter():
            target = (1 - len(names)) * logp()
        for name in names:
            self.wrapped.set_adapter(name)
            target = target + logp()
        return target


@functools.cache
def measured(tokens: int, rounds: int) -> Run:
    """All contenders, timed in turns.

    Raises:
        CheckFailed: a contender decodes something else; nothing has been timed.
        Absent: PEFT is not installed, or the memory is not there.
    """
    if machine.available_memory() < 3 << 30:
        raise Absent("needs 3 GiB of memory")
    ids = torch.randint(5, SHAPE.config["vocab_size"], (1, PROMPT), generator=torch.Generator().manual_seed(1))
    with contextlib.ExitStack() as stack, torch.no_grad():
        model = make()
        contenders = Contenders(model, ids, stack)
        contenders.check()
        samples: dict[str, Sample] = {READ: lambda: statistics.median(reader().sample() for _ in range(9))}
        for name, runner in contenders.runners().items():
            samples[name] = functools.partial(per_token, runner, tokens)
        taken = interleave(samples, 0.0, min_rounds=rounds, max_rounds=rounds)
    read = [reader().nbytes / seconds / 1e9 for seconds in taken.pop(READ)]
    return Run(SHAPE, taken, {}, read, model_bytes(model), tokens)


def make() -> Any:
    return drawn(SHAPE)


def measure_blending(view: View, tokens: int, rounds: int) -> Measurement:
    """One view of the run; raises what `measured` does."""
    return measured(tokens, rounds).seen_as(view)
