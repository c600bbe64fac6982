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
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from fitune.errors import InputError
from fitune.models.config_file import EQUIVALENT, text_type
from fitune.models.graph import build_graph
from fitune.models.source import ModelSource

if TYPE_CHECKING:
    from fitune.quant.nf4 import NF4Weight

# What checkpoints of multimodal models put before their decoder's names, and what stands there in a text model's.
_PREFIXES = {"language_model.": "", "model.language_model.": "model.", "model.text_model.": "model."}
_HEAD = "lm_head."
# The decoder in a text model.
_DECODER = "model"


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

    def outer_module(self, name: str) -> str:
        outer = self._outer_name
        return outer + name[len(_DECODER) :] if outer is not None and name.startswith(f"{_DECODER}.") else name

    def graph_module(self, name: str) -> str:
        outer = self._outer_name
        return _DECODER + name[len(outer) :] if outer is not None and name.startswith(f"{outer}.") else name

    @cached_property
    def _outer_name(self) -> str | None:
        """The decoder's name in the whole model; None where that is not to be had."""
        config = copy.deepcopy(self.whole.config)
        is_causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
        kind: Any = AutoModelForCausalLM if is_causal else AutoModelForImageTextToText
        try:
            with torch.device("meta"):
                whole = kind.from_config(config, dtype=torch.bfloat16)
        except Exception:  # towers may want packages or fields that the text decoder does not
            return None
        decoder = [
            name for name, _ in build_graph(self.config, torch.bfloat16).get_submodule(_DECODER).named_modules()
        ]
        names = {name for name, _ in whole.named_modules()}
        found = [name for name in names if names.issuperset(f"{name}.{part}" for part in decoder if part)]
        return found[0] if len(found) == 1 else None

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
        if self._outer_name is not None:
            return self.whole.warnings()
        return [
            *self.whole.warnings(),
            f"transformers' whole {self.whole.config.model_type} cannot be built here: an adapter will name modules "
            "as the text decoder alone does, and not be found by what loads the whole",
        ]

    def generation_config(self) -> GenerationConfig:
        return self.whole.generation_config()

    def files(self) -> list[Path]:
        return self.whole.files()

    def write_companions(self, folder: Path) -> None:
        self.whole.write_companions(folder)

    def fingerprint(self) -> str:
        return hashlib.sha256(f"text part of {self.whole.fingerprint()}".encode()).hexdigest()[:32]

    def identity(self) -> str:
        return self.whole.identity()


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
