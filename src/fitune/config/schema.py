"""The run file's fields: names, types, defaults, meanings and allowed values. Nothing else defines them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from fitune.config.byte_size import parse_bytes
from fitune.config.conflicts import CombinationError, accumulation_for, conflicts


@dataclass(frozen=True)
class InputFile:
    """Marks a path that must name an existing file."""


# How data sets on the hub are named, and what tells a folder that the library `datasets` saved.
HUB = "hf://datasets/"
STATE, SPLITS = "state.json", "dataset_dict.json"


@dataclass(frozen=True)
class DataFile(InputFile):
    """The same, or a folder that `datasets` saved, or hf://datasets/OWNER/NAME."""


@dataclass(frozen=True)
class InputFolder:
    """Marks a path that must name an existing folder."""


@dataclass(frozen=True)
class OutputFolder:
    """Marks a path that will be written."""


@dataclass(frozen=True)
class ModelReference:
    """Marks a name that may be a path: a folder, a GGUF file, a hub name or the word `bundled`."""


class Section(BaseModel):
    """A part of the run file: strict types, no unknown fields, unchangeable."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _as_budget(value: str) -> str:
    if value != "auto":
        parse_bytes(value)
    return value


def _as_sources(value: Any) -> Any:
    """A path, or a list of paths and {path, ...} mappings -> a tuple of mappings."""
    entries = value if isinstance(value, list | tuple) else [value]
    return tuple({"path": entry} if isinstance(entry, str) else entry for entry in entries)


Text = Annotated[str, Field(min_length=1)]
FilePath = Annotated[str, InputFile(), Field(min_length=1)]
DataPath = Annotated[str, DataFile(), Field(min_length=1)]
Share = Annotated[float, Field(gt=0, le=0.5)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]


class DataSource(Section):
    """One file of training data."""

    path: DataPath = Field(
        description="The file, relative to the run file's folder; a folder that datasets saved; or a data set on the "
        "hub, hf://datasets/OWNER/NAME",
        examples=["train.jsonl"],
    )
    format: Text = Field(
        default="auto",
        description="How its records are written; auto recognises it by the content",
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="Renames the file's columns to those of a format: {name in the file: name in the format}",
        examples=[{"question": "instruction", "answer": "output"}],
    )
    instruction: Text | None = Field(
        default=None,
        description="For records of questions and answers without an instruction of their own",
        examples=["Translate into English."],
    )
    weight: float = Field(
        default=1.0,
        gt=0,
        le=1000,
        description="How often its samples are seen in an epoch; 0.5: half of them",
    )
    share: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Which part of an epoch's samples are from it, instead of a weight",
        examples=[0.2],
    )


class DataSettings(Section):
    """What to learn from, and how it becomes tokens."""

    train: Annotated[tuple[DataSource, ...], BeforeValidator(_as_sources)] = Field(
        min_length=1,
        description="The training data: a file, or a list of files or of {path, format, columns, instruction, "
        "weight, share}",
    )
    replay: DataPath | None = Field(
        default=None,
        description="General instructions, mixed in against forgetting what is not in the training data",
        examples=["general.jsonl"],
    )
    replay_share: float = Field(
        default=0.1, gt=0, lt=1, description="Which part of an epoch's samples are from data.replay"
    )
    mix_temperature: float = Field(
        default=1.0,
        ge=1,
        le=100,
        description="Above 1 small sets of data.train are seen more often, large ones less",
    )
    validation: DataPath | Share | None = Field(
        default=None,
        description="A file of validation data, or the share of the training data to hold out for it",
        examples=[0.05],
    )
    system: str | None = Field(
        default=None,
        description="A system message for every conversation; without it the data's own is kept",
        examples=["You answer in one sentence."],
    )
    chat_template: Literal["model", "instruction"] = Field(
        default="model",
        description="How conversations are written: as the model's own template says, or (for a model that has none) "
        "with ### Instruction: and ### Response:",
    )
    train_on: Literal["assistant", "last_assistant", "all"] = Field(
        default="assistant",
        description="Whose tokens are learnt: every answer's, the last answer's, everybody's",
    )
    max_tokens: int = Field(
        default=1024, ge=16, le=1_048_576, description="Length of a row, in tokens; no sample may be longer"
    )
    over_length: Literal["error", "drop", "cut", "split"] = Field(
        default="error",
        description="What to do with samples longer than max_tokens; what is dropped, cut or (plain text) split into "
        "several is reported",
    )
    missing_end_tokens: Literal["error", "allow"] = Field(
        default="error",
        description="What to do where the chat template closes an answer with no token that could be trained: the "
        "model would not learn to stop",
    )
    pack: bool = Field(
        default=True,
        description="Put several samples into a row; they never see each other",
    )


class LoraSettings(Section):
    """The adapter (methods lora and qlora)."""

    rank: int = Field(default=16, ge=1, le=1024, description="Rank of the adapter's matrices")
    alpha: float = Field(
        default=32.0,
        gt=0,
        le=65536,
        description="The adapter's output is scaled by alpha / rank (rslora: alpha / sqrt(rank))",
    )
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="Share of the adapter's inputs that is zeroed in training"
    )
    targets: Annotated[Literal["all-linear", "attention", "mlp"] | tuple[Text, ...], BeforeValidator(_as_tuple)] = (
        Field(
            default="all-linear",
            description="Modules to adapt: all-linear (every linear layer of the decoder), those of attention, those "
            "between (mlp), or a list of names",
            examples=[["q_proj", "v_proj"]],
        )
    )
    modules_to_save: Annotated[tuple[Text, ...] | None, BeforeValidator(_as_tuple)] = Field(
        default=None,
        description="Modules to train whole, beside the adapter and saved in it, such as embed_tokens and lm_head",
        examples=[["embed_tokens", "lm_head"]],
    )
    rank_pattern: dict[str, Annotated[int, Field(ge=1, le=1024)]] = Field(
        default={},
        description="Other ranks for some modules: {end of their names, or an expression for it: rank}",
        examples=[{"q_proj": 32}],
    )
    alpha_pattern: dict[str, Annotated[float, Field(gt=0, le=65536)]] = Field(
        default={},
        description="Other alphas for some modules",
        examples=[{"q_proj": 64}],
    )
    b_rate_ratio: float | None = Field(
        default=None,
        gt=0,
        le=1000,
        description="The adapter's B learns at so many times the learning rate (LoRA+); without it at the same",
        examples=[16.0],
    )
    start_from: Annotated[Text, InputFolder()] | None = Field(
        default=None,
        description="An adapter to go on from, of this or another program: a folder as PEFT writes it, or a run's; "
        "rank, alpha, their patterns, targets, rslora, dora and modules_to_save are the adapter's",
        examples=["runs/first"],
    )
    initial: Literal["zero", "loftq"] = Field(
        default="zero",
        description="What a new adapter is: zero: without effect; loftq: what makes up best for what the base lost "
        "to 4 bits (method qlora)",
    )
    rslora: bool = Field(
        default=False,
        description="Scale by alpha / sqrt(rank), which is steadier at high ranks",
    )
    dora: bool = Field(
        default=False,
        description="Learn the length of each row of the adapted weights apart from its direction (DoRA): better at "
        "low ranks, and slower",
    )


class TrainSettings(Section):
    """How to train."""

    objective: Literal["supervised", "dpo", "orpo", "kto"] = Field(
        default="supervised",
        description="supervised: learn the answers; dpo, orpo: learn from preference pairs (chosen, rejected) which "
        "of two answers is better, dpo beside the base (adapters only), orpo by itself; kto: learn from answers with "
        "a label, good or bad (adapters only)",
    )
    beta: float = Field(
        default=0.1,
        gt=0,
        le=100,
        description="Of dpo and kto: how dear it is to leave the base; of orpo: the weight of the pairs",
    )
    good_weight: float = Field(
        default=1.0,
        gt=0,
        le=1000,
        description="Of kto: what a good answer counts; with more bad ones than good ones, give more",
    )
    bad_weight: float = Field(default=1.0, gt=0, le=1000, description="Of kto: what a bad answer counts")
    epochs: float = Field(
        default=1.0,
        gt=0,
        le=10_000,
        description="Passes over the training data; may be a fraction; not together with steps",
    )
    steps: Count | None = Field(
        default=None,
        description="Optimizer steps, instead of epochs; without it they follow from epochs",
        examples=[500],
    )
    micro_batch: int = Field(
        default=4, ge=1, le=65536, description="Rows of max_tokens that go through the model at once"
    )
    accumulation: int = Field(default=1, ge=1, le=65536, description="Micro-batches to an optimizer step")
    tokens_per_step: Count | None = Field(
        default=None,
        description="Accumulate as many micro-batches as make an optimizer step of about so many tokens",
        examples=[8192],
    )
    learning_rate: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Peak learning rate; without it 2e-4 (lora, qlora) or 1e-5 (full); of dpo and kto 5e-6; of orpo "
        "8e-5 or 8e-6 (full); with optimizer lion a fifth of these",
        examples=[2e-4],
        json_schema_extra={"usual": "between 1e-6 and 2e-3"},
    )
    schedule: Literal["cosine", "linear", "constant", "polynomial", "cosine_restarts"] = Field(
        default="cosine", description="How the learning rate falls after the warm-up"
    )
    schedule_power: float = Field(
        default=2.0, gt=0, le=100, description="Of schedule polynomial: 1 is linear, more falls sooner"
    )
    schedule_cycles: int = Field(
        default=2, ge=1, le=1000, description="Of schedule cosine_restarts: how often the rate falls from its peak"
    )
    final_rate_share: float = Field(
        default=0.0, ge=0, lt=1, description="The learning rate falls to this share of its peak, and no lower"
    )
    warmup_share: float = Field(
        default=0.03,
        ge=0,
        lt=1,
        description="Share of the steps in which the learning rate rises from zero",
    )
    warmup_steps: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="Steps in which the learning rate rises, instead of a share", examples=[100]
    )
    weight_decay: float = Field(
        default=0.0, ge=0, lt=1, description="Decoupled weight decay: matrices shrink by so much of the learning rate"
    )
    betas: Annotated[tuple[Beta, Beta], BeforeValidator(_as_tuple)] | None = Field(
        default=None,
        description="The optimizer's decay rates; without them its own: adamw 0.9 and 0.999 (first and second "
        "moment), lion 0.9 and 0.99; adafactor has none",
        examples=[[0.9, 0.95]],
    )
    max_grad_norm: float = Field(
        default=1.0,
        gt=0,
        le=1_000_000,
        description="Gradients are scaled down to this norm where they exceed it",
    )
    neftune_alpha: float | None = Field(
        default=None,
        gt=0,
        le=1000,
        description="Noise on the embeddings while training (NEFTune): at most so much, divided by the square root "
        "of a row's tokens times the model's width; without it none",
        examples=[5.0],
    )
    model_dropout: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        default=None,
        description="The model's own dropout, apart from the adapter's (lora.dropout): all that its configuration "
        "has become so much; without it they stay as they are (most models have 0)",
        examples=[0.05],
    )
    optimizer: Literal["adamw", "adamw8bit", "lion", "adafactor"] = Field(
        default="adamw",
        description="Bytes of state to a trained weight: adamw 8; adamw8bit 2; lion 4, at a fifth of adamw's rate; "
        "adafactor next to none, at the rate that is given",
    )
    optimizer_states: Literal["memory", "disk"] = Field(
        default="memory",
        description="Where the optimizer's states and the gradients lie; disk: in a file in the run's folder, "
        "read and written slice by slice in every step: slower, and the same result",
    )
    recompute: Literal["none", "layers"] = Field(
        default="none",
        description="layers computes each layer again in the backward pass: less memory, a third more time",
    )
    resident_layers: Annotated[int, Field(ge=0, le=4096)] | None = Field(
        default=None,
        description="Layers whose frozen 4-bit weights stay in memory (method qlora); the others are read from the "
        "disk a layer ahead of their use; without it all of them stay",
        examples=[8],
    )
    compute: Literal["auto", "bfloat16", "float16", "float32", "int8"] = Field(
        default="auto",
        description="Number format of the products; auto: bfloat16 where the machine computes with it; float16: with "
        "a scaled loss, for what computes it and not bfloat16; int8: frozen weights in 8-bit integers while training "
        "(quicker, less exact), all else as bfloat16",
    )
    validate_every_steps: Count | None = Field(
        default=None,
        description="Validate after every so many steps; without it at the end",
        examples=[100],
    )
    score_every_steps: Count | None = Field(
        default=None,
        description="After every so many steps, and at the end, answer validation questions and score the answers as "
        "evaluate.task says (none: as text); without it never",
        examples=[100],
    )
    score_samples: int = Field(
        default=50,
        ge=1,
        le=1_000_000,
        description="How many questions are answered for a score, the first ones of the validation data; each costs "
        "up to evaluate.max_new_tokens passes, evaluate.batch of them at once",
    )
    best_by: Literal["loss", "score"] = Field(
        default="loss",
        description="By what early stopping and restore_best judge: the validation loss, or the score of "
        "score_every_steps",
    )
    early_stopping_patience: Count | None = Field(
        default=None,
        description="End the run after so many validations (best_by score: scores) in a row that were no better; "
        "without it never",
        examples=[3],
    )
    early_stopping_min_delta: float = Field(
        default=0.0,
        ge=0,
        le=100,
        description="How much less a validation loss (best_by score: how much more a score) must be, to be better",
    )
    restore_best: bool = Field(
        default=False, description="The result is the model of the best validation (or score), not of the last step"
    )
    on_non_finite: Literal["stop", "skip", "lower_rate"] = Field(
        default="stop",
        description="Where a loss or gradients are no finite numbers: stop; skip the step; or go back to the newest "
        "checkpoint's weights and go on behind the step, with half the learning rate",
    )
    non_finite_limit: int = Field(
        default=3, ge=1, le=100_000, description="Steps that may be skipped so before the run stops"
    )
    save_every_steps: Count | None = Field(
        default=None,
        description="Write a checkpoint after every so many steps; without it at the end",
        examples=[100],
    )
    trackers: Annotated[
        tuple[Literal["wandb", "mlflow", "trackio", "swanlab"], ...] | None, BeforeValidator(_as_tuple)
    ] = Field(
        default=None,
        description="Programs told of every step, beside metrics.jsonl and TensorBoard; they must be installed",
        examples=[["wandb"]],
    )
    keep_checkpoints: int = Field(default=2, ge=1, le=1000, description="The newest checkpoints to keep")
    threads: Annotated[int, Field(ge=1, le=4096)] | None = Field(
        default=None,
        description="CPU threads; without it as many as affinity and the container allow",
        examples=[4],
    )
    backend: Literal["auto", "native", "reference"] = Field(
        default="auto",
        description="Which kernels run: native (compiled), reference (plain torch), or the best there is",
    )


class EvaluateSettings(Section):
    """How the result is judged against the base model."""

    task: Literal["none", "sql", "text", "perplexity"] = Field(
        default="none",
        description="sql: execution accuracy on a database; text: BLEU, chrF, ROUGE-L; or perplexity",
    )
    data: FilePath | None = Field(
        default=None, description="The questions; without it the validation data", examples=["test.jsonl"]
    )
    database: FilePath | None = Field(
        default=None,
        description="The SQLite file the answers of task sql are run on",
        examples=["shop.sqlite"],
    )
    max_new_tokens: int = Field(default=128, ge=1, le=131_072, description="Longest answer, in tokens")
    batch: int = Field(default=16, ge=1, le=65536, description="Questions answered at once")


class RunConfig(Section):
    """Everything a run depends on, as the user wrote it."""

    model: Annotated[Text, ModelReference()] = Field(
        default="bundled", description="The base model: bundled, a folder, a GGUF file or a hub name"
    )
    method: Literal["auto", "qlora", "lora", "full"] = Field(
        default="qlora",
        description="qlora: an adapter on a 4-bit base; lora: on a 16-bit base; full: train every weight; auto: lora "
        "where it fits, else qlora",
    )
    memory: Annotated[Text, AfterValidator(_as_budget)] | None = Field(
        default=None,
        description="The most memory to take; settings that are not given here are chosen so that the run stays "
        "within it; auto: what the machine (or its container) has left",
        examples=["16GB"],
    )
    output: Annotated[Text, OutputFolder()] | None = Field(
        default=None,
        description="The run's folder; without it runs/<name>-<timestamp>",
        examples=["runs/first"],
    )
    seed: int = Field(default=0, ge=0, le=2**32 - 1, description="Seed of everything random")
    data: DataSettings = Field(description="What to learn from, and how it becomes tokens")
    lora: LoraSettings = Field(default=LoraSettings(), description="The adapter (methods lora and qlora)")
    train: TrainSettings = Field(default=TrainSettings(), description="How to train")
    evaluate: EvaluateSettings = Field(
        default=EvaluateSettings(), description="How the result is judged against the base model"
    )

    def with_accumulation(self) -> RunConfig:
        """The same with `train.accumulation` as `train.tokens_per_step` asks for, where it does."""
        train = self.train
        if train.tokens_per_step is None:
            return self
        count = accumulation_for(train.tokens_per_step, self.data.max_tokens, train.micro_batch)
        return self.model_copy(update={"train": train.model_copy(update={"accumulation": count})})

    @model_validator(mode="after")
    def _refuse_conflicts(self) -> Self:
        found = list(conflicts(self))
        if found:
            raise CombinationError(found)
        return self
