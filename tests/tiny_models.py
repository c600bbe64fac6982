"""Tiny random models of several families, with a byte-level tokenizer, as folders and in memory."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from fitune.adapters.lora import inject
from fitune.data.encoding import EncodedSample
from fitune.fuse.adapter_layers import fused_lora_layer
from fitune.fuse.model import FusedModel, prepare
from fitune.kernels import native
from fitune.models.graph import head_name

BACKEND = "native" if native.status().available else "reference"
VOCABULARY = 320
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 257,
    "bos_token_id": None,
    "eos_token_id": 256,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
}
# Each brings something of its own: biases, an added 1 in the norm and GELU, a window, norms of queries and keys, bent
# scores and logits (which only transformers' plain attention has), scaled logits.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "gemma": {"head_dim": 16, "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True},
    "mistral": {"sliding_window": 7},
    "qwen3": {"head_dim": 24},
    "gemma2": {
        "head_dim": 16,
        "query_pre_attn_scalar": 4,
        "attn_logit_softcapping": 3.0,
        "sliding_window": 7,
        "final_logit_softcapping": 4.0,
        "tie_word_embeddings": True,
        "attn_implementation": "eager",
    },
    "granite": {"logits_scaling": 0.5, "attention_multiplier": 0.4, "residual_multiplier": 0.7},
}
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def config_of(family: str, **settings: Any) -> transformers.PretrainedConfig:
    default = transformers.CONFIG_MAPPING[family]()
    shape = {name: value for name, value in SHAPE.items() if hasattr(default, name)}
    return transformers.AutoConfig.for_model(family, **{**shape, **FAMILIES.get(family, {}), **settings})


def model_of(family: str, dtype: torch.dtype = torch.float32, **settings: Any) -> transformers.PreTrainedModel:
    """Random weights, the same every time; norms and biases too, which transformers starts at 1 and 0."""
    torch.manual_seed(0)
    config = copy.deepcopy(config_of(family, **settings))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype)


def gemma3(tied: bool = True) -> transformers.PreTrainedModel:
    """A multimodal model: a text decoder beside a vision tower."""
    torch.manual_seed(0)
    text = {**SHAPE, "head_dim": 16, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = transformers.AutoConfig.for_model(
        "gemma3", text_config=text | {"tie_word_embeddings": tied}, vision_config=vision, mm_tokens_per_image=4,
        image_token_index=300, boi_token_index=301, eoi_token_index=302, tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: place for place, letter in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|im_end|>", "<pad>", "<|im_start|>"])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<|im_end|>", pad_token="<pad>", chat_template=CHATML
    )


def write_model(folder: Path, family: str = "llama", dtype: torch.dtype = torch.bfloat16, **settings: Any) -> Path:
    model_of(family, dtype, **settings).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def write_questions(path: Path, count: int = 24, first: int = 0) -> Path:
    """Conversations that share a system message, of unequal lengths."""
    lines = []
    for number in range(first, first + count):
        lines.append(
            {
                "messages": [
                    {"role": "system", "content": "Answer with the number that comes next, nothing else."},
                    {"role": "user", "content": f"After {number}" + "?" * (number % 7)},
                    {"role": "assistant", "content": f"{number + 1}" + "!" * (number % 5)},
                ]
            }
        )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def adapted(
    graph: transformers.PreTrainedModel, dtype: torch.dtype = torch.float32, fused: bool = True, **settings: Any
) -> tuple[FusedModel | None, Any]:
    """LoRA on every linear layer, B random so that gradients of A are not zero; fused, or PEFT's own."""
    arguments = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": "all-linear", "rslora": False, **settings}
    peft = inject(graph, head_name(graph), seed=1, base_name="tiny",
                  layer=fused_lora_layer if fused else None, **arguments)  # fmt: skip
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    graph.train()
    return (prepare(graph, peft, dtype, BACKEND) if fused else None), peft


def lora_gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """By the names that PEFT gives; and forgets them."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[name[name.index("layers") :]] = parameter.grad.detach().clone()
            parameter.grad = None
    return found


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-12))


def random_samples(lengths: list[int], prompt: int = 3, common: int = 0, seed: int = 0) -> list[EncodedSample]:
    """Samples of so many tokens, the first `common` of them the same, the first `prompt` of the rest untrained."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randint(256, (common,), generator=generator).tolist()
    samples = []
    for length in lengths:
        own = torch.randint(256, (length - common,), generator=generator).tolist()
        trained = [place >= common + prompt for place in range(length)]
        samples.append(EncodedSample(tuple(shared + own), tuple(trained)))
    return samples
