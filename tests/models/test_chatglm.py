"""ChatGLM3 and old GLM-4 folders against their forward pass in plain torch, llama.cpp, and sentencepiece itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sentencepiece import SentencePieceProcessor
from tiny_originals import (
    CHATGLM,
    chatglm_logits,
    draw_chatglm,
    llama_cpp_logits,
    train_vocabulary,
    write_folder,
    write_gguf,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from fitune.data.chat_template import ChatTemplate
from fitune.data.conversation import Message, Sample
from fitune.data.encoding import encode, encode_prompt
from fitune.errors import InputError
from fitune.models.build import build_dense, build_quantised
from fitune.models.chatglm import SPECIAL_TOKENS, ChatGLMSource
from fitune.models.find import find_model
from fitune.quant.linear import QuantisedLinear

TOKENS = torch.randint(0, 1088, (40,), generator=torch.Generator().manual_seed(1)).tolist()
TALK = [
    Message("system", "You are a helpful assistant."),
    Message("user", "你好, people of sophisticated 12345"),
    Message("assistant", "Hello!\n  你好!"),
    Message("user", "  and now?\n"),
    Message("assistant", "sop eop [gMASK] 42"),
]
# What THUDM published with ChatGLM3-6B: no token after the last answer.
PUBLISHED_TEMPLATE = (
    "{% for m in messages %}{% if loop.first %}[gMASK]sop{% endif %}<|{{ m['role'] }}|>\n {{ m['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_vocabulary(tmp_path_factory.mktemp("vocabulary"))


def folder_of(path: Path, vocabulary: Path, pickled: bool = False, **changed: Any) -> tuple[Path, dict[str, Any]]:
    config = {**CHATGLM, **changed}
    return write_folder(path, config, draw_chatglm(config), vocabulary, pickled), config


@torch.no_grad()
def logits_of(model: torch.nn.Module, tokens: list[int]) -> Tensor:
    return model(input_ids=torch.tensor([tokens])).logits[0].float()


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"rope_ratio": 50, "seq_length": 32768},
        {"add_qkv_bias": False, "multi_query_group_num": 1},
        {"layernorm_epsilon": 1.5625e-07, "rope_ratio": 500, "eos_token_id": [7, 8, 9], "vocab_size": 1088},
    ],
    ids=["chatglm3", "32k", "one group, no bias", "glm-4"],
)
def test_logits_equal_the_original_forward_pass(tmp_path: Path, vocabulary: Path, changed: dict[str, Any]) -> None:
    folder, config = folder_of(tmp_path / "model", vocabulary, **changed)
    source = find_model(str(folder))
    assert isinstance(source, ChatGLMSource)
    assert source.config.model_type == "glm"
    model = build_dense(source, torch.float32, trainable=False)
    expected = chatglm_logits(config, draw_chatglm(config), TOKENS)
    assert distance(logits_of(model, TOKENS), expected) < 1e-5


def swap_keys_and_values(state: dict[str, Tensor]) -> None:
    for name in [name for name in state if ".k_proj." in name]:
        other = name.replace("k_proj", "v_proj")
        state[name], state[other] = state[other], state[name]


def swap_gate_and_up(state: dict[str, Tensor]) -> None:
    for name in [name for name in state if "gate_up_proj" in name]:
        state[name] = torch.cat(state[name].chunk(2)[::-1])


def rotate_halves(state: dict[str, Tensor]) -> None:
    """Rows in another order, as a model needs them that turns halves and not pairs."""
    for name in [name for name in state if ".q_proj." in name or ".k_proj." in name]:
        heads = state[name].unflatten(0, (-1, 16))
        turned = heads[:, :8].unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2)
        state[name] = torch.cat([turned, heads[:, 8:]], 1).flatten(0, 1)


def drop_bias(state: dict[str, Tensor]) -> None:
    state |= {name: torch.zeros_like(value) for name, value in state.items() if name.endswith("bias")}


MUTATIONS: list[Callable[[dict[str, Tensor]], None]] = [
    swap_keys_and_values,
    swap_gate_and_up,
    rotate_halves,
    drop_bias,
]


@pytest.mark.parametrize("mutate", MUTATIONS)
def test_a_wrong_conversion_would_be_noticed(
    tmp_path: Path, vocabulary: Path, mutate: Callable[[dict[str, Tensor]], None]
) -> None:
    folder, config = folder_of(tmp_path / "model", vocabulary)
    model = build_dense(ChatGLMSource(folder), torch.float32, trainable=False)
    state = dict(model.state_dict())
    mutate(state)
    model.load_state_dict(state)
    assert distance(logits_of(model, TOKENS), chatglm_logits(config, draw_chatglm(config), TOKENS)) > 1e-2


def write_original_gguf(path: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    """As llama.cpp's converter lays it out: the original tensors whole, under other names."""
    names = {
        "transformer.embedding.word_embeddings.weight": "token_embd.weight",
        "transformer.encoder.final_layernorm.weight": "output_norm.weight",
        "transformer.output_layer.weight": "output.weight",
    }
    for layer in range(config["num_layers"]):
        at = f"transformer.encoder.layers.{layer}"
        names |= {
            f"{at}.input_layernorm.weight": f"blk.{layer}.attn_norm.weight",
            f"{at}.self_attention.query_key_value.weight": f"blk.{layer}.attn_qkv.weight",
            f"{at}.self_attention.query_key_value.bias": f"blk.{layer}.attn_qkv.bias",
            f"{at}.self_attention.dense.weight": f"blk.{layer}.attn_output.weight",
            f"{at}.post_attention_layernorm.weight": f"blk.{layer}.ffn_norm.weight",
            f"{at}.mlp.dense_h_to_4h.weight": f"blk.{layer}.ffn_up.weight",
            f"{at}.mlp.dense_4h_to_h.weight": f"blk.{layer}.ffn_down.weight",
        }
    settings = {
        "context_length": config["seq_length"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["ffn_hidden_size"],
        "block_count": config["num_layers"],
        "head_count": config["num_attention_heads"],
        "head_count_kv": config["multi_query_group_num"],
        "layer_norm_rms_eps": config["layernorm_epsilon"],
        "rope_dimension_count": config["kv_channels"] // 2,
        "rope_freq_base": 10000.0 * config.get("rope_ratio", 1),
        "add_bos_token": False,
    }
    renamed = {names[name]: value.numpy() for name, value in tensors.items() if name in names}
    return write_gguf(path, "chatglm", settings, renamed)


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [1, 50])
def test_logits_equal_llama_cpps(tmp_path: Path, vocabulary: Path, ratio: int) -> None:
    pytest.importorskip("llama_cpp")
    folder, config = folder_of(tmp_path / "model", vocabulary, rope_ratio=ratio)
    model = build_dense(ChatGLMSource(folder), torch.float32, trainable=False)
    path = write_original_gguf(tmp_path / "tiny.gguf", config, draw_chatglm(config))
    expected = llama_cpp_logits(path, TOKENS)
    assert distance(logits_of(model, TOKENS), expected) < 1e-3
    for mutate in MUTATIONS:
        state = {name: value.clone() for name, value in model.state_dict().items()}
        mutate(state)
        mutated = build_dense(ChatGLMSource(folder), torch.float32, trainable=False)
        mutated.load_state_dict(state)
        assert distance(logits_of(mutated, TOKENS), expected) > 1e-2, mutate.__name__


