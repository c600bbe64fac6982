"""Settings that are allowed and seldom meant: a sentence each, said before a run and never refused."""

from __future__ import annotations

from collections.abc import Iterator

from fitune.config.schema import RunConfig

# Every weight learns at about a twentieth of an adapter's rate: 1e-5 to 5e-5 in the recipes of Llama 2, Alpaca and
# Qwen, beside 1e-4 to 3e-4 in those of LoRA and QLoRA; SmolLM2's smallest takes 1e-3 (config/recommended.py).
FULL_RATE, ADAPTER_RATE = 1e-4, 2e-5
DPO_RATE = 1e-4
# Lion's paper: a third to a tenth of AdamW's rate, 2e-4 of adapters.
LION_RATE = 1e-4
# Instruction sets are learnt in one to three epochs (Guanaco, Alpaca); a hundred thousand times is by heart.
MANY_EPOCHS = 10.0


def cautions(config: RunConfig) -> Iterator[str]:
    """What is said of a run's settings."""
    train, data = config.train, config.data
    rate = train.learning_rate
    if rate is not None and config.method == "full" and rate >= FULL_RATE:
        yield (
            f"train.learning_rate {rate:g} is an adapter's; when all weights of a model of billions learn, 1e-5 to "
            "5e-5 is usual, and more forgets or diverges (small models bear more)"
        )
    is_lion = train.optimizer == "lion"
    if rate is not None and is_lion and rate >= LION_RATE:
        yield f"train.learning_rate {rate:g} is one for adamw; lion takes a third to a tenth of it (4e-5 is usual)"
    is_usual = train.objective == "supervised" and config.method != "full" and not is_lion
    if rate is not None and is_usual and rate <= ADAPTER_RATE:
        yield (
            f"train.learning_rate {rate:g} is one for all weights; an adapter learns little below 1e-4 "
            "(2e-4 is usual)"
        )
    if rate is not None and train.objective in ("dpo", "kto") and rate >= DPO_RATE:
        yield (
            f"train.learning_rate {rate:g} is one for learning answers; {train.objective} takes about 5e-6, at most "
            "5e-5, and with more unlearns how to answer while it learns what not to"
        )
    if train.objective in ("dpo", "kto") and config.lora.start_from is not None:
        yield (
            f"lora.start_from: {train.objective} compares with the base without any adapter; to compare with what "
            "the adapter makes of it, merge it first (fitune merge) and take the merged model"
        )
    if data.train_on == "all" and not _is_text(config):
        yield "data.train_on: all learns the questions too; assistant, the default, learns the answers only"
    if train.steps is None and train.epochs > MANY_EPOCHS and train.early_stopping_patience is None:
        yield (
            f"train.epochs {train.epochs:g}: so often seen, samples are learnt by heart; "
            "train.early_stopping_patience ends the run when validation no longer gets better"
        )


def _is_text(config: RunConfig) -> bool:
    return all(source.format == "text" for source in config.data.train)
