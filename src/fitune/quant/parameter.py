"""A frozen NF4 weight that stands where a module keeps a bare parameter: stacked experts, transposed linears.

In mixture-of-experts models almost all weights are three-dimensional parameters that the module's own forward
indexes and multiplies. `QuantisedParameter` takes such a parameter's place: indexing decodes one expert, any torch
function decodes the whole, and what autograd would keep for the backward pass is decoded again instead.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fitune.kernels.reference import BLOCK, NESTED_BLOCK
from fitune.quant.nf4 import NF4Weight

if TYPE_CHECKING:
    from fitune.quant.stream import LayerStream

# Codes, absmax and nested absmax of an NF4 weight.
StoredTensors = tuple[Tensor, Tensor, Tensor]


class QuantisedParameter(nn.Module):
    """Behaves as a frozen tensor of `shape` and `dtype` in indexing and in torch functions.

    Attributes:
        dtype: what it decodes to; `shape`: of the decoded tensor.
        backend: which kernels decode.
        stream: brings the stored tensors when they are reached; None: they are here.
    """

    def __init__(self, weight: NF4Weight, dtype: torch.dtype, backend: str) -> None:
        super().__init__()
        self.codes = nn.Parameter(weight.codes, requires_grad=False)
        self.absmax = nn.Parameter(weight.absmax, requires_grad=False)
        self.nested_absmax = nn.Parameter(weight.nested_absmax, requires_grad=False)
        self.offset = weight.offset
        self.source_dtype = weight.dtype
        self.shape = torch.Size(weight.shape)
        self.dtype = dtype
        self.backend = backend
        self.requires_grad = False
        self.stream: LayerStream | None = None

    def nf4(self) -> NF4Weight:
        """The weight as it is stored."""
        codes, absmax, nested = self.own_tensors() if self.stream is None else self.stream.reach(self)
        return NF4Weight(codes, absmax, nested, self.offset, tuple(self.shape), self.source_dtype)

    def own_tensors(self) -> StoredTensors:
        """The stored tensors where the model keeps them; a stream may have others, or these may be on their way."""
        held = self._parameters  # read as they lie: attributes of modules are found slowly, and every product asks
        return held["codes"].data, held["absmax"].data, held["nested_absmax"].data

    def dense(self) -> Tensor:
        """The whole, decoded."""
        return _note(self.nf4().dense(self.dtype, self.backend), _Origin(self, None))

    def part(self, index: int) -> Tensor:
        """`dense()[index]`, without decoding the rest."""
        index = range(self.shape[0])[index]
        return _note(self._decode_part(index), _Origin(self, index))

    def _decode_part(self, index: int) -> Tensor:
        size = prod(self.shape[1:])
        start, end = index * size, (index + 1) * size
        # Scales come in blocks of blocks: decoding starts where one of those does.
        unit = BLOCK * NESTED_BLOCK
        first = start // unit * unit
        blocks = slice(first // BLOCK, -(-end // BLOCK))
        nested = slice(first // unit, -(-end // unit))
        whole = self.nf4()
        piece = NF4Weight(
            whole.codes[first // 2 : -(-end // 2)], whole.absmax[blocks], whole.nested_absmax[nested], self.offset,
            (end - first,), self.source_dtype,
        )  # fmt: skip
        return piece.dense(self.dtype, self.backend)[start - first :].view(self.shape[1:])

    def __getitem__(self, index: Any) -> Tensor:
        if isinstance(index, Tensor) and index.dim() == 0 and index.dtype != torch.bool:
            index = int(index)
        if isinstance(index, int) and not isinstance(index, bool) and len(self.shape) > 1:
            return self.part(index)
        return self.dense()[index]

    @property
    def device(self) -> torch.device:
        return self.codes.device if self.stream is None else self.stream.device

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        return (self.part(index) for index in range(len(self)))

    def __matmul__(self, other: Tensor) -> Tensor:
        return torch.matmul(self.dense(), other)

    def __rmatmul__(self, other: Tensor) -> Tensor:
        return torch.matmul(other, self.dense())

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As a tensor's `to`; the stored form stays as it is."""
        return self.dense().to(*args, **kwargs)

    def float(self) -> Any:
        """As a tensor's `float`."""
        return self.dense().float()

    def type(self, *args: Any, **kwargs: Any) -> Any:
        """As a tensor's `type`."""
        return self.dense().type(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or not hasattr(Tensor, name):
                raise
            return getattr(self.dense(), name)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Sequence[Any], args: Any = (), kwargs: Any = None
    ) -> Any:
        return function(*map(_decoded, args), **{key: _decoded(value) for key, value in (kwargs or {}).items()})

    def extra_repr(self) -> str:
        return f"{tuple(self.shape)}, {self.dtype}, nf4"