def test_tensors_are_views_of_the_original_in_its_dtype(tmp_path: Path, vocabulary: Path) -> None:
    config = dict(CHATGLM)
    tensors = {name: value.half() for name, value in draw_chatglm(config).items()}
    source = ChatGLMSource(write_folder(tmp_path / "model", config, tensors, vocabulary))
    packed = tensors["transformer.encoder.layers.1.self_attention.query_key_value.weight"]
    for part, rows in (("q", slice(0, 64)), ("k", slice(64, 96)), ("v", slice(96, 128))):
        name = f"model.layers.1.self_attn.{part}_proj.weight"
        assert torch.equal(source.read(name), packed[rows])
        assert (source.shape(name), source.dtype(name)) == (tuple(packed[rows].shape), torch.float16)
    assert source.config.dtype == torch.float16
    assert sum(source.read(name).numel() for name in source.tensor_names()) == sum(
        value.numel() for name, value in tensors.items() if "inv_freq" not in name
    )


def test_the_published_configuration_is_understood(tmp_path: Path, vocabulary: Path, shared_data: Path) -> None:
    published = json.loads((shared_data / "model_configs" / "chatglm3-6b" / "config.json").read_text())
    sizes = (
        "padded_vocab_size",
        "hidden_size",
        "ffn_hidden_size",
        "num_layers",
        "kv_channels",
        "num_attention_heads",
    )
    config = {**published, **{name: CHATGLM[name] for name in sizes}}
    folder = write_folder(tmp_path / "model", config, draw_chatglm(config), vocabulary)
    found = ChatGLMSource(folder).config
    assert (found.num_key_value_heads, found.rms_norm_eps, found.attention_bias) == (2, 1e-5, True)
    assert found.rope_parameters["rope_theta"] == 10000.0
    assert found.rope_parameters["partial_rotary_factor"] == 0.5


