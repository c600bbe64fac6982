"""Tiny random models of the families that must work whole, in folders as their makers publish them."""

from __future__ import annotations

import base64
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

TESTS = Path(__file__).resolve().parents[1]
sys.path += [str(TESTS / "models"), str(TESTS / "data")]

from template_families import GEMMA, LLAMA3, MISTRAL, PHI3, QWEN2  # noqa: E402
from tiny_originals import (  # noqa: E402
    BAICHUAN,
    CHATGLM,
    ROLE_TOKENS,
    draw_baichuan,
    draw_chatglm,
    train_vocabulary,
    write_folder,
)

from fitune.models.chatglm import SPECIAL_TOKENS_4  # noqa: E402

CONVERTED = ("chatglm3", "glm-4", "baichuan2")
VOCABULARY = 320
BYTES = 256
# Abridged, written anew: an empty thought before the last answer (Qwen3), a date and a marked answer (SmolLM3).
QWEN3 = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMOLLM3 = (
    "{{ '<|im_start|>system\nToday: ' + strftime_now('%d %B %Y') + '<|im_end|>\n' }}"
    "{% for message in messages %}{% if message.role == 'assistant' %}"
    "{% generation %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' + message.content + '<|im_end|>\n' }}"
    "{% endgeneration %}{% else %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}{% endif %}"
)
# Nothing ends the last answer: the model stops on the token that opens the user's next turn.
GLM4 = (
    "[gMASK]<sop>{% for message in messages %}{{ '<|' + message.role + '|>\n' + message.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
CHATML_TOKENS = ("<|im_end|>", "<|endoftext|>", "<|im_start|>", "<think>", "</think>")
GEMMA_TOKENS = ("<eos>", "<pad>", "<bos>", "<start_of_turn>", "<end_of_turn>")
GLM_TOKENS = ("<|endoftext|>", "<|user|>", "<|observation|>", "[gMASK]", "<sop>", "<|system|>", "<|assistant|>")
LLAMA3_TOKENS = ("<|eot_id|>", "<|end_of_text|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>")


@dataclass(frozen=True)
class Published:
    """What a family's folder holds.

    Attributes:
        config: config.json with the fields that the makers write, sizes aside.
        tokens: added to the 256 bytes, the first one ends texts.
        template: the chat template; None: a base model without one.
        ends: of the tokens, those that generation_config.json stops on.
    """

    config: dict[str, Any]
    tokens: tuple[str, ...]
    template: str | None
    ends: tuple[str, ...]


def _config(model_type: str, architecture: str, **own: Any) -> dict[str, Any]:
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "vocab_size": VOCABULARY,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.02,
        "attention_dropout": 0.0,
        "use_cache": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.46.0",
        **own,
    }


_GEMMA_ACT = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
_LLAMA = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1}
_GEMMA3 = {"hidden_activation": "gelu_pytorch_tanh", "head_dim": 32, "query_pre_attn_scalar": 32,
           "sliding_window": 16, "sliding_window_pattern": 2, "rope_theta": 1e6, "rope_local_base_freq": 10000.0,
           "attn_logit_softcapping": None, "final_logit_softcapping": None,
           "cache_implementation": "hybrid"}  # fmt: skip
_PHI = {"auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "attention_bias": False, "embd_pdrop": 0.0,
        "resid_pdrop": 0.0, "hidden_act": "silu", "rope_theta": 10000.0, "rms_norm_eps": 1e-5}  # fmt: skip
_FACTORS = [1.0 + place / 10 for place in range(6)]  # of half the turned dimensions: 16 * 0.75 / 2