def _decoded(value: Any) -> Any:
    if isinstance(value, QuantisedParameter):
        return value.dense()
    if isinstance(value, (tuple, list)):
        return type(value)(map(_decoded, value))
    return value


@dataclass(frozen=True)
class _Origin:
    """Which part of which parameter a decoded tensor is (index None: all of it)."""

    parameter: QuantisedParameter
    index: int | None

    def decode(self) -> Tensor:
        if self.index is None:
            return self.parameter.nf4().dense(self.parameter.dtype, self.parameter.backend)
        return self.parameter._decode_part(self.index)


# Storage of every decoded tensor that is alive -> where it came from.
_ALIVE: dict[int, _Origin] = {}


def _note(decoded: Tensor, origin: _Origin) -> Tensor:
    storage = decoded.untyped_storage()
    key = storage._cdata
    _ALIVE[key] = origin
    weakref.finalize(storage, _ALIVE.pop, key, None)
    return decoded


@dataclass(frozen=True)
class _Kept:
    """What is kept for the backward pass in a decoded tensor's place."""

    origin: _Origin
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


def _kept(tensor: Tensor) -> _Kept | None:
    """None for what is no part of a decoded weight."""
    origin = _ALIVE.get(tensor.untyped_storage()._cdata)
    if origin is None:
        return None
    base = 0 if origin.index is None else _first_element(origin)
    return _Kept(origin, tensor.size(), tensor.stride(), tensor.storage_offset() - base)


def _decoded_from(kept: _Kept) -> Tensor:
    again = kept.origin.decode()
    return again.as_strided(kept.size, kept.stride, again.storage_offset() + kept.offset)


def _first_element(origin: _Origin) -> int:
    """Where a part begins in the storage it was decoded into."""
    assert origin.index is not None
    size = prod(origin.parameter.shape[1:])
    return origin.index * size % (BLOCK * NESTED_BLOCK)


@contextmanager
def decoded_again() -> Iterator[None]:
    """Inside, autograd keeps references to quantised parameters instead of decoded copies.

    Whatever else it keeps goes to the hooks that were on before (those that compute a layer again in the backward
    pass): torch asks the innermost pair only.
    """
    outer = torch._C._autograd._top_saved_tensors_default_hooks(True)

    def pack(tensor: Tensor) -> Any:
        kept = _kept(tensor)
        if kept is None:
            return tensor if outer is None else outer[0](tensor)
        return kept

    def unpack(kept: Any) -> Any:
        if isinstance(kept, _Kept):
            return _decoded_from(kept)
        return kept if outer is None else outer[1](kept)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def replace_parameter(owner: nn.Module, name: str, quantised: QuantisedParameter) -> None:
    """Puts `quantised` where `owner` keeps its parameter `name`; its forward then keeps no decoded copy."""
    del owner._parameters[name]
    owner.add_module(name, quantised)
    if getattr(owner, "_decodes_again", False):
        return
    own_forward = owner.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with decoded_again():
            return own_forward(*args, **kwargs)

    owner.forward = forward
    owner._decodes_again = True