def test_quantised_and_merged_forms(tmp_path: Path, vocabulary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path / "cache"))
    folder, config = folder_of(tmp_path / "model", vocabulary, pickled=True)
    source = find_model(str(folder))
    assert "pickled" in str(source.note)
    quantised = build_quantised(source, torch.float32, "reference")
    found = [
        (f"{name}.weight", each) for name, each in quantised.named_modules() if isinstance(each, QuantisedLinear)
    ]
    assert len(found) == 12
    for name, linear in found:
        original = source.read(name)
        decoded = linear.nf4().dense(torch.float32, "reference")
        # Weights drawn from a normal distribution lose about a tenth in NF4.
        assert 0.05 < (decoded - original).norm() / original.norm() < 0.15, name
    expected = chatglm_logits(config, draw_chatglm(config), TOKENS)
    merged = tmp_path / "merged"
    source.write_companions(merged)
    weights = {name: source.read(name).contiguous() for name in source.tensor_names()}
    from safetensors.torch import save_file

    save_file(weights, merged / "model.safetensors", metadata={"format": "pt"})
    again = AutoModelForCausalLM.from_pretrained(merged, local_files_only=True, dtype=torch.float32).eval()
    assert distance(logits_of(again, TOKENS), expected) < 1e-5
    assert type(again).__name__ == "GlmForCausalLM"
    tokenizer = AutoTokenizer.from_pretrained(merged, local_files_only=True)
    text = "你好, people! [gMASK]<sop><|user|>\n 1234"
    assert tokenizer(text)["input_ids"] == source.tokenizer()(text)["input_ids"]
    assert tokenizer.chat_template == source.tokenizer().chat_template


def original_ids(vocabulary: Path, messages: list[Message], is_question: bool) -> list[int]:
    """As ChatGLM3's tokenization_chatglm.py builds a conversation: each text is encoded by itself."""
    library = SentencePieceProcessor(model_file=str(vocabulary))
    first = library.get_piece_size()
    names = [
        "[MASK]",
        "[gMASK]",
        "[sMASK]",
        "sop",
        "eop",
        "<|system|>",
        "<|user|>",
        "<|assistant|>",
        "<|observation|>",
    ]
    ids = {name: first + place for place, name in enumerate(names)}
    found = [ids["[gMASK]"], ids["sop"]]
    for message in messages:
        found += [ids[f"<|{message.role}|>"], *library.encode("\n"), *library.encode(message.content)]
    return [*found, ids["<|assistant|>"] if is_question else ids["<|user|>"]]


def test_conversations_are_encoded_as_the_original_does(tmp_path: Path, vocabulary: Path) -> None:
    folder, _ = folder_of(tmp_path / "model", vocabulary)
    source = ChatGLMSource(folder)
    tokenizer = source.tokenizer()
    first = SentencePieceProcessor(model_file=str(vocabulary)).get_piece_size()
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(first, first + 9))
    plain = TALK[:4]
    assert encode_prompt(plain, tokenizer) == original_ids(vocabulary, plain, is_question=True)
    encoded = encode(Sample(messages=tuple(TALK)), tokenizer)
    assert list(encoded.tokens) == original_ids(vocabulary, TALK, is_question=False)
    user = tokenizer.convert_tokens_to_ids("<|user|>")
    assistant = tokenizer.convert_tokens_to_ids("<|assistant|>")
    # Trained: from after <|assistant|> up to and including the <|user|> that stops the model, twice.
    expected, is_trained = [], False
    for token in encoded.tokens:
        expected.append(is_trained)
        is_trained = token == assistant or (is_trained and token != user)
    assert list(encoded.trained) == expected
    assert encoded.without_end_token == 0
    assert ChatTemplate(tokenizer).end_of_turn_id() == user
    assert encoded.trained[-1]
    assert source.generation_eos_ids() == [2, user, tokenizer.convert_tokens_to_ids("<|observation|>")]