FAMILIES = {
    "llama-2": Published(
        _config("llama", "LlamaForCausalLM", **_LLAMA, num_key_value_heads=4, rope_scaling=None, rms_norm_eps=1e-5),
        ("</s>", "<unk>", "<s>"), None, ("</s>",),
    ),
    "llama-3.2": Published(
        _config("llama", "LlamaForCausalLM", **_LLAMA, tie_word_embeddings=True, rope_theta=500000.0, head_dim=16,
                max_position_embeddings=131072, rope_scaling={
                    "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                    "original_max_position_embeddings": 8192, "rope_type": "llama3"}),
        LLAMA3_TOKENS, LLAMA3, ("<|end_of_text|>", "<|eot_id|>"),
    ),
    "mistral": Published(
        _config("mistral", "MistralForCausalLM", hidden_act="silu", sliding_window=16, rope_theta=10000.0,
                tie_word_embeddings=False),
        ("</s>", "<unk>", "<s>"), MISTRAL, ("</s>",),
    ),
    "qwen2": Published(
        _config("qwen2", "Qwen2ForCausalLM", hidden_act="silu", rope_theta=1e6, sliding_window=32768,
                use_sliding_window=False, max_window_layers=70, tie_word_embeddings=True),
        CHATML_TOKENS, QWEN2, ("<|im_end|>", "<|endoftext|>"),
    ),
    "qwen3": Published(
        _config("qwen3", "Qwen3ForCausalLM", hidden_act="silu", head_dim=24, rope_theta=1e6, sliding_window=None,
                use_sliding_window=False, max_window_layers=36, rope_scaling=None, attention_bias=False,
                tie_word_embeddings=False),
        CHATML_TOKENS, QWEN3, ("<|im_end|>", "<|endoftext|>"),
    ),
    "gemma": Published(
        _config("gemma", "GemmaForCausalLM", **_GEMMA_ACT, num_attention_heads=2, num_key_value_heads=1,
                head_dim=256, rope_theta=10000.0, rope_scaling=None, attention_bias=False),
        GEMMA_TOKENS, GEMMA, ("<eos>", "<end_of_turn>"),
    ),
    "gemma2": Published(
        _config("gemma2", "Gemma2ForCausalLM", **_GEMMA_ACT, head_dim=32, query_pre_attn_scalar=32,
                attn_logit_softcapping=50.0, final_logit_softcapping=30.0, sliding_window=16, rope_theta=10000.0,
                cache_implementation="hybrid", attention_bias=False),
        GEMMA_TOKENS, GEMMA, ("<eos>", "<end_of_turn>"),
    ),
    "gemma3": Published(
        _config("gemma3_text", "Gemma3ForCausalLM", **_GEMMA3, attention_bias=False),
        GEMMA_TOKENS, GEMMA, ("<eos>", "<end_of_turn>"),
    ),
    "gemma3-multimodal": Published(
        {
            "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "boi_token_index": 300,
            "eoi_token_index": 301, "image_token_index": 302, "mm_tokens_per_image": 4, "initializer_range": 0.02,
            "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0",
            "text_config": _config("gemma3_text", "Gemma3ForCausalLM", **_GEMMA3) | {
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
            "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64,
                              "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
                              "vision_use_head": False},
        },
        GEMMA_TOKENS, GEMMA, ("<eos>", "<end_of_turn>"),
    ),
    "phi-3": Published(
        _config("phi3", "Phi3ForCausalLM", **_PHI, num_key_value_heads=4, sliding_window=16, rope_scaling=None,
                original_max_position_embeddings=512, tie_word_embeddings=False),
        ("<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"), PHI3,
        ("<|endoftext|>", "<|assistant|>", "<|end|>"),
    ),
    "phi-4-mini": Published(
        _config("phi3", "Phi3ForCausalLM", **_PHI, full_attn_mod=1, interpolate_factor=1, lm_head_bias=False,
                mlp_bias=False, max_position_embeddings=131072, original_max_position_embeddings=4096,
                partial_rotary_factor=0.75, sliding_window=262144, tie_word_embeddings=True, rope_scaling={
                    "long_factor": [2 * factor for factor in _FACTORS], "short_factor": _FACTORS,
                    "type": "longrope"}),
        ("<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"), PHI3, ("<|endoftext|>", "<|end|>"),
    ),
    "smollm3": Published(
        _config("smollm3", "SmolLM3ForCausalLM", hidden_act="silu", num_hidden_layers=4, no_rope_layers=[1, 1, 1, 0],
                no_rope_layer_interval=4, layer_types=["full_attention"] * 4, rope_theta=5e6, rope_scaling=None,
                use_sliding_window=False, sliding_window=None, pretraining_tp=2, max_window_layers=28,
                attention_bias=False, mlp_bias=False, is_llama_config=True, tie_word_embeddings=True),
        CHATML_TOKENS, SMOLLM3, ("<|im_end|>",),
    ),
    "glm-4-hf": Published(
        _config("glm", "GlmForCausalLM", hidden_act="silu", head_dim=16, attention_bias=True, rope_theta=10000.0,
                partial_rotary_factor=0.5, rms_norm_eps=1.5625e-07, tie_word_embeddings=False),
        GLM_TOKENS, GLM4, GLM_TOKENS[:3],
    ),
    "glm4": Published(
        _config("glm4", "Glm4ForCausalLM", hidden_act="silu", head_dim=16, attention_bias=False, rope_theta=10000.0,
                partial_rotary_factor=0.5, rms_norm_eps=1e-5, tie_word_embeddings=False),
        GLM_TOKENS, GLM4, GLM_TOKENS[:3],
    ),
    "mixtral": Published(
        _config("mixtral", "MixtralForCausalLM", hidden_act="silu", num_local_experts=4, num_experts_per_tok=2,
                output_router_logits=False, router_aux_loss_coef=0.02, rope_theta=1e6, sliding_window=None,
                tie_word_embeddings=False),
        ("</s>", "<unk>", "<s>"), MISTRAL, ("</s>",),
    ),
}  # fmt: skip


def write_family(family: str, folder: Path) -> Path:
    """The folder of one of `FAMILIES`, or of those whose layout transformers does not carry."""
    if family == "chatglm3":
        vocabulary = train_vocabulary(folder.with_name("vocabulary"))
        return write_folder(folder, CHATGLM, _halved(draw_chatglm(CHATGLM), torch.float16), vocabulary)
    if family == "glm-4":
        return _write_glm_4(folder)
    if family == "baichuan2":
        vocabulary = train_vocabulary(
            folder.with_name("vocabulary"), symbols=list(ROLE_TOKENS), add_dummy_prefix=False
        )
        return write_folder(folder, BAICHUAN, _halved(draw_baichuan(BAICHUAN), torch.bfloat16), vocabulary)
    published = FAMILIES[family]
    folder.mkdir(parents=True)
    ids = {f"{role}_token_id": BYTES + published.tokens.index(token) for role, token in _roles(published).items()}
    stops = [BYTES + published.tokens.index(token) for token in published.ends]
    config = published.config | ids | {"eos_token_id": stops if len(stops) > 1 else ids["eos_token_id"]}
    if "text_config" in config:
        config["text_config"] = config["text_config"] | ids
    (folder / "config.json").write_text(json.dumps(config))
    _random_model(folder).save_pretrained(folder)
    # transformers writes a configuration of today's form, the makers wrote this one.
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops, "do_sample": True}))
    _tokenizer(published).save_pretrained(folder)
    return folder


