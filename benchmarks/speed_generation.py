"""The two sides of `generation_speed.py`: fitune as `fitune evaluate` asks it, and transformers' own `generate`.

Both greedy, both to the last of the new tokens: no token ends a continuation.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from fitune.errors import FituneError

PAD = 0


class FituneGeneration:
    """fitune. `four_bit`: frozen weights in NF4, as after a run of method qlora; else in 16 bits."""

    def __init__(self, model: Path, prompts: list[list[int]], new_tokens: int, four_bit: bool) -> None:
        from fitune.quant.lease import lease_for_generation
        from fitune.train.trained_model import find_trained

        found = find_trained(str(model), four_bit)
        self.built = found.build()
        self.lease = lease_for_generation(self.built.backend, self.built.dtype)
        self.prompts, self.new_tokens = prompts, new_tokens
        self.report: dict[str, Any] = {"computation": found.computation.reason}

    def generate(self) -> tuple[list[list[int]], float]:
        """All prompts at once -> their new tokens, seconds."""
        from fitune.generate import generate_detailed
        from fitune.quant.lease import leased

        begun = time.perf_counter()
        with leased(self.built.graph, self.lease):
            found = generate_detailed(
                self.built.graph, self.prompts, max_new_tokens=self.new_tokens, eos_ids=(), pad_id=PAD,
                batch_size=len(self.prompts),
            )  # fmt: skip
        seconds = time.perf_counter() - begun
        return checked([one.tokens for one in found], self.new_tokens), seconds


class TransformersGeneration:
    """transformers, bfloat16, with its cache."""

    def __init__(self, model: Path, prompts: list[list[int]], new_tokens: int, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM, GenerationConfig
        from transformers.utils import logging

        torch.set_num_threads(threads)
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, device_map="cpu").eval()
        self.model.generation_config = GenerationConfig(
            max_new_tokens=new_tokens, do_sample=False, use_cache=True, pad_token_id=PAD, eos_token_id=None
        )
        self.prompts, self.new_tokens = torch.tensor(prompts), new_tokens
        self.report: dict[str, Any] = {"attention": self.model.config._attn_implementation}

    def generate(self) -> tuple[list[list[int]], float]:
        """All prompts at once -> their new tokens, seconds."""
        import torch

        begun = time.perf_counter()
        with torch.inference_mode():
            found = self.model.generate(self.prompts, attention_mask=torch.ones_like(self.prompts))
        seconds = time.perf_counter() - begun
        return checked(found[:, self.prompts.shape[1] :].tolist(), self.new_tokens), seconds


def checked(tokens: list[list[int]], count: int) -> list[list[int]]:
    """Raises FituneError where a continuation has not so many tokens: nothing would be comparable."""
    if any(len(one) != count for one in tokens):
        raise FituneError(f"continuations of {sorted({len(one) for one in tokens})} tokens, not of {count}")
    return tokens


def open_generator(spec: dict[str, Any]) -> FituneGeneration | TransformersGeneration:
    """{"side", "model", "prompts" (a file of token ids), "new_tokens"} and "four_bit" or "threads" -> a side."""
    prompts, model = json.loads(Path(spec["prompts"]).read_text()), Path(spec["model"])
    if spec["side"] == "fitune":
        return FituneGeneration(model, prompts, spec["new_tokens"], spec["four_bit"])
    return TransformersGeneration(model, prompts, spec["new_tokens"], spec["threads"])