def test_plain_text_begins_as_the_original_does_and_words_stay_whole(tmp_path: Path, vocabulary: Path) -> None:
    folder, _ = folder_of(tmp_path / "model", vocabulary)
    tokenizer = ChatGLMSource(folder).tokenizer()
    library = SentencePieceProcessor(model_file=str(vocabulary))
    first = library.get_piece_size()
    for text in ("people sop eop sophisticated", "你好"):
        assert tokenizer(text)["input_ids"] == [first + 1, first + 3, *library.encode(text)]
        assert tokenizer.decode(library.encode(text)) == text


def test_other_roles_and_orders_are_refused_by_the_template(tmp_path: Path, vocabulary: Path) -> None:
    folder, _ = folder_of(tmp_path / "model", vocabulary)
    tokenizer = ChatGLMSource(folder).tokenizer()
    with pytest.raises(InputError, match="not tool"):
        encode(Sample(messages=(Message("user", "a"), Message("tool", "b"))), tokenizer)
    with pytest.raises(InputError, match="followed by the user"):
        encode(
            Sample(messages=(Message("user", "a"), Message("assistant", "b"), Message("assistant", "c"))), tokenizer
        )


def test_a_template_without_an_end_is_replaced_and_said_so(tmp_path: Path, vocabulary: Path) -> None:
    folder, _ = folder_of(tmp_path / "model", vocabulary)
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps({"chat_template": PUBLISHED_TEMPLATE}))
    replaced = ChatGLMSource(folder)
    assert "does not end the last answer" in str(replaced.note)
    encoded = encode(Sample(messages=tuple(TALK)), replaced.tokenizer())
    assert list(encoded.tokens) == original_ids(vocabulary, TALK, is_question=False)
    own = PUBLISHED_TEMPLATE.replace(
        "{% endfor %}", "{% endfor %}{% if not add_generation_prompt %}<|user|>{% endif %}"
    )
    settings.write_text(json.dumps({"chat_template": own}))
    kept = ChatGLMSource(folder)
    assert "does not end" not in str(kept.note)
    assert kept.tokenizer().chat_template == own.replace("]sop", "]<sop>")
    assert encode(Sample(messages=tuple(TALK)), kept.tokenizer()).tokens == encoded.tokens


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm is True"),
        ({"multi_query_attention": False}, "multi_query_attention is False"),
        ({"rmsnorm": False, "add_bias_linear": True}, "2 problems"),
        ({"pre_seq_len": 128}, "pre_seq_len is 128"),
        ({"quantization_bit": 4}, "quantization_bit is 4"),
        ({"_name_or_path": "THUDM/chatglm2-6b-32k"}, "ChatGLM2-6B"),
        ({"position_encoding_2d": True}, "first ChatGLM-6B"),
        ({"vision_config": {}}, "GLM-4V"),
        ({"num_layers": None}, "num_layers is None"),
        ({"new_trick": "on"}, "new_trick = 'on' is not known"),
        ({"multi_query_group_num": 3}, "evenly"),
        ({"kv_channels": 8}, "shape"),
    ],
)
def test_what_glm_cannot_do_is_refused(tmp_path: Path, vocabulary: Path, changed: dict[str, Any], words: str) -> None:
    folder = write_folder(tmp_path / "model", {**CHATGLM, **changed}, draw_chatglm(CHATGLM), vocabulary)
    with pytest.raises(InputError, match=words):
        ChatGLMSource(folder)


def test_foreign_tensors_and_a_foreign_vocabulary_are_named(tmp_path: Path, vocabulary: Path) -> None:
    tensors = {**draw_chatglm(CHATGLM), "transformer.prefix_encoder.embedding.weight": torch.zeros(2, 2)}
    with pytest.raises(InputError, match=r"transformer\.prefix_encoder\.embedding\.weight is not part"):
        ChatGLMSource(write_folder(tmp_path / "more", CHATGLM, tensors, vocabulary))
    folder = write_folder(tmp_path / "tiktoken", {**CHATGLM, "eos_token_id": [1]}, draw_chatglm(CHATGLM), vocabulary)
    (folder / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    with pytest.raises(InputError, match="tokenizer"):
        ChatGLMSource(folder).tokenizer()