def _write_glm_4(folder: Path) -> Path:
    """GLM-4-9B as THUDM published it first: ChatGLM3's layout, a tiktoken vocabulary, several end tokens."""
    vocabulary = folder.with_name("vocabulary")
    vocabulary.write_text("".join(f"{base64.b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(BYTES)))
    config = CHATGLM | {
        "eos_token_id": [BYTES + SPECIAL_TOKENS_4.index(token) for token in GLM_TOKENS[:3]],
        "padded_vocab_size": VOCABULARY, "vocab_size": VOCABULARY, "rope_ratio": 500, "pad_token_id": BYTES,
        "layernorm_epsilon": 1.5625e-07, "torch_dtype": "bfloat16",
    }  # fmt: skip
    return write_folder(folder, config, _halved(draw_chatglm(config), torch.bfloat16), vocabulary)


def _tokenizer(published: Published) -> transformers.PreTrainedTokenizerFast:
    """One token a byte, and the family's own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: place for place, letter in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(published.tokens))
    roles = {f"{role}_token": token for role, token in _roles(published).items()}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, chat_template=published.template, **roles)


def _roles(published: Published) -> dict[str, str]:
    begin = [token for token in published.tokens if token in ("<s>", "<bos>", "<|begin_of_text|>")]
    return {"eos": published.tokens[0], "pad": published.tokens[1], **({"bos": begin[0]} if begin else {})}


def _random_model(folder: Path) -> transformers.PreTrainedModel:
    """What the configuration in `folder` asks for, in bfloat16, with weights that carry a signal from end to end."""
    config = transformers.AutoConfig.from_pretrained(folder)
    kind: Any = (
        transformers.AutoModelForImageTextToText if "vision_config" in config.sub_configs
        else transformers.AutoModelForCausalLM
    )  # fmt: skip
    torch.manual_seed(0)
    model = kind.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(torch.bfloat16)


def _halved(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: value if "inv_freq" in name else value.to(dtype) for name, value in tensors.items()}
