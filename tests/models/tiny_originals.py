"""Tiny random ChatGLM3 and Baichuan checkpoints in their makers' layout, their forward passes in plain torch, and
small sentencepiece models of real text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from sentencepiece import SentencePieceTrainer
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parents[2]
ROLE_TOKENS = ["<reserved_106>", "<reserved_107>"]
CHATGLM = {
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "auto_map": {"AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration"},
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_residual_connection_post_layernorm": False,
    "ffn_hidden_size": 96,
    "hidden_size": 64,
    "kv_channels": 16,
    "layernorm_epsilon": 1e-5,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 4,
    "num_layers": 2,
    "padded_vocab_size": 1088,
    "post_layer_norm": True,
    "rmsnorm": True,
    "seq_length": 8192,
    "torch_dtype": "float16",
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
BAICHUAN = {
    "model_type": "baichuan",
    "architectures": ["BaichuanForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM"},
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "max_position_embeddings": 4096,
    "model_max_length": 4096,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "rms_norm_eps": 1e-6,
    "vocab_size": 1088,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "torch_dtype": "bfloat16",
    "_from_model_config": True,
    "tokenizer_class": "BaichuanTokenizer",
}


def train_vocabulary(folder: Path, symbols: Sequence[str] = (), **settings: Any) -> Path:
    """A byte-pair sentencepiece model of some 1000 pieces as `folder`/tokenizer.model; identity normalisation."""
    text = "\n".join((REPOSITORY / name).read_text(encoding="utf-8") for name in ("README.zh.md", "README.md"))
    lines = [line for line in text.splitlines() if line.strip()]
    folder.mkdir(parents=True, exist_ok=True)
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 2),
        model_prefix=str(folder / "tokenizer"),
        **{
            "vocab_size": 1000,
            "model_type": "bpe",
            "byte_fallback": True,
            "split_digits": True,
            "allow_whitespace_only_pieces": True,
            "remove_extra_whitespaces": False,
            "normalization_rule_name": "identity",
            "character_coverage": 0.98,
            "user_defined_symbols": list(symbols),
            "unk_id": 0,
            "bos_id": 1,
            "eos_id": 2,
            "pad_id": -1,
            "num_threads": 1,
            "minloglevel": 2,
            **settings,
        },
    )
    return folder / "tokenizer.model"


class Drawing:
    """Random float32 tensors by name."""

    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self.tensors: dict[str, Tensor] = {}

    def add(self, name: str, *shape: int, scale: float = 0.3, about: float = 0.0) -> None:
        self.tensors[name] = about + scale * torch.randn(shape, generator=self._generator)


def draw_chatglm(config: dict[str, Any]) -> dict[str, Tensor]:
    drawn = Drawing()
    width, feed_forward, head_dim = config["hidden_size"], config["ffn_hidden_size"], config["kv_channels"]
    rows = (config["num_attention_heads"] + 2 * config["multi_query_group_num"]) * head_dim
    drawn.add("transformer.embedding.word_embeddings.weight", config["padded_vocab_size"], width, scale=1.0)
    drawn.tensors["transformer.rotary_pos_emb.inv_freq"] = torch.ones(head_dim // 4)
    for layer in range(config["num_layers"]):
        at = f"transformer.encoder.layers.{layer}"
        drawn.add(f"{at}.input_layernorm.weight", width, scale=0.1, about=1.0)
        drawn.add(f"{at}.self_attention.query_key_value.weight", rows, width)
        if config["add_qkv_bias"]:
            drawn.add(f"{at}.self_attention.query_key_value.bias", rows)
        drawn.add(f"{at}.self_attention.dense.weight", width, width)
        drawn.add(f"{at}.post_attention_layernorm.weight", width, scale=0.1, about=1.0)
        drawn.add(f"{at}.mlp.dense_h_to_4h.weight", 2 * feed_forward, width)
        drawn.add(f"{at}.mlp.dense_4h_to_h.weight", width, feed_forward)
    drawn.add("transformer.encoder.final_layernorm.weight", width, scale=0.1, about=1.0)
    drawn.add("transformer.output_layer.weight", config["padded_vocab_size"], width)
    return drawn.tensors


def draw_baichuan(config: dict[str, Any]) -> dict[str, Tensor]:
    drawn = Drawing()
    width, feed_forward = config["hidden_size"], config["intermediate_size"]
    head_dim = width // config["num_attention_heads"]
    drawn.add("model.embed_tokens.weight", config["vocab_size"], width, scale=1.0)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        drawn.add(f"{at}.self_attn.W_pack.weight", 3 * width, width)
        drawn.add(f"{at}.self_attn.o_proj.weight", width, width)
        drawn.tensors[f"{at}.self_attn.rotary_emb.inv_freq"] = 10000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
        drawn.add(f"{at}.mlp.gate_proj.weight", feed_forward, width)
        drawn.add(f"{at}.mlp.up_proj.weight", feed_forward, width)
        drawn.add(f"{at}.mlp.down_proj.weight", width, feed_forward)
        drawn.add(f"{at}.input_layernorm.weight", width, scale=0.1, about=1.0)
        drawn.add(f"{at}.post_attention_layernorm.weight", width, scale=0.1, about=1.0)
    drawn.add("model.norm.weight", width, scale=0.1, about=1.0)
    drawn.add("lm_head.weight", config["vocab_size"], width)
    drawn.tensors["lm_head.weight"] *= torch.linspace(0.1, 3.0, config["vocab_size"])[:, None]
    return drawn.tensors


def write_folder(
    folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], vocabulary: Path, pickled: bool = False
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if pickled:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    (folder / "tokenizer.model").write_bytes(vocabulary.read_bytes())
    return folder


def rms_norm(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + epsilon)


def attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """[T, H, D] each, causal -> [T, H * D]."""
    scores = torch.einsum("thd,shd->hts", queries, keys) / queries.shape[-1] ** 0.5
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(later, float("-inf")).softmax(-1)
    return torch.einsum("hts,shd->thd", weights, values).flatten(1)


def rotated_pairs(heads: Tensor, base: float) -> Tensor:
    """[T, H, D]: the first half of each head turned in neighbouring pairs, which are taken as complex numbers."""
    share = heads.shape[-1] // 2
    theta = base ** -(torch.arange(0, share, 2, dtype=torch.float64) / share)
    angles = torch.outer(torch.arange(heads.shape[0], dtype=torch.float64), theta)
    turned = torch.view_as_complex(heads[..., :share].double().unflatten(-1, (-1, 2)).contiguous())
    turned = turned * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat([torch.view_as_real(turned).flatten(-2).float(), heads[..., share:]], -1)


def rotated_halves(heads: Tensor, base: float) -> Tensor:
    """[T, H, D]: dimension i turned with dimension i + D / 2."""
    dim = heads.shape[-1]
    theta = base ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.outer(torch.arange(heads.shape[0], dtype=torch.float64), theta)[:, None]
    left, right = heads.double().chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1).float()


def chatglm_logits(config: dict[str, Any], tensors: dict[str, Tensor], tokens: list[int]) -> Tensor:
    """As THUDM/chatglm3-6b's modeling_chatglm.py computes them, [T, V] in float32."""
    heads, groups, dim = config["num_attention_heads"], config["multi_query_group_num"], config["kv_channels"]
    epsilon, base = config["layernorm_epsilon"], 10000.0 * config.get("rope_ratio", 1)
    hidden = tensors["transformer.embedding.word_embeddings.weight"][tokens]
    for layer in range(config["num_layers"]):
        own = {
            name.split(f".layers.{layer}.")[1]: value
            for name, value in tensors.items()
            if f".layers.{layer}." in name
        }
        normed = rms_norm(hidden, own["input_layernorm.weight"], epsilon)
        mixed = normed @ own["self_attention.query_key_value.weight"].T
        mixed = mixed + own.get("self_attention.query_key_value.bias", 0)
        queries, keys, values = (
            part.unflatten(-1, (-1, dim)) for part in mixed.split([heads * dim, groups * dim, groups * dim], -1)
        )
        queries, keys = rotated_pairs(queries, base), rotated_pairs(keys, base)
        shared = [each.repeat_interleave(heads // groups, 1) for each in (keys, values)]
        hidden = hidden + attention(queries, *shared) @ own["self_attention.dense.weight"].T
        normed = rms_norm(hidden, own["post_attention_layernorm.weight"], epsilon)
        gate, up = (normed @ own["mlp.dense_h_to_4h.weight"].T).chunk(2, -1)
        hidden = hidden + (torch.nn.functional.silu(gate) * up) @ own["mlp.dense_4h_to_h.weight"].T
    final = rms_norm(hidden, tensors["transformer.encoder.final_layernorm.weight"], epsilon)
    return final @ tensors["transformer.output_layer.weight"].T


def baichuan_logits(config: dict[str, Any], tensors: dict[str, Tensor], tokens: list[int]) -> Tensor:
    """As baichuan-inc/Baichuan2-7B-Chat's modeling_baichuan.py computes them, [T, V] in float32."""
    heads, epsilon = config["num_attention_heads"], config["rms_norm_eps"]
    hidden = tensors["model.embed_tokens.weight"][tokens]
    for layer in range(config["num_hidden_layers"]):
        own = {
            name.split(f".layers.{layer}.")[1]: value
            for name, value in tensors.items()
            if f".layers.{layer}." in name
        }
        normed = rms_norm(hidden, own["input_layernorm.weight"], epsilon)
        packed = (normed @ own["self_attn.W_pack.weight"].T).unflatten(-1, (3, heads, -1))
        queries, keys, values = packed.unbind(1)
        mixed = attention(rotated_halves(queries, 10000.0), rotated_halves(keys, 10000.0), values)
        hidden = hidden + mixed @ own["self_attn.o_proj.weight"].T
        normed = rms_norm(hidden, own["post_attention_layernorm.weight"], epsilon)
        gate = torch.nn.functional.silu(normed @ own["mlp.gate_proj.weight"].T)
        hidden = hidden + (gate * (normed @ own["mlp.up_proj.weight"].T)) @ own["mlp.down_proj.weight"].T
    head = tensors["lm_head.weight"]
    if config["architectures"] == ["BaichuanForCausalLM"]:
        head = torch.nn.functional.normalize(head)
    return rms_norm(hidden, tensors["model.norm.weight"], epsilon) @ head.T


def write_gguf(path: Path, architecture: str, settings: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    """A float32 GGUF file; its vocabulary is only there because llama.cpp wants one."""
    import gguf

    writer = gguf.GGUFWriter(str(path), architecture)
    for name, value in settings.items():
        getattr(writer, f"add_{name}")(value)
    letters = [chr(256 + byte) for byte in range(256)]
    rows = tensors["token_embd.weight"].shape[0]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*letters, *(f"<{number}>" for number in range(256, rows))])
    writer.add_token_types([1] * 256 + [3] * (rows - 256))
    writer.add_token_merges([f"{letters[0]} {letters[1]}"])
    writer.add_eos_token_id(257)
    writer.add_bos_token_id(256)
    for name, value in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(value, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama_cpp_logits(path: Path, tokens: list[int]) -> Tensor:
    import llama_cpp

    model = llama_cpp.Llama(
        str(path), n_ctx=128, n_batch=128, logits_all=True, verbose=False, n_threads=1, type_k=0, type_v=0
    )
    model.eval(tokens)
    return torch.from_numpy(np.array(model.scores[: len(tokens)]))
