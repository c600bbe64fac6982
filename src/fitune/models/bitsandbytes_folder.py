"""Weights that bitsandbytes has quantised: NF4 in our own layout is used as it is, its other kinds are decoded.

What a linear layer's `weight` becomes: in 4 bits the codes under its own name, with `weight.absmax`,
`weight.quant_map` and a JSON `weight.quant_state.bitsandbytes__nf4` (or fp4) beside it, and the `nested_` ones where
the scales are quantised too; in 8 bits the rows' codes, with their largest values in `SCB` (arXiv 2208.07339).
"""

from __future__ import annotations

import importlib
import json
import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig

from fitune.kernels import native
from fitune.kernels.reference import BLOCK, NESTED_BLOCK
from fitune.models.checkpoint_files import CheckpointTensors
from fitune.models.decoded_tensors import EncodedTensor, Encoding
from fitune.quant.nf4 import NF4Weight

_STATE = ".quant_state.bitsandbytes__"
_PARTS_4BIT = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_PARTS_8BIT = ("SCB", "weight_format")
INSTALL = "pip install bitsandbytes"


class BitsAndBytesWeights:
    """The quantised weights of a checkpoint of bitsandbytes.

    Attributes:
        encoding: how they are decoded.
        as_is: names of the weights that are NF4 with double quantisation in blocks of 64 and 256 and bytes.
    """

    def __init__(
        self,
        files: CheckpointTensors,
        config: PretrainedConfig,
        dtype: torch.dtype,
        is_own_store: bool,
        problems: list[str],
    ) -> None:
        self._files = files
        self.as_is: list[str] = []
        names = files.names()
        have = set(names)
        tensors: dict[str, EncodedTensor] = {}
        kinds: dict[str, int] = {}
        for name in names:
            if _STATE in name:
                weight = name.partition(_STATE)[0]
                parts = (weight, *(part for end in _PARTS_4BIT if (part := f"{weight}.{end}") in have), name)
                found = self._four_bits(weight, parts, kinds, problems)
            elif name.endswith(".SCB"):
                module = name.removesuffix(".SCB")
                weight = f"{module}.weight"
                parts = (weight, *(part for end in _PARTS_8BIT if (part := f"{module}.{end}") in have))
                found = self._eight_bits(weight, parts, dtype, kinds, problems)
            else:
                continue
            if found is not None:
                tensors[weight] = found
        if not tensors and not problems:
            problems.append("config.json says that bitsandbytes quantised the weights, and none of them is quantised")
        if tensors and not is_own_store and _has_transposed_linears(config):
            problems.append(
                f"bitsandbytes' layout of {config.model_type} transposes its layers' weights, which is not read; "
                "give the model in 16 bits"
            )
        self._kinds = ", ".join(sorted(kinds, key=lambda kind: -kinds[kind]))
        self.encoding = Encoding(tensors, self._note(len(tensors)))

    @property
    def is_as_is(self) -> bool:
        """Whether every quantised weight can be used without decoding it."""
        return len(self.as_is) == len(self.encoding.tensors)

    def nf4(self, name: str) -> NF4Weight | None:
        """A weight of `as_is` as views into the mapped file; None for any other."""
        if name not in self.encoding.tensors or name not in self.as_is:
            return None
        return NF4Weight.from_serialised(name, self._parts(name))

    def _note(self, count: int) -> str:
        if len(self.as_is) == count:
            return "4-bit base: the NF4 weights of the folder itself; methods other than qlora decode them"
        return f"16-bit weights de-quantised from bitsandbytes {self._kinds}"

    def _parts(self, name: str) -> dict[str, Tensor]:
        return {part: self._files.read(part) for part in self.encoding.tensors[name].parts}

    def _four_bits(
        self, weight: str, parts: tuple[str, ...], kinds: dict[str, int], problems: list[str]
    ) -> EncodedTensor | None:
        try:
            state = json.loads(bytes(self._files.read(parts[-1]).tolist()))
            kind, shape, dtype = state["quant_type"], tuple(state["shape"]), getattr(torch, state["dtype"])
            codes, blocks = self._files.shape(weight), self._files.shape(f"{weight}.absmax")
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            problems.append(f"tensor {weight}: bitsandbytes' state beside it cannot be read ({error!r})")
            return None
        count = torch.Size(shape).numel()
        stored_bytes = torch.Size(codes).numel() * self._files.dtype(weight).itemsize
        if stored_bytes != -(-count // 2) or torch.Size(blocks).numel() != -(-count // state["blocksize"]):
            problems.append(f"tensor {weight}: {stored_bytes} bytes and {blocks} scales do not make a weight {shape}")
            return None
        is_double = state.get("nested_blocksize") is not None
        described = f"{kind.upper()}{'' if is_double else ' without double quantisation'}"
        kinds[described] = kinds.get(described, 0) + count
        if (
            (kind, state["blocksize"], state.get("nested_blocksize")) == ("nf4", BLOCK, NESTED_BLOCK)
            and self._files.dtype(weight) == torch.uint8
            and f"{weight}.nested_absmax" in parts
        ):
            self.as_is.append(weight)
            return EncodedTensor(parts, shape, dtype, partial(self._decode_nf4, weight))
        if _bitsandbytes() is None:
            problems.append(f"{described} weights are decoded by the package bitsandbytes: {INSTALL}")
            return None
        return EncodedTensor(parts, shape, dtype, partial(self._decode_by_library, weight))

    def _decode_nf4(self, name: str) -> Tensor:
        weight = NF4Weight.from_serialised(name, self._parts(name))
        return weight.dense(weight.dtype, "native" if native.status().available else "reference")

    def _decode_by_library(self, name: str) -> Tensor:
        functional: Any = _bitsandbytes()
        parts = self._parts(name)
        codes = parts.pop(name).view(torch.uint8).reshape(-1, 1)
        state = functional.QuantState.from_dict(parts, torch.device("cpu"))
        decoded: Tensor = functional.dequantize_4bit(codes, state)
        return decoded

    def _eight_bits(
        self, weight: str, parts: tuple[str, ...], dtype: torch.dtype, kinds: dict[str, int], problems: list[str]
    ) -> EncodedTensor | None:
        module = weight.removesuffix(".weight")
        try:
            shape, stored = self._files.shape(weight), self._files.dtype(weight)
        except KeyError:
            problems.append(f"tensor {weight} is missing, {module}.SCB is there")
            return None
        order = f"{module}.weight_format"
        is_by_row = order not in parts or int(self._files.read(order)) == 0
        if (
            stored != torch.int8
            or len(shape) != 2
            or self._files.shape(f"{module}.SCB") != shape[:1]
            or not is_by_row
        ):
            problems.append(f"tensor {weight} ({stored}, {shape}) is not in bitsandbytes' 8-bit layout by rows")
            return None
        kinds["INT8"] = kinds.get("INT8", 0) + torch.Size(shape).numel()
        return EncodedTensor(parts, shape, dtype, partial(self._decode_int8, weight, f"{module}.SCB"))

    def _decode_int8(self, weight: str, scales: str) -> Tensor:
        # The reciprocal as bitsandbytes writes it, so that the bits agree.
        return self._files.read(weight) * self._files.read(scales).view(-1, 1) * 7.874015718698502e-3


def _bitsandbytes() -> Any:
    try:
        return importlib.import_module("bitsandbytes.functional")
    except ImportError:
        return None


def _has_transposed_linears(config: PretrainedConfig) -> bool:
    """Whether the architecture's file uses transformers' `Conv1D`, whose weights lie the other way round."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return False
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return hasattr(sys.modules[model.__module__], "Conv1D")
