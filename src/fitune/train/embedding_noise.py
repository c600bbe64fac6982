"""NEFTune: noise on the embeddings of training steps, which makes the tone of few samples less of a rut."""

from __future__ import annotations

from transformers import PreTrainedModel
from transformers.integrations.neftune import neftune_post_forward_hook


def add_embedding_noise(graph: PreTrainedModel, alpha: float) -> None:
    """Has what the table of embeddings gives be shifted, in training mode only.

    Uniformly within alpha / sqrt(tokens of a row * width) of each value, as transformers does (Jain et al. 2023,
    arXiv:2310.05914, where 5 to 15 are tried). A packed row counts as one. The noise is torch's own, so a run that is
    resumed has the same.
    """
    table = graph.get_input_embeddings()
    table.neftune_noise_alpha = alpha
    table.register_forward_hook(neftune_post_forward_hook)
