"""Checkpoints of other quantisers, decoded tensor by tensor by the libraries that wrote them; others are refused.

FP8 with block scales and MXFP4 are decoded by transformers; compressed-tensors' formats and AWQ by the package
compressed-tensors, where it is installed.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fitune.models.checkpoint_files import CheckpointTensors
from fitune.models.decoded_tensors import EncodedTensor, Encoding

READ = ("bitsandbytes", "fp8", "mxfp4", "compressed-tensors", "awq")
INSTALL_COMPRESSED = "pip install compressed-tensors"
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# What compressed-tensors keeps beside a weight to quantise activations, which training in 16 bits does not do.
_ACTIVATIONS = ("input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point")
# MXFP4 is decoded in pieces of so many rows of 32 weights, so that its index tables stay small beside the weight.
_MXFP4_ROWS = 1 << 18


def find_encoding(
    files: CheckpointTensors, quantisation: dict[str, Any], dtype: torch.dtype, folder: Path, problems: list[str]
) -> Encoding | None:
    """How the weights of a checkpoint with this `quantization_config` are decoded to `dtype`.

    None, and more of `problems`, where they cannot be.
    """
    method = str(quantisation.get("quant_method", "unknown"))
    readers: dict[str, Callable[..., Encoding | None]] = {
        "fp8": _fp8,
        "mxfp4": _mxfp4,
        "compressed-tensors": _compressed,
        "awq": _awq,
    }
    if method not in readers:
        problems.append(
            f"the weights are quantised by {method}, which nothing here decodes (decoded are: {', '.join(READ)}); "
            f"{_advice(folder)}"
        )
        return None
    before = len(problems)
    found = readers[method](files, quantisation, dtype, problems)
    if len(problems) == before and found is not None and not found.tensors:
        problems.append(f"config.json says that {method} quantised the weights, and none of them is quantised")
    return found if len(problems) == before else None


def _advice(folder: Path) -> str:
    """Which model to give instead: the one that the model card names as its base, if it does."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace")[:20_000] if card.is_file() else ""
    named = re.search(r"^base_model:\s*(?:\n\s*-\s*)?([\w.-]+/[\w.-]+)\s*$", text, re.MULTILINE)
    return f"give the model in 16 bits: {named[1]}" if named else "give the original model in 16 bits"


