"""Saving all weights of a fully fine-tuned model as an ordinary Hugging Face checkpoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict

from fitune.atomic import new_folder
from fitune.fuse.model import FusedModel
from fitune.models.conversion import GraphTensors
from fitune.models.graph import build_graph
from fitune.models.source import ModelSource
from fitune.models.written_form import written_form

STORED = torch.bfloat16


def save_weights(model: FusedModel, source: ModelSource, folder: Path) -> str:
    """Writes weights (bfloat16), configuration and tokenizer into `folder`, whole or not at all.

    Of a multimodal model the whole is written: the trained text decoder, and its other weights as they were.
    Returns a hash over the exact float32 bits that were trained.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.graph.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().contiguous().view(torch.uint8).numpy().tobytes())
    with new_folder(folder) as beside:
        tied = set(model.graph._tied_weights_keys or ()) if model.graph.config.tie_word_embeddings else set()
        state = {
            name: value.to(STORED) if value.is_floating_point() else value
            for name, value in model.graph.state_dict().items()
            if name not in tied
        }
        if source.carried_names():
            _write_whole(state, source, beside)
        else:
            model.graph.save_pretrained(beside, state_dict=state, safe_serialization=True)
            source.tokenizer().save_pretrained(beside)
    return digest.hexdigest()


def _write_whole(state: Mapping[str, torch.Tensor], source: ModelSource, folder: Path) -> None:
    """The graph's tensors in the checkpoint's own form, and all that is no part of the graph as it is."""
    graph = build_graph(source.config, STORED)
    tensors, tied = GraphTensors(source, graph), graph.all_tied_weights_keys
    written: dict[str, torch.Tensor] = {}
    for group in tensors.groups:
        # A checkpoint may hold either of two tied tensors, or both.
        mine = {name: state[name if name in state else tied[name]] for name in group.targets}
        written |= written_form(source, graph, group, mine)
    for name in [*tensors.unused, *source.carried_names()]:
        # Copies: the views of one file would be taken for one tensor.
        written[source.written_name(name)] = source.read(name).clone()
    save_torch_state_dict({name: value.contiguous() for name, value in written.items()}, folder)
    source.write_companions(folder)
    path = folder / "config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    field = "torch_dtype" if "torch_dtype" in settings else "dtype"
    path.write_text(json.dumps(settings | {field: str(STORED).removeprefix("torch.")}, indent=2) + "\n")
