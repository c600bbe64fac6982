"""ChatGLM3-6B, and GLM-4-9B in the layout it was first published in, as transformers' GLM.

Both call themselves `chatglm` and differ in numbers only. The layout is that of their modeling_chatglm.py
(https://huggingface.co/THUDM/chatglm3-6b, https://huggingface.co/THUDM/glm-4-9b-chat): queries, keys and values in
one matrix, in this order; gate and up projection in one matrix, gate first, which GLM keeps; rotary positions on
the first half of each head, in neighbouring pairs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import GlmConfig, PretrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fitune.errors import InputError
from fitune.models.converted_folder import ConvertedFolder, Rows, missing_fields
from fitune.models.sentencepiece_tokenizer import SentencePieceVocabulary
from fitune.models.source import Kind
from fitune.models.tiktoken_tokenizer import TiktokenVocabulary

# These follow the sentencepiece vocabulary, in this order (SPTokenizer in ChatGLM3's tokenization_chatglm.py).
# Its "sop" and "eop" are written in angle brackets here, as GLM-4 does: ids are the same, but a tokenizer that
# finds special tokens in text would otherwise find them in "people".
SPECIAL_TOKENS = (
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "<sop>",
    "<eop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
)
# GLM-4's follow its tiktoken vocabulary (tokenizer_config.json, `added_tokens_decoder`, names them too).
SPECIAL_TOKENS_4 = ("<|endoftext|>", *SPECIAL_TOKENS, "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>",
                    "<|end_of_video|>")  # fmt: skip
# How GLM-4 cuts text before bytes are joined (`pat_str` in its tokenization_chatglm.py).
SPLIT_4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# https://github.com/THUDM/ChatGLM3/blob/main/PROMPT.md, where a role's line ends before the text. ChatGLM3 encodes
# the text by itself, which sets a blank before it. An answer is closed by the user's token, also the last one.
_TEMPLATE = (
    "{{ '[gMASK]<sop>' }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('the roles system, user and assistant are known, not ' + message['role']) }}{% endif %}"
    "{% if message['role'] != 'user' and loop.previtem is defined and loop.previtem['role'] == 'assistant' %}"
    "{{ raise_exception('an answer must be followed by the user: its token is what ends the answer') }}{% endif %}"
    "{{ '<|' + message['role'] + '|>\n' + BLANK + message['content'] }}"
    "{% if loop.last and message['role'] == 'assistant' and not add_generation_prompt %}{{ '<|user|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CHAT_TEMPLATE = _TEMPLATE.replace("BLANK", "' '")
CHAT_TEMPLATE_4 = _TEMPLATE.replace("BLANK + ", "")

_ROTARY_BASE = 10000.0
_ROTARY_SHARE = 0.5
# What a field must be where GLM knows only one way; None stands for a field that may be absent.
_FIXED = {
    "add_bias_linear": (False, None),
    "apply_residual_connection_post_layernorm": (False, None),
    "multi_query_attention": (True,),
    "post_layer_norm": (True, None),
    "rmsnorm": (True, None),
    "tie_word_embeddings": (False, None),
    "hidden_dropout": (0, None),
    "pre_seq_len": (0, None),
    "prefix_projection": (False, None),
    "quantization_bit": (0, None),
}
_SIZES = (
    "padded_vocab_size",
    "hidden_size",
    "ffn_hidden_size",
    "num_layers",
    "num_attention_heads",
    "multi_query_group_num",
    "kv_channels",
    "layernorm_epsilon",
    "seq_length",
)
_NAMES = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "encoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "input_layernorm.weight": "input_layernorm.weight",
    "post_attention_layernorm.weight": "post_attention_layernorm.weight",
    "self_attention.dense.weight": "self_attn.o_proj.weight",
    "mlp.dense_h_to_4h.weight": "mlp.gate_up_proj.weight",
    "mlp.dense_4h_to_h.weight": "mlp.down_proj.weight",
}


class ChatGLMSource(ConvertedFolder):
    """A ChatGLM3 or GLM-4 folder with `model_type: chatglm`, as `GlmForCausalLM`.

    Raises InputError for ChatGLM-6B and ChatGLM2-6B (other models of the same name), for images, prefix tuning,
    quantised weights, and wherever the configuration asks for what GLM does not do.
    """

    known_fields = frozenset(
        {*_FIXED, *_SIZES, "add_qkv_bias", "apply_query_key_layer_scaling", "attention_dropout"}
        | {"attention_softmax_in_fp32", "bias_dropout_fusion", "fp32_residual_connection", "original_rope"}
        | {"rope_ratio", "num_hidden_layers", "vocab_size", "use_cache", "classifier_dropout", "interleaved_qkv"}
    )
    # The model ends its answer with the token that opens what comes after it (modeling_chatglm.py, `chat`).
    stop_tokens = ("</s>", "<|endoftext|>", "<|user|>", "<|observation|>")

    def __init__(self, folder: Path, reference: str | None = None, kind: Kind = "folder") -> None:
        # sentencepiece's format begins with the first field's tag, a line feed; tiktoken's is text.
        file = folder / "tokenizer.model"
        self._is_tiktoken = file.is_file() and not file.read_bytes().startswith(b"\n")
        self.documented_template = CHAT_TEMPLATE_4 if self._is_tiktoken else CHAT_TEMPLATE
        super().__init__(folder, reference, kind)
        self._add_note("converted from ChatGLM's layout to that of transformers' GLM")

    def _own_template(self) -> str | None:
        own = super()._own_template()
        return own.replace("[gMASK]sop", "[gMASK]<sop>") if own else None

    def _refusals(self, fields: Mapping[str, Any]) -> list[str]:
        if "inner_hidden_size" in fields or "position_encoding_2d" in fields:
            return ["this is the first ChatGLM-6B, another architecture; ChatGLM3-6B and GLM-4-9B are read"]
        if "vision_config" in fields:
            return ["this is GLM-4V, which sees images; the text models ChatGLM3-6B and GLM-4-9B are read"]
        if "chatglm2" in str(fields.get("_name_or_path", "")).lower():
            return ["this is ChatGLM2-6B, which knows no roles and scales positions in another way; use ChatGLM3-6B"]
        problems = missing_fields(fields, _SIZES)
        problems += [
            f"config.json: {name} is {fields.get(name)!r}; only {allowed[0]!r} is read"
            for name, allowed in _FIXED.items()
            if fields.get(name) not in allowed
        ]
        if fields.get("interleaved_qkv"):
            problems.append("config.json: interleaved_qkv is true; only false is read")
        if not problems and fields["num_attention_heads"] % fields["multi_query_group_num"]:
            problems.append(
                f"config.json: {fields['num_attention_heads']} heads cannot share "
                f"{fields['multi_query_group_num']} groups of keys and values evenly"
            )
        return problems

    def _converted_config(self, fields: Mapping[str, Any]) -> PretrainedConfig:
        ends = fields.get("eos_token_id")
        if not isinstance(ends, list):
            ends = self._stop_ids()
        config: PretrainedConfig = GlmConfig(
            architectures=["GlmForCausalLM"],
            vocab_size=fields["padded_vocab_size"],
            hidden_size=fields["hidden_size"],
            intermediate_size=fields["ffn_hidden_size"],
            num_hidden_layers=fields["num_layers"],
            num_attention_heads=fields["num_attention_heads"],
            num_key_value_heads=fields["multi_query_group_num"],
            head_dim=fields["kv_channels"],
            rms_norm_eps=fields["layernorm_epsilon"],
            max_position_embeddings=fields["seq_length"],
            attention_bias=bool(fields.get("add_qkv_bias", False)),
            attention_dropout=fields.get("attention_dropout", 0.0),
            rope_parameters={
                "rope_type": "default",
                "rope_theta": _ROTARY_BASE * fields.get("rope_ratio", 1.0),
                "partial_rotary_factor": _ROTARY_SHARE,
            },
            tie_word_embeddings=False,
            pad_token_id=fields.get("pad_token_id"),
            bos_token_id=None,
            eos_token_id=ends,
        )
        return config

    def _converted(self, name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, Rows]]:
        inner = name.removeprefix("transformer.")
        if inner == "rotary_pos_emb.inv_freq":
            return  # computed from the configuration
        if inner in _NAMES:
            yield _NAMES[inner], Rows(name)
            return
        found = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", inner)
        rest = found[2] if found else ""
        if found and rest in _LAYER_NAMES:
            yield f"model.layers.{found[1]}.{_LAYER_NAMES[rest]}", Rows(name)
        elif found and rest in ("self_attention.query_key_value.weight", "self_attention.query_key_value.bias"):
            config = self._config
            queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
            if shape[:1] != (queries + 2 * keys,):
                raise InputError(
                    f"tensor {name} has shape {shape}; {queries} rows of queries and twice {keys} of keys and values "
                    f"make {queries + 2 * keys}"
                )
            kind = rest.rpartition(".")[2]
            for part, start, stop in (
                ("q", 0, queries),
                ("k", queries, queries + keys),
                ("v", queries + keys, queries + 2 * keys),
            ):
                yield f"model.layers.{found[1]}.self_attn.{part}_proj.{kind}", Rows(name, start, stop)
        else:
            raise InputError(f"tensor {name} is not part of ChatGLM3 or GLM-4")

    @cached_property
    def _vocabulary(self) -> SentencePieceVocabulary:
        return SentencePieceVocabulary(self.folder / "tokenizer.model")

    @cached_property
    def _tiktoken(self) -> TiktokenVocabulary:
        return TiktokenVocabulary(self.folder / "tokenizer.model")

    def _special_ids(self) -> dict[str, int]:
        """Special tokens that follow the vocabulary -> ids."""
        if not self._is_tiktoken:
            first = len(self._vocabulary.pieces)
            return {token: first + place for place, token in enumerate(SPECIAL_TOKENS)}
        named = self._settings("tokenizer_config.json").get("added_tokens_decoder")
        if isinstance(named, dict):
            return {entry["content"]: int(number) for number, entry in named.items()}
        first = len(self._tiktoken.ranks)
        return {token: first + place for place, token in enumerate(SPECIAL_TOKENS_4)}

    def _stop_ids(self) -> list[int]:
        ids = self._special_ids()
        if not self._is_tiktoken:
            ids |= {piece: place for place, (piece, _, _) in enumerate(self._vocabulary.pieces) if piece == "</s>"}
        return [ids[token] for token in self.stop_tokens if token in ids]

    def _build_tokenizer(self) -> PreTrainedTokenizerBase:
        begin = ("[gMASK]", "<sop>")
        if self._is_tiktoken:
            tokenizer = self._tiktoken.tokenizer(SPLIT_4, self._special_ids(), begin)
            named = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
        else:
            tokenizer = self._vocabulary.tokenizer(SPECIAL_TOKENS, begin)
            named = {"eos_token": "</s>", "pad_token": "<unk>", "unk_token": "<unk>"}
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            clean_up_tokenization_spaces=False,
            model_max_length=self.config.max_position_embeddings,
            padding_side="left",
            chat_template=self._chat_template,
            **named,
        )
