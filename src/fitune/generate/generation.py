"""What generation hands back: the tokens of each prompt, and an account of how they were made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

# From the fastest to the slowest.
GenerationPath = Literal["slots", "padded", "equal lengths", "one by one", "uncached"]


@dataclass(frozen=True, slots=True)
class Generation:
    """What one prompt was continued with.

    Attributes:
        tokens: the new tokens, without the prompt, without padding and without the end token.
        finished: whether the model ended by itself (False: it was stopped at `max_new_tokens`).
    """

    tokens: list[int]
    finished: bool


@dataclass(slots=True)
class GenerationStats:
    """How far a call of `generate` is and how it works; the same object is handed to every `on_progress`.

    Attributes:
        prompts, prompts_done: how many there are and how many are complete.
        path: "slots" (shared prefix computed once, rows refilled), "padded" (left-padded batches, no sharing),
            "equal lengths" (only prompts of the same length share a batch), "one by one" (a prompt at a time) or
            "uncached" (the same, and everything computed again for every token); the slowest of them, where some
            prompts need another than others.
        why_not_slots: None on the first path, else what about the model rules out that and every other path
            before the one that is taken.
        prompt_tokens: of all prompts; computed_prompt_tokens: how many of them went through the model,
            padding included; shared_prefix_tokens: length of the prefix that all prompts share and that was
            computed once.
        new_tokens: generated so far, end tokens not counted. steps: decoding forwards so far.
        prefill_seconds, decode_seconds: wall time.
    """

    prompts: int
    prompts_done: int = 0
    path: GenerationPath = "slots"
    why_not_slots: str | None = None
    prompt_tokens: int = 0
    computed_prompt_tokens: int = 0
    shared_prefix_tokens: int = 0
    new_tokens: int = 0
    steps: int = 0
    prefill_seconds: float = field(default=0.0)
    decode_seconds: float = field(default=0.0)

    @property
    def new_tokens_per_second(self) -> float:
        """New tokens per second of wall time, prompts included; 0.0 before anything ran."""
        seconds = self.prefill_seconds + self.decode_seconds
        return self.new_tokens / seconds if seconds > 0 else 0.0


Progress = Callable[[GenerationStats], None]
