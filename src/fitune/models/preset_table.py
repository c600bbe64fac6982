"""The published dimensions of well-known models, each with its source. Data only; `presets` reads it.

A configuration here has what memory and time depend on: sizes, heads, experts, windows, biases, ties, context.
Epsilons, rotary bases, initialisation and token ids are left out; transformers' defaults stand for them.

`published` is the number of parameters that the makers publish (for most, what the safetensors headers on the hub
add up to). `beyond` is how many of those are no part of the trained graph: a vision tower, a tied head that the
checkpoint stores a second time, rotary frequencies stored as tensors; `note` says which.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """One model's dimensions.

    Attributes:
        name: how it is called here.
        family: which recommended settings apply (`config.recommended`).
        config: `model_type` and the fields that transformers' configuration of that type takes.
        published: parameters as the makers publish them; only rounded where `is_rounded`.
        hub: names on the hub that have these dimensions; the first one's config.json is the source.
        beyond: how many of the published parameters the graph has not.
        note: what a reader of the numbers should know.
    """

    name: str
    family: str
    config: Mapping[str, Any]
    published: int
    hub: tuple[str, ...]
    beyond: int = 0
    is_rounded: bool = False
    note: str | None = None
    paper: str | None = None

    @property
    def source(self) -> str:
        """Where the dimensions are published."""
        return self.paper or f"https://huggingface.co/{self.hub[0]}/blob/main/config.json"


def _sizes(
    model_type: str, layers: int, hidden: int, feed_forward: int, heads: int, kv_heads: int, vocabulary: int,
    context: int, tied: bool = False, **more: Any,
) -> dict[str, Any]:  # fmt: skip
    return {
        "model_type": model_type,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": feed_forward,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": context,
        "tie_word_embeddings": tied,
        **more,
    }


def _meta(prefix: str, size: str, *suffixes: str) -> tuple[str, ...]:
    return tuple(f"meta-llama/{prefix}-{size}{suffix}" for suffix in suffixes)


_LLAMA = (
    Preset("llama-2-7b", "llama-2", _sizes("llama", 32, 4096, 11008, 32, 32, 32000, 4096), 6_738_415_616,
           _meta("Llama-2", "7b", "-hf", "-chat-hf")),
    Preset("llama-2-13b", "llama-2", _sizes("llama", 40, 5120, 13824, 40, 40, 32000, 4096), 13_015_864_320,
           _meta("Llama-2", "13b", "-hf", "-chat-hf")),
    Preset("llama-2-70b", "llama-2", _sizes("llama", 80, 8192, 28672, 64, 8, 32000, 4096), 68_976_648_192,
           _meta("Llama-2", "70b", "-hf", "-chat-hf")),
    Preset("llama-3-8b", "llama-3", _sizes("llama", 32, 4096, 14336, 32, 8, 128256, 8192), 8_030_261_248,
           _meta("Meta-Llama-3", "8B", "", "-Instruct")),
    Preset("llama-3-70b", "llama-3", _sizes("llama", 80, 8192, 28672, 64, 8, 128256, 8192), 70_553_706_496,
           _meta("Meta-Llama-3", "70B", "", "-Instruct")),
    Preset("llama-3.1-8b", "llama-3.1", _sizes("llama", 32, 4096, 14336, 32, 8, 128256, 131072), 8_030_261_248,
           (*_meta("Llama-3.1", "8B", "", "-Instruct"), *_meta("Meta-Llama-3.1", "8B", "", "-Instruct"))),
    Preset("llama-3.1-70b", "llama-3.1", _sizes("llama", 80, 8192, 28672, 64, 8, 128256, 131072), 70_553_706_496,
           (*_meta("Llama-3.1", "70B", "", "-Instruct"), *_meta("Meta-Llama-3.1", "70B", "", "-Instruct"),
            "meta-llama/Llama-3.3-70B-Instruct")),
    Preset("llama-3.2-1b", "llama-3.2", _sizes("llama", 16, 2048, 8192, 32, 8, 128256, 131072, True), 1_235_814_400,
           _meta("Llama-3.2", "1B", "", "-Instruct")),
    Preset("llama-3.2-3b", "llama-3.2", _sizes("llama", 28, 3072, 8192, 24, 8, 128256, 131072, True), 3_212_749_824,
           _meta("Llama-3.2", "3B", "", "-Instruct")),
    Preset("codellama-7b", "codellama", _sizes("llama", 32, 4096, 11008, 32, 32, 32016, 16384), 6_738_546_688,
           ("codellama/CodeLlama-7b-hf", "codellama/CodeLlama-7b-Instruct-hf")),
    Preset("codellama-13b", "codellama", _sizes("llama", 40, 5120, 13824, 40, 40, 32016, 16384), 13_016_028_160,
           ("codellama/CodeLlama-13b-hf", "codellama/CodeLlama-13b-Instruct-hf")),
    Preset("codellama-34b", "codellama", _sizes("llama", 48, 8192, 22016, 64, 8, 32000, 16384), 33_743_970_304,
           ("codellama/CodeLlama-34b-hf", "codellama/CodeLlama-34b-Instruct-hf")),
)  # fmt: skip

_BAICHUAN = Preset(
    "baichuan2-7b", "baichuan2", _sizes("llama", 32, 4096, 11008, 32, 32, 125696, 4096), 7_000_000_000,
    ("baichuan-inc/Baichuan2-7B-Base", "baichuan-inc/Baichuan2-7B-Chat"), is_rounded=True,
    paper="https://arxiv.org/abs/2309.10305",
    note="converted to a llama: W_pack is split, the head's rows are normalised; published as 7 billion",
)  # fmt: skip

# The `glm` layout of transformers; checkpoints in the older `chatglm` layout are converted to it.
_GLM = (
    Preset("chatglm3-6b", "chatglm3",
           _sizes("glm", 28, 4096, 13696, 32, 2, 65024, 8192, head_dim=128, attention_bias=True, pad_token_id=0,
                  eos_token_id=2), 6_243_584_000,
           ("THUDM/chatglm3-6b", "zai-org/chatglm3-6b", "THUDM/chatglm3-6b-base"),
           note="converted from the chatglm layout to glm; query_key_value is split"),
    Preset("glm-4-9b", "glm-4",
           _sizes("glm", 40, 4096, 13696, 32, 2, 151552, 131072, head_dim=128, attention_bias=True), 9_399_951_392,
           ("THUDM/glm-4-9b-chat-hf", "zai-org/glm-4-9b-chat-hf", "THUDM/glm-4-9b-chat", "THUDM/glm-4-9b-hf",
            "THUDM/glm-4-9b", "zai-org/glm-4-9b-chat", "zai-org/glm-4-9b-hf", "zai-org/glm-4-9b"), beyond=32,
           note="glm-4-9b-hf has this layout, the older glm-4-9b (chatglm) is converted to it; the published count "
                "includes 32 rotary frequencies; the context is the chat model's"),
)  # fmt: skip


def _qwen(version: str, size: str, *suffixes: str) -> tuple[str, ...]:
    return tuple(f"Qwen/{version}-{size}{suffix}" for suffix in suffixes or ("-Instruct", ""))


_QWEN2 = (
    Preset("qwen1.5-7b", "qwen1.5", _sizes("qwen2", 32, 4096, 11008, 32, 32, 151936, 32768), 7_721_324_544,
           _qwen("Qwen1.5", "7B", "-Chat", "")),
    Preset("qwen2-0.5b", "qwen2", _sizes("qwen2", 24, 896, 4864, 14, 2, 151936, 32768, True), 494_032_768,
           _qwen("Qwen2", "0.5B")),
    Preset("qwen2-1.5b", "qwen2", _sizes("qwen2", 28, 1536, 8960, 12, 2, 151936, 32768, True), 1_543_714_304,
           _qwen("Qwen2", "1.5B")),
    Preset("qwen2-7b", "qwen2", _sizes("qwen2", 28, 3584, 18944, 28, 4, 152064, 32768), 7_615_616_512,
           _qwen("Qwen2", "7B")),
    Preset("qwen2-72b", "qwen2", _sizes("qwen2", 80, 8192, 29568, 64, 8, 152064, 32768), 72_706_203_648,
           _qwen("Qwen2", "72B")),
    Preset("qwen2.5-0.5b", "qwen2.5", _sizes("qwen2", 24, 896, 4864, 14, 2, 151936, 32768, True), 494_032_768,
           _qwen("Qwen2.5", "0.5B")),
    Preset("qwen2.5-1.5b", "qwen2.5", _sizes("qwen2", 28, 1536, 8960, 12, 2, 151936, 32768, True), 1_543_714_304,
           _qwen("Qwen2.5", "1.5B")),
    Preset("qwen2.5-3b", "qwen2.5", _sizes("qwen2", 36, 2048, 11008, 16, 2, 151936, 32768, True), 3_085_938_688,
           _qwen("Qwen2.5", "3B")),
    Preset("qwen2.5-7b", "qwen2.5", _sizes("qwen2", 28, 3584, 18944, 28, 4, 152064, 32768), 7_615_616_512,
           _qwen("Qwen2.5", "7B")),
    Preset("qwen2.5-14b", "qwen2.5", _sizes("qwen2", 48, 5120, 13824, 40, 8, 152064, 32768), 14_770_033_664,
           _qwen("Qwen2.5", "14B")),
    Preset("qwen2.5-32b", "qwen2.5", _sizes("qwen2", 64, 5120, 27648, 40, 8, 152064, 32768), 32_763_876_352,
           _qwen("Qwen2.5", "32B")),
    Preset("qwen2.5-72b", "qwen2.5", _sizes("qwen2", 80, 8192, 29568, 64, 8, 152064, 32768), 72_706_203_648,
           _qwen("Qwen2.5", "72B")),
)  # fmt: skip

_HEAD_TWICE = "the published count of the checkpoint has the tied head a second time"


def _qwen3(name: str, sizes: tuple[int, ...], tied: bool, published: int, beyond: int = 0) -> Preset:
    layers, hidden, feed_forward, heads = sizes
    return Preset(
        f"qwen3-{name}", "qwen3",
        _sizes("qwen3", layers, hidden, feed_forward, heads, 8, 151936, 40960, tied, head_dim=128),
        published, _qwen("Qwen3", name.upper(), "", "-Base"), beyond, note=_HEAD_TWICE if beyond else None,
    )  # fmt: skip


_QWEN3 = (
    _qwen3("0.6b", (28, 1024, 3072, 16), True, 751_632_384, beyond=151936 * 1024),
    _qwen3("1.7b", (28, 2048, 6144, 16), True, 2_031_739_904, beyond=151936 * 2048),
    _qwen3("4b", (36, 2560, 9728, 32), True, 4_022_468_096),
    _qwen3("8b", (36, 4096, 12288, 32), False, 8_190_735_360),
    _qwen3("14b", (40, 5120, 17408, 40), False, 14_768_307_200),
    _qwen3("32b", (64, 5120, 25600, 64), False, 32_762_123_264),
    Preset("qwen3-30b-a3b", "qwen3",
           _sizes("qwen3_moe", 48, 2048, 6144, 32, 4, 151936, 40960, head_dim=128, moe_intermediate_size=768,
                  num_experts=128, num_experts_per_tok=8, norm_topk_prob=True), 30_532_122_624,
           _qwen("Qwen3", "30B-A3B", "", "-Base"), note="a mixture of 128 experts, of which 8 see each token"),
)  # fmt: skip


def _google(name: str, *suffixes: str) -> tuple[str, ...]:
    return tuple(f"google/{name}{suffix}" for suffix in suffixes)


_VISION = "the text decoder; the published count is the whole model's, with its vision tower"
_GEMMA = (
    Preset("gemma-2b", "gemma", _sizes("gemma", 18, 2048, 16384, 8, 1, 256000, 8192, True, head_dim=256),
           2_506_172_416, _google("gemma-2b", "", "-it")),
    Preset("gemma-7b", "gemma", _sizes("gemma", 28, 3072, 24576, 16, 16, 256000, 8192, True, head_dim=256),
           8_537_680_896, _google("gemma-7b", "", "-it")),
    Preset("gemma-2-2b", "gemma-2",
           _sizes("gemma2", 26, 2304, 9216, 8, 4, 256000, 8192, True, head_dim=256, sliding_window=4096),
           2_614_341_888, _google("gemma-2-2b", "", "-it")),
    Preset("gemma-2-9b", "gemma-2",
           _sizes("gemma2", 42, 3584, 14336, 16, 8, 256000, 8192, True, head_dim=256, sliding_window=4096),
           9_241_705_984, _google("gemma-2-9b", "", "-it")),
    Preset("gemma-2-27b", "gemma-2",
           _sizes("gemma2", 46, 4608, 36864, 32, 16, 256000, 8192, True, head_dim=128, sliding_window=4096,
                  query_pre_attn_scalar=144),
           27_227_128_320, _google("gemma-2-27b", "", "-it")),
    Preset("gemma-3-1b", "gemma-3",
           _sizes("gemma3_text", 26, 1152, 6912, 4, 1, 262144, 32768, True, head_dim=256, sliding_window=512),
           999_885_952, _google("gemma-3-1b", "-it", "-pt")),
    Preset("gemma-3-4b", "gemma-3",
           _sizes("gemma3_text", 34, 2560, 10240, 8, 4, 262208, 131072, True, head_dim=256, sliding_window=1024),
           4_300_079_472, _google("gemma-3-4b", "-it", "-pt"), beyond=419_816_304, note=_VISION),
    Preset("gemma-3-12b", "gemma-3",
           _sizes("gemma3_text", 48, 3840, 15360, 16, 8, 262208, 131072, True, head_dim=256, sliding_window=1024),
           12_187_325_040, _google("gemma-3-12b", "-it", "-pt"), beyond=421_290_864, note=_VISION),
    Preset("gemma-3-27b", "gemma-3",
           _sizes("gemma3_text", 62, 5376, 21504, 32, 16, 262208, 131072, True, head_dim=128, sliding_window=1024,
                  query_pre_attn_scalar=168),
           27_432_406_640, _google("gemma-3-27b", "-it", "-pt"), beyond=423_060_336, note=_VISION),
)  # fmt: skip

_MISTRAL = (
    Preset("mistral-7b-v0.1", "mistral", _sizes("mistral", 32, 4096, 14336, 32, 8, 32000, 32768, sliding_window=4096),
           7_241_732_096, ("mistralai/Mistral-7B-v0.1", "mistralai/Mistral-7B-Instruct-v0.1")),
    Preset("mistral-7b-v0.2", "mistral", _sizes("mistral", 32, 4096, 14336, 32, 8, 32000, 32768, sliding_window=None),
           7_241_732_096, ("mistralai/Mistral-7B-Instruct-v0.2",)),
    Preset("mistral-7b-v0.3", "mistral", _sizes("mistral", 32, 4096, 14336, 32, 8, 32768, 32768, sliding_window=None),
           7_248_023_552, ("mistralai/Mistral-7B-v0.3", "mistralai/Mistral-7B-Instruct-v0.3")),
    Preset("mixtral-8x7b", "mixtral",
           _sizes("mixtral", 32, 4096, 14336, 32, 8, 32000, 32768, num_local_experts=8, num_experts_per_tok=2),
           46_702_792_704, ("mistralai/Mixtral-8x7B-v0.1", "mistralai/Mixtral-8x7B-Instruct-v0.1"),
           note="a mixture of 8 experts, of which 2 see each token"),
)  # fmt: skip

_PHI = (
    Preset("phi-3-mini", "phi-3", _sizes("phi3", 32, 3072, 8192, 32, 32, 32064, 4096, sliding_window=2047),
           3_821_079_552, ("microsoft/Phi-3-mini-4k-instruct",),
           note="the 4k variant; the 128k one has the same sizes and a longer context"),
    Preset("phi-3-medium", "phi-3", _sizes("phi3", 40, 5120, 17920, 40, 10, 32064, 4096, sliding_window=2047),
           13_960_238_080, ("microsoft/Phi-3-medium-4k-instruct",),
           note="the 4k variant; the 128k one has the same sizes and a longer context"),
    Preset("phi-4", "phi-4", _sizes("phi3", 40, 5120, 17920, 40, 10, 100352, 16384, sliding_window=None),
           14_659_507_200, ("microsoft/phi-4",)),
)  # fmt: skip

_SMOLLM = (
    Preset("smollm2-135m", "smollm2", _sizes("llama", 30, 576, 1536, 9, 3, 49152, 8192, True), 134_515_008,
           ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M-Instruct")),
    Preset("smollm2-360m", "smollm2", _sizes("llama", 32, 960, 2560, 15, 5, 49152, 8192, True), 361_821_120,
           ("HuggingFaceTB/SmolLM2-360M", "HuggingFaceTB/SmolLM2-360M-Instruct")),
    Preset("smollm2-1.7b", "smollm2", _sizes("llama", 24, 2048, 8192, 32, 32, 49152, 8192, True), 1_711_376_384,
           ("HuggingFaceTB/SmolLM2-1.7B", "HuggingFaceTB/SmolLM2-1.7B-Instruct")),
    Preset("smollm3-3b", "smollm3", _sizes("smollm3", 36, 2048, 11008, 16, 4, 128256, 65536, True), 3_075_098_624,
           ("HuggingFaceTB/SmolLM3-3B", "HuggingFaceTB/SmolLM3-3B-Base")),
)  # fmt: skip

PRESETS: tuple[Preset, ...] = (
    *_LLAMA, _BAICHUAN, *_GLM, *_QWEN2, *_QWEN3, *_GEMMA, *_MISTRAL, *_PHI, *_SMOLLM,
)  # fmt: skip
