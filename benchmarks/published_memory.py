"""Measurements of fine-tuning memory that others published with their settings: data only, each with its source.

`plan_published.py` sets the plan beside them. A row is here if the source, the files it names or the tool's defaults
say model, method, adapter, rows, tokens a row, recomputation, optimizer and number formats. Left out for want of
that: LLaMA-Factory's table (https://github.com/hiyouga/LLaMA-Factory#hardware-requirement: estimates); figure 6 of
the QLoRA paper (https://arxiv.org/abs/2305.14314: partly estimated, without attention); torchtune's tutorials, the
first row of its table for Llama 3.2 3B, PEFT's comparison on MetaMathQA, the tables of ChatGLM3 and GLM-4 (how long
their rows were is not said); torchtune's rows for the A6000 and Qwen's full fine-tuning (which switches were on is
not said).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

GB, GIB = 10**9, 2**30
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
QUERY_VALUE = ("q_proj", "v_proj")
MLP = ("gate_proj", "up_proj", "down_proj")

Counted = Literal["allocated", "reserved", "device", "not said"]
Method = Literal["full", "lora", "qlora"]


@dataclass(frozen=True)
class Source:
    """Where a figure stands, and how it was measured.

    Attributes:
        url: the page or, with its commit, the file.
        settings: pages and files that say the settings.
        counted: torch's tensors alone (allocated), with what its allocator holds besides (reserved), everything on
            the device (device, as nvidia-smi shows).
        measured: how, in the source's own terms.
    """

    name: str
    url: str
    settings: tuple[str, ...]
    counted: Counted
    measured: str


@dataclass(frozen=True)
class Published:
    """One measurement, of one card where there were several.

    Attributes:
        card: as `fitune plan --on` calls it, or the memory that the source tells ("24GiB").
        count: of cards over which everything is spread (FSDP, ZeRO-3).
        note: what else tells it from the source's other measurements.
    """

    source: Source
    model: str
    method: Method
    rows: int
    row_tokens: int
    published_bytes: int
    card: str
    rank: int = 0
    targets: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    recompute: bool = False
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    count: int = 1
    note: str = ""

    @property
    def name(self) -> str:
        """Unique among the rows."""
        parts = [self.source.name, self.model, self.method, f"{self.rows}x{self.row_tokens}"]
        parts += ["recompute"] if self.recompute else []
        parts += [self.optimizer] if self.optimizer != "adamw" else []
        parts += [f"{self.count} cards"] if self.count > 1 else []
        return " ".join([*parts, *([self.note] if self.note else [])])


def _shape(
    model_type: str, layers: int, hidden: int, feed_forward: int, heads: int, kv_heads: int, vocabulary: int,
    tied: bool = False, **more: Any,
) -> Mapping[str, Any]:  # fmt: skip
    return MappingProxyType(
        {
            "model_type": model_type, "num_hidden_layers": layers, "hidden_size": hidden,
            "intermediate_size": feed_forward, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
            "vocab_size": vocabulary, "tie_word_embeddings": tied, **more,
        }
    )  # fmt: skip


# Models that have no preset. The first Qwen's layers are those of qwen2: gated, RMSNorm, biases on query, key, value.
SHAPES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        # https://huggingface.co/Qwen/Qwen-1_8B/blob/main/config.json; w1 and w2 have half of its intermediate_size
        "qwen-1.8b": _shape("qwen2", 24, 2048, 5504, 16, 16, 151936),
        # https://huggingface.co/Qwen/Qwen-14B/blob/main/config.json
        "qwen-14b": _shape("qwen2", 40, 5120, 13696, 40, 40, 152064),
        # https://huggingface.co/Qwen/Qwen-72B/blob/main/config.json
        "qwen-72b": _shape("qwen2", 80, 8192, 24576, 64, 64, 152064),
        # https://huggingface.co/microsoft/phi-1_5/blob/main/config.json
        "phi-1.5": _shape("phi", 24, 2048, 8192, 32, 32, 51200, partial_rotary_factor=0.5),
        # https://huggingface.co/stabilityai/stablelm-base-alpha-3b/blob/main/config.json
        "stablelm-alpha-3b": _shape("gpt_neox", 16, 4096, 16384, 32, 32, 50688, max_position_embeddings=4096),
        # https://huggingface.co/TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T/blob/main/config.json
        "tinyllama-1.1b": _shape("llama", 22, 2048, 5632, 32, 4, 32000),
        # https://huggingface.co/bigscience/bloomz-7b1/blob/main/config.json
        "bloomz-7b1": MappingProxyType(
            {"model_type": "bloom", "n_layer": 30, "hidden_size": 4096, "n_head": 32, "vocab_size": 250880}
        ),
    }
)

_TUNE = "https://github.com/pytorch/torchtune/blob"
_TORCHTUNE = Source(
    "torchtune", f"{_TUNE}/a9ea6d5bf023ebebca7a8ec7981099b03696c67a/README.md#memory-and-training-speed",
    (f"{_TUNE}/02d7035509a2cdfa8fc608c542b3d802b57a73ac/recipes/configs/llama3_1/8B_full_single_device.yaml",
     f"{_TUNE}/2943c61e7e4b73b1823e1518a32a24390446099f/recipes/configs/llama3_1/8B_lora_single_device.yaml",
     f"{_TUNE}/0b3e04adcc9acc7ba7e78cdf9bac541714dfe1dd/recipes/configs/llama3_1/8B_qlora_single_device.yaml"),
    "not said", "peak memory per GPU over an epoch; rows of 2048 packed tokens, torch.compile",
)  # fmt: skip
_TORCHTUNE_3B = Source(
    "torchtune", f"{_TUNE}/a9ea6d5bf023ebebca7a8ec7981099b03696c67a/README.md#optimization-flags",
    (f"{_TUNE}/03a19788a5ddba7d3ddea2a40f7ec952d3f4d558/recipes/configs/llama3_2/3B_full_single_device.yaml",
     f"{_TUNE}/2324983f767ad492b9820c5077304f320c971c4d/recipes/configs/llama3_2/3B_lora_single_device.yaml",
     f"{_TUNE}/033177875786d2530912185c5c7ceccaadd1d615/recipes/configs/llama3_2/3B_qlora_single_device.yaml"),
    "allocated", "peak memory active; rows of 4096 packed tokens; each row adds a technique to those before",
)  # fmt: skip
_LIT = "https://github.com/Lightning-AI/litgpt/blob"
_LITGPT = Source(
    "litgpt", f"{_LIT}/4839345a97a0a90bc5f2361664b04d665c9a0e89/tutorials/resource-tables.md",
    (f"{_LIT}/cc190152085ac60fe708455b2df8877f82d37087/finetune/lora.py",),
    "allocated", "torch.cuda.max_memory_allocated() / 1e9; the longest sample of Alpaca is in the first micro-batch",
)  # fmt: skip
_LITGPT_HUB = Source(
    "litgpt configs", f"{_LIT}/03ffc5515b251fb7e3a461efd0e3c163e45b6b3b/config_hub/finetune/README.md",
    (f"{_LIT}/0077627db0f53ca17d68ecc4e6d10f7a560601b5/config_hub/finetune/llama-2-7b/qlora.yaml",
     f"{_LIT}/3352a7aad4dabb6f56be6429c27830b481691eb4/config_hub/finetune/llama-3-8b/lora.yaml",
     f"{_LIT}/0d207708b5a4de272c2eeb9e6592d355bed058f6/config_hub/finetune/mistral-7b/lora.yaml",
     f"{_LIT}/089fc5c6ce6e6a61e1c1ef0d64b010ab0f460e4a/config_hub/finetune/tiny-llama/full.yaml"),
    "allocated", "torch.cuda.max_memory_allocated() / 1e9; samples of Alpaca2k, cut at 512 tokens",
)  # fmt: skip
_QWEN_URL = "https://github.com/QwenLM/Qwen/blob"
_QWEN = Source(
    "Qwen", f"{_QWEN_URL}/03cd81f5e4da6ab60fc8f97f3b8aa1206fdb08a9/README.md#profiling-of-memory-and-speed",
    (f"{_QWEN_URL}/00dceebbaaec2bf642ad327f7022ac9b6f8da187/finetune.py",
     f"{_QWEN_URL}/343017c4ce2e00a7f0ca8468a9d4173b9feae700/finetune/finetune_lora_single_gpu.sh",
     f"{_QWEN_URL}/05577dea695d1cd36a24daf51a9607adfbde0160/finetune/finetune_qlora_single_gpu.sh",
     f"{_QWEN_URL}/af22d5e0cec7a7c058a445fcc4cb374de960ad5f/finetune/ds_config_zero2.json"),
    "not said", "GPU memory in G (taken as 1e9 bytes); rows padded to the length, flash attention 2",
)  # fmt: skip
_FMS_URL = "https://github.com/foundation-model-stack/fms-acceleration/blob"
_FMS = Source(
    "fms", f"{_FMS_URL}/04702cc5b9f0e198d545b88a7c6fd9ade8c50bb8/scripts/benchmarks/refs/a100_80gb.csv",
    (f"{_FMS_URL}/01e0035b3ca7717b153ddcfde1adb44d861bd4bc/scripts/benchmarks/scenarios.yaml",
     f"{_FMS_URL}/1adc652c94b4dfb9dbe8177413f4235712f3bffb/scripts/benchmarks/defaults.yaml",
     f"{_FMS_URL}/1baf6aa448cc5fe2c87cbaf46be53096c2c8d79f/scripts/benchmarks/README.md",
     "https://github.com/foundation-model-stack/fms-acceleration/pull/16"),
    "allocated", "peak_torch_mem_alloc_in_bytes, from the Trainer's probes (max_memory_allocated); packed rows, of "
    "4096 tokens (tokens a second times seconds over samples)",
)  # fmt: skip
_ANSWER_URL = "https://github.com/AnswerDotAI/fsdp_qlora/blob"
_ANSWER = Source(
    "fsdp_qlora", f"{_ANSWER_URL}/23fafdfb4af403d0808038adafbfd74de265d33a/benchmarks_03_2024.md",
    (f"{_ANSWER_URL}/1a9fddfb660b85e46bdf18c3fcf0d599628c9c6c/train.py",),
    "reserved", "torch.cuda.max_memory_reserved() of a card; dummy rows of the full length",
)  # fmt: skip
_PEFT_DOCS = "https://github.com/huggingface/peft/blob"
_PEFT_DEEPSPEED = Source(
    "PEFT ZeRO-3", f"{_PEFT_DOCS}/09802c1b43fff9b087be42e149d70e5350ff407a/docs/source/accelerate/deepspeed.md",
    (), "device", "memory consumed per GPU, as a screenshot of the device's use shows; packed rows",
)  # fmt: skip
_PEFT_FSDP = Source(
    "PEFT FSDP", f"{_PEFT_DOCS}/018ca9d6f6dc9e77c7e458af816bd27681f7874d/docs/source/accelerate/fsdp.md",
    (), "device", "memory consumed per GPU; packed rows",
)  # fmt: skip
_PEFT_README = Source(
    "PEFT", f"{_PEFT_DOCS}/0032f32a82fcec45748606a1b9dcc52986cef168/README.md",
    (f"{_PEFT_DOCS}/026d1e0164165fcb4a2a98cd9b37af619745d8b3/examples/causal_language_modeling/"
     "peft_lora_clm_accelerate_ds_zero3_offload.py",),
    "allocated", "torch.cuda.max_memory_allocated(); rows padded to 64 tokens",
)  # fmt: skip
_UNSLOTH_URL = "https://docs.unsloth.ai/basics/unsloth-benchmarks"
_UNSLOTH_SAID = "the longest row that a card of this size took; the published points lie on one straight line"
_UNSLOTH = Source("Unsloth", _UNSLOTH_URL, (), "device", _UNSLOTH_SAID)
_HUGGING_FACE = Source("Hugging Face", _UNSLOTH_URL, (), "device", _UNSLOTH_SAID)


def published_rows() -> Iterator[Published]:
    """All measurements."""
    yield from _torchtune()
    yield from _litgpt()
    yield from _qwen()
    yield from _fms()
    yield from _answer()
    yield from _peft()
    yield from _unsloth()


def _row(
    source: Source, model: str, method: Method, rows: int, row_tokens: int, taken_bytes: float, card: str,
    *adapter: Any, **more: Any,
) -> Published:  # fmt: skip
    return Published(source, model, method, rows, row_tokens, round(taken_bytes), card, *adapter, **more)


def _torchtune() -> Iterator[Published]:
    card, model, size = "rtx4090", "llama-3.1-8b", (2, 2048)
    yield _row(_TORCHTUNE, model, "full", *size, 18.9 * GIB, card, recompute=True, optimizer="adamw8bit")
    yield _row(_TORCHTUNE, model, "lora", *size, 16.2 * GIB, card, 8, QUERY_VALUE, recompute=True)
    yield _row(_TORCHTUNE, model, "qlora", *size, 7.4 * GIB, card, 8, (*ATTENTION, *MLP), recompute=True)
    source, card, model, size = _TORCHTUNE_3B, "a100-80gb", "llama-3.2-3b", (2, 4096)
    yield _row(source, model, "full", *size, 60.0 * GIB, card, note="packed")
    yield _row(source, model, "full", *size, 51.0 * GIB, card, note="compiled")
    yield _row(source, model, "full", *size, 42.9 * GIB, card, note="chunked loss")
    yield _row(source, model, "full", *size, 24.9 * GIB, card, recompute=True)
    yield _row(source, model, "full", *size, 23.1 * GIB, card, recompute=True, note="update in backward")
    yield _row(source, model, "full", *size, 21.8 * GIB, card, recompute=True, note="offloaded activations")
    yield _row(source, model, "full", *size, 17.6 * GIB, card, recompute=True, optimizer="adamw8bit")
    adapted = ("q_proj", "v_proj", "o_proj", *MLP)
    yield _row(source, model, "lora", *size, 8.5 * GIB, card, 64, adapted, recompute=True)
    yield _row(source, model, "qlora", *size, 4.6 * GIB, card, 64, adapted, recompute=True)


def _litgpt() -> Iterator[Published]:
    card = "a100-40gb"
    for model, tokens, targets, figures in (
        ("phi-1.5", 1044, QUERY_VALUE,
         (("lora", 1, 4.82), ("qlora", 1, 3.72), ("lora", 2, 6.76), ("lora", 4, 10.68))),
        ("stablelm-alpha-3b", 1034, ("query_key_value",),
         (("lora", 1, 9.69), ("qlora", 1, 6.19), ("lora", 2, 12.10), ("lora", 4, 16.92))),
        ("llama-2-7b", 1304, QUERY_VALUE, (("lora", 1, 21.30), ("qlora", 1, 13.84), ("lora", 2, 29.07))),
        ("llama-2-13b", 1304, QUERY_VALUE, (("lora", 1, 38.12), ("qlora", 1, 22.55))),
    ):  # fmt: skip
        for method, rows, gigabytes in figures:
            yield _row(_LITGPT, model, method, rows, tokens, gigabytes * GB, card, 8, targets)
    card = "a10g"
    for model, method, rows, gigabytes in (
        ("llama-2-7b", "lora", 2, 19.77), ("llama-2-7b", "qlora", 2, 13.68), ("llama-3-8b", "lora", 1, 19.73),
        ("llama-3-8b", "qlora", 2, 17.41), ("mistral-7b-v0.1", "lora", 2, 20.66),
        ("mistral-7b-v0.1", "qlora", 2, 14.29),
    ):  # fmt: skip
        yield _row(_LITGPT_HUB, model, method, rows, 512, gigabytes * GB, card, 32, QUERY_VALUE)
    yield _row(_LITGPT_HUB, "tinyllama-1.1b", "full", 4, 512, 14.10 * GB, card)


def _qwen() -> Iterator[Published]:
    card = "a100-80gb"
    for model, method, figures in (
        ("qwen-1.8b", "lora", ((256, 6.7), (2048, 11.0), (8192, 21.8))),
        ("qwen1.5-7b", "lora", ((256, 20.1), (1024, 21.5), (2048, 23.8), (4096, 29.7), (8192, 36.6))),
        ("qwen-14b", "lora", ((256, 34.6), (2048, 37.4), (8192, 55.2))),
        ("qwen-1.8b", "qlora", ((256, 5.8), (2048, 7.8), (8192, 15.8))),
        ("qwen1.5-7b", "qlora", ((256, 11.5), (2048, 13.9), (8192, 23.5))),
        ("qwen-14b", "qlora", ((256, 18.7), (2048, 19.9), (8192, 27.9))),
        ("qwen-72b", "qlora", ((256, 61.4), (2048, 64.1), (8192, 75.6))),
    ):
        for tokens, gigabytes in figures:
            yield _row(_QWEN, model, method, 1, tokens, gigabytes * GB, card, 64, recompute=True)


def _fms() -> Iterator[Published]:
    source, card = _FMS, "a100-80gb"
    for model, method, rows, count, taken in (
        ("mistral-7b-v0.1", "full", 4, 1, 72_971_724_288),
        ("mistral-7b-v0.1", "full", 8, 1, 72_972_117_504),
        ("mistral-7b-v0.1", "lora", 4, 1, 26_108_963_328),
        ("mistral-7b-v0.1", "lora", 8, 1, 37_098_695_168),
        ("mistral-7b-v0.1", "qlora", 4, 1, 15_860_019_712),
        ("mistral-7b-v0.1", "qlora", 8, 1, 26_849_751_552),
        ("mixtral-8x7b", "qlora", 4, 1, 36_218_024_448),
        ("mixtral-8x7b", "qlora", 8, 1, 47_207_756_288),
        ("llama-2-70b", "qlora", 4, 1, 68_159_977_472),
        ("mistral-7b-v0.1", "lora", 2, 2, 15_123_161_088),
        ("mistral-7b-v0.1", "qlora", 2, 2, 9_974_622_720),
        ("mixtral-8x7b", "lora", 2, 2, 57_540_387_840),
        ("llama-2-70b", "qlora", 2, 2, 46_524_471_808),
    ):
        adapter = (16, ATTENTION) if method != "full" else ()
        yield _row(source, model, method, rows, 4096, taken, card, *adapter, recompute=True, count=count)
    for rows, taken in ((4, 22_825_932_800), (8, 40_278_956_032)):
        adapter = (16, ATTENTION)
        yield _row(
            source, "mistral-7b-v0.1", "qlora", rows, 4096, taken, card, *adapter, recompute=True,
            note="baseline-peft-bnb",
        )  # fmt: skip


def _answer() -> Iterator[Published]:
    source, card, adapted = _ANSWER, "rtx3090", ("k_proj", "q_proj", "v_proj", *MLP)
    for model, method, rows, tokens, count, gib in (
        ("llama-2-7b", "qlora", 8, 2048, 1, 20.94),
        ("llama-2-7b", "lora", 4, 2048, 1, 22.04),
        ("llama-2-7b", "qlora", 1, 512, 2, 4.98),
        ("llama-2-7b", "qlora", 4, 2048, 2, 11.22),
        ("llama-2-7b", "qlora", 10, 2048, 2, 20.97),
        ("llama-2-7b", "lora", 1, 2048, 2, 10.22),
        ("llama-2-7b", "lora", 6, 2048, 2, 21.35),
    ):
        yield _row(source, model, method, rows, tokens, gib * GIB, card, 64, adapted, recompute=True, count=count)


def _peft() -> Iterator[Published]:
    rows = ("llama-2-70b", "qlora", 2, 2048)
    yield _row(_PEFT_DEEPSPEED, "llama-2-70b", "lora", 8, 2048, 64 * GB, "h100", 8, recompute=True, count=8)
    yield _row(_PEFT_DEEPSPEED, *rows, 36.6 * GB, "40GiB", 8, recompute=True, count=2)
    yield _row(_PEFT_FSDP, *rows, 35.6 * GB, "40GiB", 8, recompute=True, count=2)
    yield _row(_PEFT_README, "bloomz-7b1", "lora", 8, 64, 32 * GB, "a100-80gb", 8, ("query_key_value",))


def _unsloth() -> Iterator[Published]:
    for source, figures in (
        (_HUGGING_FACE, ((932, 12), (5789, 24), (28454, 80))),
        (_UNSLOTH, ((21848, 12), (78475, 24), (342733, 80))),
    ):
        for tokens, gib in figures:
            yield _row(source, "llama-3.1-8b", "qlora", 1, tokens, gib * GIB, f"{gib}GiB", 32, recompute=True)
