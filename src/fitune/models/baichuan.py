"""Baichuan-7B and Baichuan2-7B as transformers' Llama.

The layout is that of their modeling_baichuan.py (https://huggingface.co/baichuan-inc/Baichuan2-7B-Chat): queries,
keys and values in one matrix, in this order; the rest is Llama's. Baichuan 2 divides each row of its output head by
the row's length whenever it runs (NormHead), which is done here once, when the head is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, PretrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fitune.errors import InputError
from fitune.models.converted_folder import ConvertedFolder, Rows, missing_fields
from fitune.models.sentencepiece_tokenizer import SentencePieceVocabulary
from fitune.models.source import Kind

# Baichuan 1 and 2 spell their class differently (config.json, `architectures`), and have these vocabularies.
_ARCHITECTURES = {"BaiChuanForCausalLM": 1, "BaichuanForCausalLM": 2}
_VOCABULARIES = {1: 64000, 2: 125696}
_ROTARY_BASE = 10000.0
# torch.nn.functional.normalize, which NormHead calls, divides by no less than this.
_LEAST_LENGTH = 1e-12
_ROWS_AT_ONCE = 4096

# https://huggingface.co/baichuan-inc/Baichuan2-7B-Chat, generation_utils.py: the system's text bare, the user's
# after token 195, the assistant's after token 196. There an answer of an earlier round is not closed; here each is,
# so that each teaches the model to stop.
ROLE_TOKENS = {"user": "<reserved_106>", "assistant": "<reserved_107>"}
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' and loop.first %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '<reserved_106>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '<reserved_107>' + message['content'] + '</s>' }}"
    "{% else %}{{ raise_exception('one system message at the beginning, user and assistant are known, not '"
    " + message['role'] + ' here') }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<reserved_107>' }}{% endif %}"
)

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "rms_norm_eps",
)


class BaichuanSource(ConvertedFolder):
    """A folder with `model_type: baichuan` and rotary positions, as `LlamaForCausalLM`.

    The head that is read is normalised; full fine-tuning then trains it as an ordinary one.

    Raises InputError for the 13B models, whose attention knows distances by a bias (ALiBi) that Llama does not
    have, and wherever the configuration asks for what Llama does not do.
    """

    known_fields = frozenset(
        {*_SIZES, "hidden_act", "initializer_range", "max_position_embeddings", "model_max_length", "use_cache"}
        | {"z_loss_weight", "gradient_checkpointing"}
    )
    stop_tokens = ("</s>",)
    documented_template = CHAT_TEMPLATE

    def __init__(self, folder: Path, reference: str | None = None, kind: Kind = "folder") -> None:
        super().__init__(folder, reference, kind)
        self._add_note("converted from Baichuan's layout to that of transformers' Llama")
        if self._has_normalised_head:
            self._add_note("the output head's rows are divided by their lengths, as Baichuan 2 does when it runs")

    def _refusals(self, fields: Mapping[str, Any]) -> list[str]:
        if "max_position_embeddings" not in fields or fields.get("hidden_size") == 5120:
            return [
                "this is a 13B Baichuan: it has no rotary positions (no max_position_embeddings) but ALiBi, a bias "
                "on distances, for which there is no way into Llama; use Baichuan2-7B"
            ]
        problems = missing_fields(fields, (*_SIZES, "max_position_embeddings"))
        for name, only in (("hidden_act", "silu"), ("tie_word_embeddings", False), ("z_loss_weight", 0)):
            if fields.get(name, only) != only:
                problems.append(f"config.json: {name} is {fields[name]!r}; only {only!r} is read")
        generation = _generation(fields)
        if generation is None:
            problems.append(
                f"config.json: architectures is {fields.get('architectures')!r}; BaiChuanForCausalLM (Baichuan 1) or "
                "BaichuanForCausalLM (Baichuan 2) is needed, for only the second normalises its output head"
            )
        elif fields.get("vocab_size") == _VOCABULARIES[3 - generation]:
            problems.append(
                f"config.json: architectures says Baichuan {generation}, vocab_size {fields['vocab_size']} says "
                f"Baichuan {3 - generation}; correct one: only Baichuan 2 normalises its output head"
            )
        if not problems and fields["hidden_size"] % fields["num_attention_heads"]:
            problems.append("config.json: hidden_size is no multiple of num_attention_heads")
        return problems

    def _converted_config(self, fields: Mapping[str, Any]) -> PretrainedConfig:
        self._has_normalised_head = _generation(fields) == 2
        config: PretrainedConfig = LlamaConfig(
            architectures=["LlamaForCausalLM"],
            **{name: fields[name] for name in (*_SIZES, "max_position_embeddings")},
            num_key_value_heads=fields["num_attention_heads"],
            initializer_range=fields.get("initializer_range", 0.02),
            hidden_act="silu",
            attention_bias=False,
            rope_parameters={"rope_type": "default", "rope_theta": _ROTARY_BASE},
            tie_word_embeddings=False,
            **{f"{role}_token_id": fields.get(f"{role}_token_id") for role in ("bos", "eos", "pad")},
        )
        return config

    def _converted(self, name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, Rows]]:
        config = self._config
        found = re.fullmatch(r"(model\.layers\.\d+\.self_attn)\.(W_pack\.weight|rotary_emb\.inv_freq)", name)
        if found is None:
            yield name, Rows(name)  # Llama's own names
        elif found[2] == "W_pack.weight":
            width = config.hidden_size
            if shape != (3 * width, width):
                raise InputError(f"tensor {name} has shape {shape}, the configuration wants {(3 * width, width)}")
            for place, part in enumerate("qkv"):
                yield f"{found[1]}.{part}_proj.weight", Rows(name, place * width, (place + 1) * width)
        else:
            self._check_rotary(name, config.hidden_size // config.num_attention_heads)

    def _check_rotary(self, name: str, head_dim: int) -> None:
        """The frequencies are computed, so those that are stored must be the same."""
        stored = self._files.read(name).float()
        computed = _ROTARY_BASE ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        if stored.shape != computed.shape or not torch.allclose(stored, computed, rtol=1e-2):
            raise InputError(f"tensor {name} holds other rotary frequencies than base {_ROTARY_BASE:.0f} gives")

    def read(self, name: str) -> torch.Tensor:
        value = super().read(name)
        return normalised_rows(value) if self._has_normalised_head and name == "lm_head.weight" else value

    def _build_tokenizer(self) -> PreTrainedTokenizerBase:
        vocabulary = SentencePieceVocabulary(self.folder / "tokenizer.model")
        settings = self._settings("tokenizer_config.json")
        pieces = [piece for piece, _, _ in vocabulary.pieces]
        roles = [token for token in ROLE_TOKENS.values() if token in pieces]
        self._check_roles(pieces)
        # Their class adds the first by itself and not the last, unless told otherwise (tokenization_baichuan.py).
        begin = ("<s>",) if settings.get("add_bos_token", True) else ()
        end = ("</s>",) if settings.get("add_eos_token", False) else ()
        return PreTrainedTokenizerFast(
            tokenizer_object=vocabulary.tokenizer(roles, begin, end),
            clean_up_tokenization_spaces=False,
            model_max_length=self.config.max_position_embeddings,
            bos_token="<s>",
            eos_token="</s>",
            unk_token="<unk>",
            pad_token="<unk>",
            chat_template=self._chat_template if len(roles) == len(ROLE_TOKENS) else self._own_template(),
        )

    def _check_roles(self, pieces: list[str]) -> None:
        """generation_config.json names the roles' tokens by id, the template by text: they must be the same."""
        found = self._settings("generation_config.json")
        problems = [
            f"generation_config.json: {role}_token_id is {found[f'{role}_token_id']}, which is not {token}"
            for role, token in ROLE_TOKENS.items()
            if f"{role}_token_id" in found and pieces[found[f"{role}_token_id"]] != token
        ]
        if problems:
            raise InputError(problems, where=self.folder)


def normalised_rows(weight: torch.Tensor) -> torch.Tensor:
    """[V, C] with every row divided by its length, computed in float32, in the dtype of `weight`."""
    result = torch.empty_like(weight)
    for start in range(0, weight.shape[0], _ROWS_AT_ONCE):
        rows = weight[start : start + _ROWS_AT_ONCE].float()
        result[start : start + _ROWS_AT_ONCE] = rows / rows.norm(dim=1, keepdim=True).clamp_min(_LEAST_LENGTH)
    return result


def _generation(fields: Mapping[str, Any]) -> int | None:
    """1 or 2, by the name of the class."""
    named = fields.get("architectures")
    found = {_ARCHITECTURES[name] for name in named if name in _ARCHITECTURES} if isinstance(named, list) else set()
    return found.pop() if len(found) == 1 else None
