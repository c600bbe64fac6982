"""The peer of `train_speed.py`: QLoRA with transformers, PEFT and bitsandbytes, as their documentation writes it.

The model stays in training mode from its first forward pass to its last. bitsandbytes 0.50.2 repacks `Linear4bit`
weights in place in an evaluation forward on processors with AVX-512 BF16, and training afterwards is wrong.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training, set_peft_model_state_dict
from safetensors.torch import load_file
from speed_cases import ALPHA, LEARNING_RATE, MAX_GRAD_NORM, RANK, SEED, Variant
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
)
from transformers.utils import logging

IGNORED = -100
_REENTRANT = {"use_reentrant": False}


class Peer:
    """One process's peer: loaded, adapted, ready to step.

    Args:
        model: folder of 16-bit weights.
        steps: for each step its rows of {"tokens", "trained"}.
        adapter: folder of the adapter to begin with; written here where it does not exist.
    """

    def __init__(self, model: Path, steps: list[Any], adapter: Path, variant: Variant, threads: int) -> None:
        torch.set_num_threads(threads)
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.variant = variant
        self.model = _adapted(model, adapter, variant)
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if {parameter.dtype for parameter in trainable} != {torch.float32}:
            raise RuntimeError("the peer's adapter is not float32")
        self.trainable = trainable
        # The Trainer's optimizer and settings, without a schedule.
        self.optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
        self.steps = steps
        self.collate = _collator(model) if any(_is_ragged(step) for step in steps) else None
        self.call = torch.compile(self.model) if variant.compiled else self.model

    @property
    def step_tokens(self) -> list[int]:
        """Real tokens of every step."""
        return [sum(len(row["tokens"]) for row in step) for step in self.steps]

    @property
    def computed_tokens(self) -> list[int]:
        """Tokens of every step with its padding."""
        return [len(step) * max(len(row["tokens"]) for row in step) for step in self.steps]

    def step(self, number: int) -> tuple[float, float]:
        """One optimizer step on the rows of a number -> loss, seconds."""
        begun = time.perf_counter()
        batch = self._batch(self.steps[number])
        autocast = torch.autocast("cpu", dtype=torch.bfloat16) if self.variant.autocast else nullcontext()
        with autocast:
            loss = self.call(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trainable, MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach()), time.perf_counter() - begun

    def _batch(self, step: list[Any]) -> dict[str, torch.Tensor]:
        """Rows of one length need no mask, which is quickest for the peer; others are padded as its Trainer does."""
        features = [
            {
                "input_ids": row["tokens"],
                "labels": [
                    token if trained else IGNORED
                    for token, trained in zip(row["tokens"], row["trained"], strict=True)
                ],
            }
            for row in step
        ]
        if self.collate is None:
            return {name: torch.tensor([feature[name] for feature in features]) for name in ("input_ids", "labels")}
        return dict(
            self.collate([feature | {"attention_mask": [1] * len(feature["labels"])} for feature in features])
        )


def _is_ragged(step: list[Any]) -> bool:
    return len({len(row["tokens"]) for row in step}) > 1


def _collator(model: Path) -> DataCollatorForSeq2Seq:
    """transformers' collator for rows with labels: pads to the longest of the batch, labels with -100."""
    return DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(model), padding=True, label_pad_token_id=IGNORED)


def _adapted(folder: Path, adapter: Path, variant: Variant) -> Any:
    dtype = torch.float32 if variant.float32 else torch.bfloat16
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantisation, dtype=dtype, device_map="cpu"
    )  # fmt: skip
    model.config.use_cache = False
    if variant.autocast:
        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=variant.checkpointing, gradient_checkpointing_kwargs=_REENTRANT
        )
    elif variant.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=_REENTRANT)
    torch.manual_seed(SEED)
    settings = LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM", target_modules="all-linear"
    )
    adapted = get_peft_model(model, settings)
    weights = adapter / "adapter_model.safetensors"
    if weights.is_file():
        set_peft_model_state_dict(adapted, load_file(weights))
    else:
        adapted.save_pretrained(adapter, save_embedding_layers=False)
    adapted.train()
    return adapted
