"""Baichuan folders against their forward pass in plain torch, llama.cpp, and sentencepiece itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentencepiece import SentencePieceProcessor
from tiny_originals import (
    BAICHUAN,
    ROLE_TOKENS,
    baichuan_logits,
    draw_baichuan,
    llama_cpp_logits,
    train_vocabulary,
    write_folder,
    write_gguf,
)
from torch import Tensor

from fitune.data.chat_template import ChatTemplate
from fitune.data.conversation import Message, Sample
from fitune.data.encoding import encode, encode_prompt
from fitune.errors import InputError
from fitune.models.baichuan import BaichuanSource, normalised_rows
from fitune.models.build import build_dense
from fitune.models.find import find_model

TOKENS = torch.randint(0, 1088, (40,), generator=torch.Generator().manual_seed(1)).tolist()
FIRST = {**BAICHUAN, "architectures": ["BaiChuanForCausalLM"]}
TALK = (
    Message("system", "You are a helpful assistant."),
    Message("user", "你好, 12345  people"),
    Message("assistant", " Hello!\n    你好!"),
    Message("user", "and <reserved_106> now?"),
    Message("assistant", "42"),
)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like Baichuan 2's: no blank before a text, reserved symbols and runs of blanks as pieces of their own."""
    blanks = ["\u2581" * count for count in range(2, 9)]
    return train_vocabulary(
        tmp_path_factory.mktemp("vocabulary"), symbols=[*ROLE_TOKENS, *blanks], add_dummy_prefix=False
    )


@torch.no_grad()
def logits_of(model: torch.nn.Module, tokens: list[int]) -> Tensor:
    return model(input_ids=torch.tensor([tokens])).logits[0].float()


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(("config", "pickled"), [(BAICHUAN, False), (BAICHUAN, True), (FIRST, False)])
def test_logits_equal_the_original_forward_pass(
    tmp_path: Path, vocabulary: Path, config: dict[str, Any], pickled: bool
) -> None:
    folder = write_folder(tmp_path / "model", config, draw_baichuan(config), vocabulary, pickled)
    source = find_model(str(folder))
    assert isinstance(source, BaichuanSource)
    assert source.config.model_type == "llama"
    assert ("divided by their lengths" in str(source.note)) == (config is BAICHUAN)
    model = build_dense(source, torch.float32, trainable=False)
    expected = baichuan_logits(config, draw_baichuan(config), TOKENS)
    assert distance(logits_of(model, TOKENS), expected) < 1e-5


def swap_keys_and_values(state: dict[str, Tensor]) -> None:
    for name in [name for name in state if ".k_proj." in name]:
        other = name.replace("k_proj", "v_proj")
        state[name], state[other] = state[other], state[name]


def swap_gate_and_up(state: dict[str, Tensor]) -> None:
    for name in [name for name in state if "gate_proj" in name]:
        other = name.replace("gate_proj", "up_proj")
        state[name], state[other] = state[other], state[name]


def rotate_pairs(state: dict[str, Tensor]) -> None:
    """Rows in another order, as a model needs them that turns pairs and not halves."""
    for name in [name for name in state if ".q_proj." in name or ".k_proj." in name]:
        heads = state[name].unflatten(0, (-1, 2, 8))
        state[name] = heads.transpose(1, 2).flatten(0, 2)


def leave_the_head(state: dict[str, Tensor]) -> None:
    state["lm_head.weight"] = draw_baichuan(BAICHUAN)["lm_head.weight"]


MUTATIONS: list[Callable[[dict[str, Tensor]], None]] = [
    swap_keys_and_values,
    swap_gate_and_up,
    rotate_pairs,
    leave_the_head,
]


@pytest.mark.parametrize("mutate", MUTATIONS)
def test_a_wrong_conversion_would_be_noticed(
    tmp_path: Path, vocabulary: Path, mutate: Callable[[dict[str, Tensor]], None]
) -> None:
    folder = write_folder(tmp_path / "model", BAICHUAN, draw_baichuan(BAICHUAN), vocabulary)
    model = build_dense(BaichuanSource(folder), torch.float32, trainable=False)
    state = dict(model.state_dict())
    mutate(state)
    model.load_state_dict(state)
    assert distance(logits_of(model, TOKENS), baichuan_logits(BAICHUAN, draw_baichuan(BAICHUAN), TOKENS)) > 1e-2


