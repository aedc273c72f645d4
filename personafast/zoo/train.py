"""How the zoo's reference and policies are trained."""

from __future__ import annotations

import itertools
import math
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from personafast._io import read_json, write_json
from personafast.zoo.corpus import collate, conversations, encode, pairs

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

Progress = Callable[[str, int, int], None]
"""Called with (stage, steps done, steps in all)."""


@dataclass(frozen=True)
class ReferenceSettings:
    """AdamW with a linear warm-up and a cosine decay to zero, on fresh conversations at every step."""

    steps: int = 1200
    batch: int = 64
    learning_rate: float = 4e-3
    warmup: int = 100
    weight_decay: float = 0.05
    clip: float = 1.0
    unknown: float = 0.02


@dataclass(frozen=True)
class PolicySettings:
    """DPO with a negative log-likelihood term (``loss_weights``) on a LoRA adapter, by TRL.

    ``rate`` is how often any other trait shows, alike in both replies of a pair.
    """

    steps: int = 180
    batch: int = 32
    learning_rate: float = 2e-3
    beta: float = 0.5
    loss_weights: tuple[float, float] = (0.5, 1.0)
    rate: float = 0.12
    rank: int = 8
    lora_alpha: int = 16
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def train_reference(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    settings: ReferenceSettings,
    seed: int,
    progress: Progress | None = None,
) -> float:
    """Train the model in place on the corpus; only replies are predicted. Returns the mean loss of the last 50 steps.

    A share ``unknown`` of the words before the reply becomes the unknown token, so that a request in other words than
    the grammar's still gets a fluent reply.
    """
    rng = random.Random(seed)
    stream = conversations(rng)
    special = set(tokenizer.all_special_ids)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=settings.learning_rate,
        betas=(0.9, 0.98),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / settings.warmup) * 0.5 * (1 + math.cos(math.pi * step / settings.steps)),
    )
    losses: list[float] = []
    model.train()
    for step in range(settings.steps):
        rows = []
        for conversation in itertools.islice(stream, settings.batch):
            ids, head = encode(conversation, tokenizer)
            hidden = [
                tokenizer.unk_token_id if t not in special and rng.random() < settings.unknown else t
                for t in ids[:head]
            ]
            rows.append((hidden + ids[head:], head))
        input_ids, attention_mask, labels = collate(rows, tokenizer.pad_token_id)
        loss = model(input_ids=input_ids, attention_mask=attention_mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses = [*losses[-49:], loss.item()]
        if progress is not None:
            progress("reference", step + 1, settings.steps)
    model.eval()
    return sum(losses) / len(losses)


def train_policy(
    model_path: Path,
    out: Path,
    name: str,
    settings: PolicySettings,
    seed: int,
    progress: Progress | None = None,
) -> None:
    """Train one trait's LoRA policy with TRL's DPOTrainer and save it to ``out`` in PEFT's format."""
    import datasets
    from peft import LoraConfig, PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
    from transformers.utils import logging
    from trl import DPOConfig, DPOTrainer

    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(model_path)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    drawn = itertools.islice(pairs(name, random.Random(seed), settings.rate), settings.steps * settings.batch)
    dataset = datasets.Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": pair.user}],
                "chosen": [{"role": "assistant", "content": pair.chosen}],
                "rejected": [{"role": "assistant", "content": pair.rejected}],
            }
            for pair in drawn
        ]
    )

    class Report(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if progress is not None:
                progress(f"policy {name}", state.global_step, settings.steps)

    with tempfile.TemporaryDirectory() as scratch:
        trainer = DPOTrainer(
            model=model,
            args=DPOConfig(
                output_dir=scratch,
                max_steps=settings.steps,
                per_device_train_batch_size=settings.batch,
                learning_rate=settings.learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=10,
                beta=settings.beta,
                loss_type=["sigmoid", "sft"],
                loss_weights=list(settings.loss_weights),
                seed=seed,
                data_seed=seed,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=dataset,
            processing_class=tokenizer,
            callbacks=[Report()],
            peft_config=LoraConfig(
                r=settings.rank,
                lora_alpha=settings.lora_alpha,
                lora_dropout=0.0,
                target_modules=list(settings.targets),
                task_type="CAUSAL_LM",
            ),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        policy = trainer.model
        assert isinstance(policy, PeftModel)
        policy.save_pretrained(str(out))
    (out / "README.md").unlink(missing_ok=True)
    config = read_json(out / "adapter_config.json")
    config |= {"base_model_name_or_path": "personafast-zoo", "target_modules": sorted(settings.targets)}
    write_json(out / "adapter_config.json", config)