def _fp8(files: CheckpointTensors, quantisation: dict[str, Any], dtype: torch.dtype, problems: list[str]) -> Encoding:
    """`weight` in FP8 and `weight_scale_inv`, one float for a block of (usually) 128 x 128, or for the whole."""
    block = quantisation.get("weight_block_size")
    have = set(files.names())
    tensors: dict[str, EncodedTensor] = {}
    unused: set[str] = set()
    for name in files.names():
        if files.dtype(name) not in _FP8:
            continue
        scales = f"{name}_scale_inv"
        if scales not in have:
            problems.append(f"tensor {name} is FP8, and its scale {scales} is not there")
            continue
        shape, found = files.shape(name), files.shape(scales)
        if len(shape) < 2:
            problems.append(f"tensor {name} is FP8 and has shape {shape}; matrices are decoded")
            continue
        wanted = (*shape[:-2], *(-(-size // step) for size, step in zip(shape[-2:], block or (1, 1), strict=True)))
        if block and found != wanted:
            problems.append(f"tensor {scales} has shape {found}, blocks of {block} of {shape} want {wanted}")
            continue
        if not block and torch.Size(found).numel() != torch.Size(shape[:-2]).numel():
            problems.append(f"tensor {scales} has shape {found}, without blocks one scale a matrix is wanted")
            continue
        tensors[name] = EncodedTensor((name, scales), shape, dtype, partial(_decode_fp8, files, name, scales, block))
        stem = name.removesuffix("weight")
        unused |= {f"{stem}{end}" for end in ("activation_scale", "input_scale")} & have
        unused |= {f"{name}_activation_scale"} & have
    return Encoding(tensors, "16-bit weights de-quantised from FP8", frozenset(unused))


def _decode_fp8(files: CheckpointTensors, name: str, scales_name: str, block: list[int] | None) -> Tensor:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight, scales = files.read(name), files.read(scales_name)
    if scales.dtype != torch.uint8:  # bytes are exponents, which transformers knows; the rest is exact in float32
        scales = scales.to(torch.float32)
    rows, columns = weight.shape[-2:]
    if block is None:
        scales = scales.reshape(*weight.shape[:-2], 1, 1)
    else:
        # transformers takes the block's size from the grid, which is wrong where a block is cut by the edge.
        missing = (0, -columns % block[1], 0, -rows % block[0])
        if any(missing):
            weight = pad(weight.to(torch.float32), missing)
    decoded: Tensor = Fp8Dequantize(None).convert({"weight": weight, "weight_scale_inv": scales})["weight"]
    return decoded[..., :rows, :columns]


def _mxfp4(
    files: CheckpointTensors, quantisation: dict[str, Any], dtype: torch.dtype, problems: list[str]
) -> Encoding:
    """Experts' weights as `_blocks` [E, rows, G, 16] (two codes a byte) and `_scales` [E, rows, G] (exponents)."""
    have = set(files.names())
    tensors: dict[str, EncodedTensor] = {}
    for blocks in files.names():
        if not blocks.endswith("_blocks") or files.dtype(blocks) != torch.uint8:
            continue
        name = blocks.removesuffix("_blocks")
        scales = f"{name}_scales"
        shape = files.shape(blocks)
        if scales not in have or files.shape(scales) != shape[:-1] or len(shape) != 4:
            problems.append(f"tensor {blocks} {shape} is without scales {scales} of shape {shape[:-1]}")
            continue
        # The graph multiplies from the left: the decoded weight lies transposed.
        whole = (shape[0], shape[2] * shape[3] * 2, shape[1])
        tensors[name] = EncodedTensor(
            (blocks, scales), whole, dtype, partial(_decode_mxfp4, files, blocks, scales, dtype)
        )
    return Encoding(tensors, "16-bit weights de-quantised from MXFP4")


def _decode_mxfp4(files: CheckpointTensors, blocks: str, scales: str, dtype: torch.dtype) -> Tensor:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    decoded: Tensor = convert_moe_packed_tensors(
        files.read(blocks), files.read(scales), dtype=dtype, rows_per_chunk=_MXFP4_ROWS
    )
    return decoded


def _library(problems: list[str], what: str) -> Any:
    try:
        return importlib.import_module("compressed_tensors")
    except ImportError as error:
        problems.append(
            f"{what} weights are decoded by the package compressed-tensors ({error}): {INSTALL_COMPRESSED}, or give "
            "the original model in 16 bits"
        )
        return None


def _compressed(
    files: CheckpointTensors, quantisation: dict[str, Any], dtype: torch.dtype, problems: list[str]
) -> Encoding | None:
    """compressed-tensors: FP8, INT8 and packed INT4 among its formats, each group of layers with a scheme."""
    if _library(problems, "compressed-tensors") is None:
        return None
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    try:
        settings = QuantizationConfig.model_validate(quantisation)
    except ValueError as error:
        problems.append(f"config.json: quantization_config is refused by compressed-tensors: {error}")
        return None
    have = set(files.names())
    tensors: dict[str, EncodedTensor] = {}
    unused: set[str] = set()
    formats: set[str] = set()
    for name in files.names():
        if not name.endswith(".weight_scale"):
            if name.endswith((".k_scale", ".v_scale", ".q_scale")):
                unused.add(name)
            continue
        module = name.removesuffix(".weight_scale")
        scheme = _scheme_of(module, settings)
        if scheme is None or scheme.weights is None:
            problems.append(f"{module} is quantised, and no group of quantization_config says how")
            continue
        layout = _word(scheme.format or settings.format)
        try:
            compressor = BaseCompressor.get_value_from_registry(layout)
            ends = set(compressor.compression_param_names(scheme)) | {"weight_scale"}
        except (KeyError, NotImplementedError):
            problems.append(f"{module} is stored as {layout}, which compressed-tensors does not decode here")
            continue
        parts = {end: f"{module}.{end}" for end in sorted(ends) if f"{module}.{end}" in have}
        shape = _compressed_shape(files, parts)
        if shape is None:
            problems.append(f"{module} is stored as {layout}, and has only {', '.join(parts)}")
            continue
        formats.add(f"{layout} ({_word(scheme.weights.type)}{scheme.weights.num_bits})")
        decode = partial(_decompress, files, parts, compressor, scheme)
        tensors[f"{module}.weight"] = EncodedTensor(tuple(parts.values()), shape, dtype, decode)
        unused |= {f"{module}.{end}" for end in _ACTIVATIONS} & have - set(parts.values())
    note = f"16-bit weights de-quantised from compressed-tensors {', '.join(sorted(formats))}"
    return Encoding(tensors, note, frozenset(unused))


def _word(value: Any) -> str:
    """A value of one of the library's enumerations as it is written in config.json."""
    return str(getattr(value, "value", value))


def _scheme_of(module: str, settings: Any) -> Any:
    """The scheme of the group that a linear layer of this name is in; None where it is in none."""
    from compressed_tensors.utils.match import is_match

    layer = torch.nn.Linear(1, 1, device="meta")
    for scheme in settings.config_groups.values():
        if is_match(module, layer, scheme.targets, settings.ignore or ()):
            return scheme
    return None


def _compressed_shape(files: CheckpointTensors, parts: dict[str, str]) -> tuple[int, ...] | None:
    if "weight_shape" in parts:
        return tuple(int(size) for size in files.read(parts["weight_shape"]))
    return files.shape(parts["weight"]) if "weight" in parts else None


def _decompress(files: CheckpointTensors, parts: dict[str, str], compressor: Any, scheme: Any) -> Tensor:
    decoded: Tensor = compressor.decompress({end: files.read(name) for end, name in parts.items()}, scheme)["weight"]
    return decoded


def _awq(
    files: CheckpointTensors, quantisation: dict[str, Any], dtype: torch.dtype, problems: list[str]
) -> Encoding | None:
    """AutoAWQ's GEMM form: `qweight` [in, out/8] int32, `qzeros` [in/group, out/8], `scales` [in/group, out]."""
    if _library(problems, "AWQ") is None:
        return None
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter

    try:
        converter = AutoAWQConverter.from_autoawq_config(quantisation)
        settings = converter.update_config(None)
    except ValueError as error:
        problems.append(f"config.json: quantization_config is refused by compressed-tensors: {error}")
        return None
    (scheme,) = settings.config_groups.values()
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    have = set(files.names())
    tensors: dict[str, EncodedTensor] = {}
    for name in files.names():
        if not name.endswith(".qweight"):
            continue
        module = name.removesuffix(".qweight")
        parts = {end: f"{module}.{end}" for end in ("qweight", "qzeros", "scales") if f"{module}.{end}" in have}
        if len(parts) != 3:
            problems.append(f"{module} has only {', '.join(parts)} of qweight, qzeros and scales")
            continue
        rows, packed = files.shape(name)
        decode = partial(_decode_awq, files, parts, converter, compressor, scheme)
        tensors[f"{module}.weight"] = EncodedTensor(tuple(parts.values()), (packed * 8, rows), dtype, decode)
    return Encoding(tensors, "16-bit weights de-quantised from AWQ (int4)")


def _decode_awq(
    files: CheckpointTensors, parts: dict[str, str], converter: Any, compressor: Any, scheme: Any
) -> Tensor:
    read = {f"layer.{end}": files.read(name) for end, name in parts.items()}
    packed = {name.removeprefix("layer."): value for name, value in converter.process(read).items()}
    decoded: Tensor = compressor.decompress(packed, scheme)["weight"]
    return decoded
