"""Where a model's weights come from: one interface over folders, hub names and GGUF files."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

    from fitune.quant.nf4 import NF4Weight

# What `identity` reads: beginnings, which hold the headers of GGUF and safetensors files, and pieces of the rest.
_WEIGHT_SUFFIXES = {".safetensors", ".gguf", ".bin"}
_BEGINNING_BYTES, _PIECES, _PIECE_BYTES = 2**16, 1024, 512

Kind = Literal["folder", "hub", "gguf", "bundled", "preset"]


class ModelSource(ABC):
    """The weights of one causal language model, read tensor by tensor, and only when asked for.

    Attributes:
        reference: the words that name this model, as the user gave them.
        kind: what stands behind the reference.
        note: one sentence that every report about this model must carry (None: nothing to say).
    """

    reference: str
    kind: Kind
    note: str | None = None

    @property
    @abstractmethod
    def config(self) -> PretrainedConfig:
        """The transformers configuration; its `dtype` is that of the weight matrices as `read` gives them."""

    @abstractmethod
    def tensor_names(self) -> list[str]:
        """Names as in a Hugging Face checkpoint, e.g. `model.layers.0.self_attn.q_proj.weight`.

        A tied output head has no name of its own.
        """

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor without reading it. Raises KeyError for a name that is not there."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """The dtype that `read(name)` will have, without reading it."""

    @abstractmethod
    def read(self, name: str) -> torch.Tensor:
        """One tensor on the CPU in its source's 16- or 32-bit dtype (quantised tensors: bfloat16).

        The result may be a read-only view of the mapped file: copy it before writing to it.
        """

    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer with its special tokens and chat template."""

    @abstractmethod
    def generation_config(self) -> GenerationConfig:
        """How the model's makers want it sampled, and on which tokens it stops."""

    @abstractmethod
    def files(self) -> list[Path]:
        """The files that make this model what it is: weights, configuration, tokenizer."""

    @abstractmethod
    def write_companions(self, folder: Path) -> None:
        """Writes all that a checkpoint has beside its weights: configurations, tokenizer, chat template."""

    def release(self) -> None:  # noqa: B027 - most sources hold nothing
        """Gives back the memory of mapped files that were read; tensors that `read` gave stay valid.

        It is page cache, so that a tensor that is used again comes back by itself, from the file if need be.
        """

    def warnings(self) -> list[str]:
        """What may be meant otherwise than it was understood, one sentence each; to be shown before any work.

        Raises InputError where the tokenizer cannot be used.
        """
        return []

    def nf4(self, name: str) -> NF4Weight | None:
        """The tensor's NF4 form where the source holds it already, as views into the mapped file; else None."""
        return None

    def quantised_folder(self) -> Path | None:
        """The folder, where all its quantised weights are NF4 as a store has them (`nf4` gives them); else None."""
        return None

    def carried_names(self) -> list[str]:
        """Tensors that are no part of the text decoder and go into a merged checkpoint as they are (`read`)."""
        return []

    def written_name(self, name: str) -> str:
        """The name of a tensor in a checkpoint that goes with the files of `write_companions`."""
        return name

    def outer_module(self, name: str) -> str:
        """The name that a module of the graph has in the model that transformers loads from the whole checkpoint."""
        return name

    def graph_module(self, name: str) -> str:
        """The way back from `outer_module`; a name of the graph's stays."""
        return name

    def generation_eos_ids(self) -> list[int]:
        """Token ids on which generation stops, by the generation config, else config, else tokenizer."""
        for found in (
            self.generation_config().eos_token_id,
            getattr(self.config, "eos_token_id", None),
            self.tokenizer().eos_token_id,
        ):
            if found is not None:
                return [int(token) for token in (found if isinstance(found, (list, tuple)) else [found])]
        return []

    def fingerprint(self) -> str:
        """A key of 32 hex digits from the kind and every file's resolved name, size and modification time.

        It changes with every change to a file; a copy of the same model elsewhere has another. See `identity`.
        """
        digest = hashlib.sha256(self.kind.encode())
        for file in sorted(path.resolve() for path in self.files()):
            found = file.stat()
            digest.update(f"\0{file}\0{found.st_size}\0{found.st_mtime_ns}".encode())
        return digest.hexdigest()[:32]

    def identity(self) -> str:
        """A key of 32 hex digits from what is in the weights and config.json: the same wherever a copy of them lies.

        Quick at any size: a file's beginning and some pieces spread over the rest stand for all of it.
        """
        digest = hashlib.sha256()
        wanted = [path for path in self.files() if path.suffix in _WEIGHT_SUFFIXES or path.name == "config.json"]
        for file in sorted(wanted, key=lambda path: path.name):
            digest.update(_sample(file))
        return digest.hexdigest()[:32]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.reference!r})"


def _sample(file: Path) -> bytes:
    """Of a file's content, 32 bytes that stand for it."""
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as handle:
        digest.update(handle.read(_BEGINNING_BYTES))
        for piece in range(1, _PIECES + 1):
            handle.seek(max(0, piece * size // _PIECES - _PIECE_BYTES))
            digest.update(handle.read(_PIECE_BYTES))
    return digest.digest()
