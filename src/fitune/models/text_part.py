"""The text decoder of a multimodal checkpoint as a model source of its own; the other weights are carried along.

Building the whole model would hold towers that text never runs through. Here the graph is that of the text decoder
alone, from the `text_config` inside the configuration, and the checkpoint's names lose the prefix that the whole
model gives its decoder. A merged checkpoint takes the names back (`written_name`), and the rest as it is.
"""

from __future__ import annotations

import copy
import hashlib
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from fitune.errors import InputError
from fitune.models.config_file import EQUIVALENT, text_type
from fitune.models.source import ModelSource

if TYPE_CHECKING:
    from fitune.quant.nf4 import NF4Weight

# What checkpoints of multimodal models put before their decoder's names, and what stands there in a text model's.
_PREFIXES = {"language_model.": "", "model.language_model.": "model.", "model.text_model.": "model."}
_HEAD = "lm_head."


def text_part(source: ModelSource) -> ModelSource:
    """The source of the text decoder where `source` is multimodal and transformers knows that decoder; else itself.

    Raises InputError where no tensor of the checkpoint belongs to a text decoder.
    """
    return source if text_type(source.config) is None else TextPart(source)


class TextPart(ModelSource):
    """The text decoder inside `whole`: its configuration, its tensors without their prefix, all else from `whole`."""

    def __init__(self, whole: ModelSource) -> None:
        self.whole = whole
        self.reference = whole.reference
        self.kind = whole.kind
        self._written, self._carried = _split(whole.tensor_names())
        if not self._written:
            raise InputError(
                f"multimodal ({whole.config.model_type}), and none of its tensors is of a text decoder "
                f"(looked for {', '.join(_PREFIXES)}model.)",
                where=whole.reference,
            )
        said = (
            f"the text decoder of {whole.config.model_type}; {len(self._carried)} other tensors are left as they are"
        )
        self.note = said if whole.note is None else f"{said}; {whole.note}"

    @cached_property
    def config(self) -> PretrainedConfig:
        return _text_config(self.whole.config)

    def tensor_names(self) -> list[str]:
        return list(self._written)

    def carried_names(self) -> list[str]:
        return list(self._carried)

    def written_name(self, name: str) -> str:
        return self._written.get(name, name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.whole.shape(self.written_name(name))

    def dtype(self, name: str) -> torch.dtype:
        return self.whole.dtype(self.written_name(name))

    def read(self, name: str) -> torch.Tensor:
        return self.whole.read(self.written_name(name))

    def release(self) -> None:
        self.whole.release()

    def nf4(self, name: str) -> NF4Weight | None:
        return self.whole.nf4(self.written_name(name))

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.whole.tokenizer()

    def warnings(self) -> list[str]:
        return self.whole.warnings()

    def generation_config(self) -> GenerationConfig:
        return self.whole.generation_config()

    def files(self) -> list[Path]:
        return self.whole.files()

    def write_companions(self, folder: Path) -> None:
        self.whole.write_companions(folder)

    def fingerprint(self) -> str:
        return hashlib.sha256(f"text part of {self.whole.fingerprint()}".encode()).hexdigest()[:32]


def _split(names: list[str]) -> tuple[dict[str, str], list[str]]:
    """Text name -> name in the checkpoint, and the names of the rest."""
    prefixes = _PREFIXES
    if not any(name.startswith(tuple(prefixes)) for name in names):
        prefixes = {"model.": "model."}  # the decoder stands at the top, the other parts have names of their own
    written, carried = {}, []
    for name in names:
        prefix = next((each for each in prefixes if name.startswith(each)), None)
        if prefix is not None:
            written[prefixes[prefix] + name.removeprefix(prefix)] = name
        elif name.startswith(_HEAD):
            written[name] = name
        else:
            carried.append(name)
    return written, carried


def _text_config(whole: PretrainedConfig) -> PretrainedConfig:
    text: PretrainedConfig = copy.deepcopy(whole.text_config)
    if text.model_type in EQUIVALENT:
        fields = text.to_dict()
        rope = {key: value for key, value in fields.pop("rope_parameters").items() if not key.startswith("mrope")}
        text = AutoConfig.for_model(EQUIVALENT[fields.pop("model_type")], rope_parameters=rope, **fields)
    # Whether the head is tied is the whole model's to say: it owns the head.
    text.tie_word_embeddings = getattr(whole, "tie_word_embeddings", text.tie_word_embeddings)
    text.dtype = whole.dtype
    text.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING[type(text)].__name__]
    return text