def write_original_gguf(path: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    """As llama.cpp's converter lays it out, rows of queries and keys for its rotary; the head normalised."""
    heads, width = config["num_attention_heads"], config["hidden_size"]

    def permuted(rows: Tensor) -> np.ndarray:
        return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(rows.shape).numpy()

    head = tensors["lm_head.weight"].double().numpy()
    placed = {
        "token_embd.weight": tensors["model.embed_tokens.weight"].numpy(),
        "output_norm.weight": tensors["model.norm.weight"].numpy(),
        "output.weight": head / np.sqrt((head**2).sum(1, keepdims=True)),
    }
    for layer in range(config["num_hidden_layers"]):
        at, to = f"model.layers.{layer}", f"blk.{layer}"
        packed = tensors[f"{at}.self_attn.W_pack.weight"]
        placed[f"{to}.attn_q.weight"] = permuted(packed[:width])
        placed[f"{to}.attn_k.weight"] = permuted(packed[width : 2 * width])
        placed[f"{to}.attn_v.weight"] = packed[2 * width :].numpy()
        for name, other in (
            ("self_attn.o_proj", "attn_output"),
            ("mlp.gate_proj", "ffn_gate"),
            ("mlp.up_proj", "ffn_up"),
            ("mlp.down_proj", "ffn_down"),
            ("input_layernorm", "attn_norm"),
            ("post_attention_layernorm", "ffn_norm"),
        ):
            placed[f"{to}.{other}.weight"] = tensors[f"{at}.{name}.weight"].numpy()
    settings = {
        "tensor_data_layout": "Meta AI original pth",
        "context_length": config["max_position_embeddings"],
        "embedding_length": width,
        "feed_forward_length": config["intermediate_size"],
        "block_count": config["num_hidden_layers"],
        "head_count": heads,
        "head_count_kv": heads,
        "layer_norm_rms_eps": config["rms_norm_eps"],
        "rope_dimension_count": width // heads,
    }
    return write_gguf(path, "baichuan", settings, placed)


@pytest.mark.slow
def test_logits_equal_llama_cpps(tmp_path: Path, vocabulary: Path) -> None:
    pytest.importorskip("llama_cpp")
    # llama.cpp tells the model with rotary positions from the one with ALiBi by its number of layers.
    config = {**BAICHUAN, "num_hidden_layers": 32}
    tensors = draw_baichuan(config)
    folder = write_folder(tmp_path / "model", config, tensors, vocabulary)
    model = build_dense(BaichuanSource(folder), torch.float32, trainable=False)
    expected = llama_cpp_logits(write_original_gguf(tmp_path / "tiny.gguf", config, tensors), TOKENS)
    assert distance(logits_of(model, TOKENS), expected) < 1e-3
    for mutate in MUTATIONS[:3]:
        state = {name: value.clone() for name, value in model.state_dict().items()}
        mutate(state)
        mutated = build_dense(BaichuanSource(folder), torch.float32, trainable=False)
        mutated.load_state_dict(state)
        assert distance(logits_of(mutated, TOKENS), expected) > 1e-2, mutate.__name__
    model.lm_head.weight.data = tensors["lm_head.weight"]
    assert distance(logits_of(model, TOKENS), expected) > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_normalised_in_float32(dtype: torch.dtype) -> None:
    weight = torch.randn(5000, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[7] = 0
    found = normalised_rows(weight)
    assert found.dtype == dtype
    assert torch.equal(found, torch.nn.functional.normalize(weight.float()).to(dtype))


def original_ids(vocabulary: Path, messages: tuple[Message, ...]) -> list[int]:
    """As Baichuan2's generation_utils.py builds a prompt, and `</s>` after each answer."""
    library = SentencePieceProcessor(model_file=str(vocabulary))
    ids = {"user": library.piece_to_id("<reserved_106>"), "assistant": library.piece_to_id("<reserved_107>")}
    found: list[int] = []
    for message in messages:
        found += [ids[message.role]] if message.role in ids else []
        found += library.encode(message.content)
        found += [2] if message.role == "assistant" else []
    return found


def test_conversations_are_encoded_as_the_original_does(tmp_path: Path, vocabulary: Path) -> None:
    folder = write_folder(tmp_path / "model", BAICHUAN, draw_baichuan(BAICHUAN), vocabulary)
    (folder / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False, "add_eos_token": False}))
    library = SentencePieceProcessor(model_file=str(vocabulary))
    user, assistant = (library.piece_to_id(token) for token in ROLE_TOKENS)
    generation = {"eos_token_id": 2, "user_token_id": user, "assistant_token_id": assistant}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    source = BaichuanSource(folder)
    tokenizer = source.tokenizer()
    talk = TALK[:3]
    encoded = encode(Sample(messages=talk), tokenizer)
    assert list(encoded.tokens) == original_ids(vocabulary, talk)
    assert encode_prompt(talk[:2], tokenizer) == [*original_ids(vocabulary, talk[:2]), assistant]
    answer = len(library.encode(talk[2].content)) + 1
    assert list(encoded.trained) == [False] * (len(encoded.tokens) - answer) + [True] * answer
    assert encoded.tokens[-1] == 2
    assert source.generation_eos_ids() == [2]
    both = encode(Sample(messages=TALK), tokenizer)
    assert both.control_tokens_in_text == 1
    assert both.tokens.count(user) == 2
    assert both.without_end_token == 0
    assert ChatTemplate(tokenizer).end_of_turn_id() == 2


