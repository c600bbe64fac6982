"""Saving all weights of a fully fine-tuned model as an ordinary Hugging Face checkpoint."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from fitune.atomic import new_folder
from fitune.fuse.model import FusedModel
from fitune.models.source import ModelSource


def save_weights(model: FusedModel, source: ModelSource, folder: Path) -> str:
    """Writes weights (bfloat16), configuration and tokenizer into `folder`, whole or not at all.

    Returns a hash over the exact float32 bits that were trained.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.graph.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().contiguous().view(torch.uint8).numpy().tobytes())
    with new_folder(folder) as beside:
        tied = set(model.graph._tied_weights_keys or ()) if model.graph.config.tie_word_embeddings else set()
        state = {
            name: value.to(torch.bfloat16) if value.is_floating_point() else value
            for name, value in model.graph.state_dict().items()
            if name not in tied
        }
        model.graph.save_pretrained(beside, state_dict=state, safe_serialization=True)
        source.tokenizer().save_pretrained(beside)
    return digest.hexdigest()
