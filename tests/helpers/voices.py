"""A tiny model with policies of every kind at once, and chats to speak in."""

from __future__ import annotations

import copy
from typing import Any

import torch
from helpers import tiny

import personafast as pf

NEW = 10
# By the kind of the policies: LoRA in a library, separate models, system prompts, and one of each in one persona.
PERSONAS = {
    "lora": pf.Persona(policies={"formal": 0.8, "warm": 0.6}),
    "separate": pf.Persona(policies={"stern": 0.8, "jolly": 0.6}),
    "prompts": pf.Persona(policies={"pirate": 0.7}, prompts={"you are a calm lawyer": 0.6}),
    "mixed": pf.Persona(policies={"formal": 0.5, "stern": 0.4, "pirate": 0.6}, prompts={"you are calm": 0.3}),
}


def apart(net: Any, seed: int) -> Any:
    """A separate model: a copy with a low-rank change in its weights."""
    found = copy.deepcopy(net)
    with torch.no_grad():
        for path, f in tiny.policy(net, seed, scale=0.3).factors.items():
            change = f.scale * f.b @ f.a
            weight = found.get_submodule(path).weight
            weight.add_(change if weight.shape == change.shape else change.t())
    return found


def policies(net: Any) -> pf.PolicySet:
    """Two separate models and a prompt."""
    models = pf.PolicySet.from_models(net, {"stern": apart(net, 21), "jolly": apart(net, 22)})
    return models | pf.PolicySet.from_prompts(net, {"pirate": "you are a pirate"})


def attach(net: Any, given: pf.PolicySet | None = None, masks: bool = False) -> pf.PersonaHandle:
    """With the library of `tiny` and the policies above."""
    given = policies(net) if given is None else given
    return pf.attach(net, tiny.library(net, masks=masks), policies=given, tokenizer=tiny.tokenizer())


def chats(*questions: str) -> dict[str, torch.Tensor]:
    """A left-padded batch of chats, three of different lengths by default."""
    tok = tiny.tokenizer()
    tok.padding_side = "left"
    asked = questions or ("what is this", "sea", "is this law a ship ,")
    return dict(
        tok.apply_chat_template(
            [[{"role": "user", "content": text}] for text in asked],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
            padding=True,
        )
    )


def speak(net: Any, handle: pf.PersonaHandle, batch: dict[str, torch.Tensor], personas: Any, **more: Any) -> Any:
    """`generate` with few settings: new tokens [B, n], or the output object with `return_dict_in_generate`."""
    options = {"max_new_tokens": NEW, "do_sample": False, "custom_generate": handle.generate, "pad_token_id": 0}
    if more.get("do_sample"):
        options["top_k"] = 0
    streamer = more.pop("streamer", None)
    if streamer is not None:
        options["custom_generate"] = handle.bind(streamer=streamer)
    out = net.generate(**batch, personas=personas, **{**options, **more})
    return out if more.get("return_dict_in_generate") else out[:, batch["input_ids"].shape[1] :]


def row_of(batch: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    """One row on its own, without padding."""
    ids = batch["input_ids"][row][batch["attention_mask"][row].bool()][None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Recorder:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt or new tokens."""
        self.seen.append(value.clone())

    def end(self) -> None:
        """Nothing more comes."""
        self.ended = True