def test_the_begin_token_is_added_as_the_settings_say(tmp_path: Path, vocabulary: Path) -> None:
    folder = write_folder(tmp_path / "model", BAICHUAN, draw_baichuan(BAICHUAN), vocabulary)
    plain = SentencePieceProcessor(model_file=str(vocabulary)).encode("Hello 你好")
    for settings, expected in (
        ({}, [1, *plain]),
        ({"add_bos_token": False}, plain),
        ({"add_bos_token": False, "add_eos_token": True}, [*plain, 2]),
    ):
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        assert BaichuanSource(folder).tokenizer()("Hello 你好")["input_ids"] == expected


def test_the_first_baichuan_has_no_chat_template(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", FIRST, draw_baichuan(FIRST), train_vocabulary(tmp_path / "vocabulary"))
    assert BaichuanSource(folder).tokenizer().chat_template is None


def test_roles_with_other_ids_are_refused(tmp_path: Path, vocabulary: Path) -> None:
    folder = write_folder(tmp_path / "model", BAICHUAN, draw_baichuan(BAICHUAN), vocabulary)
    (folder / "generation_config.json").write_text(json.dumps({"user_token_id": 5}))
    with pytest.raises(InputError, match="user_token_id is 5"):
        BaichuanSource(folder).tokenizer()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"max_position_embeddings": ...}, "13B Baichuan.*ALiBi"),
        ({"hidden_size": 5120, "num_hidden_layers": 40}, "ALiBi"),
        ({"architectures": None}, "architectures is None"),
        ({"vocab_size": 64000}, "correct one"),
        ({"hidden_act": "gelu", "tie_word_embeddings": True}, "2 problems"),
        ({"rope_scaling": {"type": "linear", "factor": 4}}, "rope_scaling = .* is not known"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = .* is not known"),
        ({"hidden_size": 32}, "W_pack.weight has shape"),
        ({"num_attention_heads": 8}, "other rotary frequencies"),
    ],
)
def test_what_llama_cannot_do_is_refused(
    tmp_path: Path, vocabulary: Path, changed: dict[str, Any], words: str
) -> None:
    config = {name: value for name, value in {**BAICHUAN, **changed}.items() if value is not ...}
    folder = write_folder(tmp_path / "model", config, draw_baichuan(BAICHUAN), vocabulary)
    with pytest.raises(InputError, match=words):
        BaichuanSource(folder)


def test_missing_and_foreign_tensors_are_named_when_the_model_is_built(tmp_path: Path, vocabulary: Path) -> None:
    tensors = draw_baichuan(BAICHUAN)
    tensors["model.extra.weight"] = tensors.pop("model.norm.weight")
    folder = write_folder(tmp_path / "model", BAICHUAN, tensors, vocabulary)
    with pytest.raises(InputError, match=r"model\.norm\.weight is missing") as caught:
        build_dense(BaichuanSource(folder), torch.float32, trainable=False)
    assert "model.extra.weight" in str(caught.value)
