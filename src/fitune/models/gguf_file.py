"""A GGUF file as a model source: tensors under Hugging Face names, de-quantised one at a time."""

from __future__ import annotations

import mmap
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize, quant_shape_to_byte_shape
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from fitune.errors import InputError
from fitune.models.gguf_architectures import (
    ROTARY_FACTORS,
    Architecture,
    config_fields,
    find_architecture,
    hub_name,
)
from fitune.models.gguf_header import GGUFHeader, TensorEntry, read_header
from fitune.models.gguf_tokenizer import build_tokenizer, token_id
from fitune.models.source import Kind, ModelSource

_FLOAT_TYPES = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
_STOPPING_ROLES = ("eos", "eot", "eom")


class GGUFSource(ModelSource):
    """A `.gguf` file of an architecture listed in `gguf_architectures`.

    Raises InputError at construction where the file is not GGUF, cut short, or of another architecture.
    """

    def __init__(self, path: Path, reference: str | None = None, kind: Kind = "gguf") -> None:
        self.path = path
        self.reference = reference or str(path)
        self.kind = kind
        self.header: GGUFHeader = read_header(path)
        self._architecture: Architecture = find_architecture(self.header)
        self._config_fields = config_fields(self.header, self._architecture)
        self._entries = self._place_tensors()
        self._mapped = np.memmap(path, np.uint8, mode="r")
        quantised = self._quantised_types()
        self.note = f"16-bit weights de-quantised from {', '.join(quantised)}" if quantised else None

    def _place_tensors(self) -> dict[str, TensorEntry]:
        placed, lost = {}, []
        for name, entry in self.header.tensors.items():
            if name == ROTARY_FACTORS:
                continue
            found = hub_name(name, self._architecture)
            if found is None:
                lost.append(name)
            else:
                placed[found] = entry
        if lost:
            more = f" and {len(lost) - 5} more" if len(lost) > 5 else ""
            raise InputError(
                f"{len(lost)} tensors have no place in architecture {self.header.architecture}: "
                f"{', '.join(lost[:5])}{more}",
                where=self.path,
            )
        return placed

    def _quantised_types(self) -> list[str]:
        """Names of the quantised types, the one with most weights first."""
        weights: dict[str, int] = {}
        for entry in self._entries.values():
            if entry.type not in _FLOAT_TYPES:
                weights[entry.type.name] = weights.get(entry.type.name, 0) + entry.size_bytes
        return sorted(weights, key=lambda name: -weights[name])

    @cached_property
    def config(self) -> PretrainedConfig:
        fields = dict(self._config_fields)
        for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
            fields[f"{role}_token_id"] = token_id(self.header, key)
        matrices = {self.dtype(name) for name, entry in self._entries.items() if len(entry.shape) > 1}
        fields["dtype"] = next(dtype for dtype in (torch.bfloat16, torch.float16, torch.float32) if dtype in matrices)
        return AutoConfig.for_model(self._architecture.model_type, **fields)

    def tensor_names(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return _FLOAT_TYPES.get(self._entries[name].type, torch.bfloat16)

    def read(self, name: str) -> torch.Tensor:
        return self.read_float32(name).to(self.dtype(name))

    def read_float32(self, name: str) -> torch.Tensor:
        """One tensor in float32: the exact values that the file's blocks stand for."""
        entry = self._entries[name]
        data = self._mapped[entry.start_byte : entry.start_byte + entry.size_bytes]
        rows = data.reshape(quant_shape_to_byte_shape(entry.shape, entry.type))
        try:
            values = dequantize(rows, entry.type)
        except NotImplementedError:
            raise InputError(
                f"tensor {name}: storage {entry.type.name} cannot be de-quantised", where=self.path
            ) from None
        # A copy: plain types come back as views of the read-only mapping.
        tensor = torch.from_numpy(np.array(values, np.float32).reshape(entry.shape))
        return self._unpermuted(name, tensor) if self._architecture.has_permuted_rotary else tensor

    def release(self) -> None:
        if hasattr(mmap, "MADV_DONTNEED"):  # nothing is ever written to the map, so nothing is lost
            self._mapped._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]

    def _unpermuted(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Query and key rows back from llama.cpp's interleaved pairs to halves.

        Row 2*i + j of a head of D rows becomes row j*D/2 + i.
        """
        module = name.rsplit(".", 2)[-2]
        if module not in ("q_proj", "k_proj"):
            return tensor
        field = "num_attention_heads" if module == "q_proj" else "num_key_value_heads"
        heads = self._config_fields[field]
        pairs = tensor.reshape(heads, tensor.shape[0] // heads // 2, 2, -1)
        return pairs.transpose(1, 2).reshape(tensor.shape).contiguous()

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return build_tokenizer(self.header)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._tokenizer

    def generation_config(self) -> GenerationConfig:
        stops = [found for role in _STOPPING_ROLES if (found := token_id(self.header, role)) is not None]
        return GenerationConfig(
            bos_token_id=token_id(self.header, "bos"),
            eos_token_id=list(dict.fromkeys(stops)) or None,
            pad_token_id=token_id(self.header, "padding"),
        )

    def write_companions(self, folder: Path) -> None:
        self.config.save_pretrained(folder)
        self.generation_config().save_pretrained(folder)
        self.tokenizer().save_pretrained(folder)

    def files(self) -> list[Path]:
        return [self.path]
