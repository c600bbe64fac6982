"""A model ready for training or scoring: its fused parts, and the log-probabilities of a batch's targets."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from fitune.data.batch import Batch
from fitune.errors import FituneError
from fitune.fuse.attention import documents_given
from fitune.fuse.decoder_layer import FusedLayer
from fitune.fuse.head import PLAIN_LOGITS, LogitForm, token_logprobs
from fitune.fuse.loss_scale import LossScale
from fitune.fuse.narrow_copies import narrow_copies
from fitune.fuse.prove import TOLERANCE
from fitune.fuse.replace import FusionReport, fuse
from fitune.models.dropout import drops
from fitune.models.graph import recompute_layers
from fitune.models.wrapped_part import in_use, original
from fitune.process_memory import give_back_free_memory
from fitune.quant.stream import LayerStream

PROOF_TOKENS = 8


@dataclass
class FusedModel:
    """What a step needs of a model.

    Attributes:
        graph: the transformers model, adapters injected and parts replaced.
        adapted: PEFT's view of it; None without an adapter.
        dtype: of the computation.
        backend: which kernels run.
        report: what was replaced, what was left and why.
        logit_form: what the model makes of its head's products.
        loss_scale: of training in float16; None: in formats with float32's range.
        stream: brings the frozen weights of layers that do not stay in memory; None: all of them stay.
    """

    graph: PreTrainedModel
    adapted: PeftModel | None
    dtype: torch.dtype
    backend: str
    report: FusionReport
    logit_form: LogitForm = PLAIN_LOGITS
    stream: LayerStream | None = None
    loss_scale: LossScale | None = None

    @property
    def trainable(self) -> list[nn.Parameter]:
        """The parameters that learn, in a fixed order."""
        return [parameter for parameter in self.graph.parameters() if parameter.requires_grad]

    def recompute_layers(self) -> None:
        """Has every layer computed again in the backward pass. Raises InputError for a model that cannot."""
        recompute_layers(self.graph)
        for module in self.graph.modules():
            forward = vars(module).get("forward")
            if isinstance(forward, FusedLayer):
                # transformers' own way goes around the layer or inside its class's forward, by version: not here.
                module.gradient_checkpointing = False
                forward.recompute = True

    def logprobs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the targets of non-zero weight [n] (float32, differentiable), and their weights [n].

        Only those positions go through the output head.
        """
        chosen = batch.weights.reshape(-1).nonzero().squeeze(1)
        logprobs = self.logprobs_at(batch.tokens, batch.positions, batch.documents, chosen)
        return logprobs, batch.weights.reshape(-1)[chosen]

    def logprobs_at(self, tokens: Tensor, positions: Tensor, documents: Tensor, chosen: Tensor) -> Tensor:
        """Log-probabilities [n] of the tokens at the places `chosen` [n] of the flattened rows [B, T]."""
        targets = tokens.reshape(-1)[chosen]
        # The hidden state that predicts a token is the one before it; a document's first token has no weight.
        before = chosen - 1
        inputs: dict[str, Any] = {"input_ids": tokens, "use_cache": False}
        if self.report.takes_positions:
            inputs["position_ids"] = positions
        if "attention" in self.report.replaced:
            inputs["documents"] = documents
        wide = self.dtype != self.graph.dtype  # float32 masters computed in a narrower dtype
        by_documents = documents_given() if "documents" in inputs else nullcontext()
        narrow = narrow_copies(self.dtype) if wide else nullcontext()
        with narrow, by_documents:
            if "head" in self.report.replaced:
                hidden = self.graph.get_decoder()(**inputs).last_hidden_state
            else:
                logits = self.graph(**inputs).logits
        if "head" not in self.report.replaced:
            rows = logits.reshape(-1, logits.shape[-1])[before].float()
            return rows.log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1)
        head = in_use(self.graph.get_output_embeddings())
        rows = hidden.reshape(-1, hidden.shape[-1])[before].to(self.dtype)
        if self.stream is not None:  # the head comes now: layers go, and what the last step's gradients left
            self.stream.make_room()
            give_back_free_memory()
        logprobs = token_logprobs(rows, head.weight, head.bias, targets, self.backend, self.logit_form)
        if self.stream is not None:
            self.stream.end_used()
        return logprobs


def prepare(
    graph: PreTrainedModel, adapted: PeftModel | None, dtype: torch.dtype, backend: str, proofs: bool = True
) -> FusedModel:
    """Fuses what it can of `graph` and proves it. `proofs=False` is for dry runs."""
    report = fuse(graph, dtype, backend, proofs)
    scale = LossScale() if dtype == torch.float16 else None
    model = FusedModel(graph, adapted, dtype, backend, report, loss_scale=scale)
    reason = _find_logit_form(model) if proofs else None
    if reason is None:
        report.replaced["head"] = 1
    else:
        report.left["head"] = reason
    return model


def _find_logit_form(model: FusedModel) -> str | None:
    """Sets the model's logit form; or says why its head, and a scale and a cap, are not all it does to get logits."""
    graph = model.graph
    head, base = in_use(graph.get_output_embeddings()), original(graph.get_output_embeddings())
    if not isinstance(head, nn.Linear) or not hasattr(graph, "get_decoder"):
        return "the output head is not a linear layer"
    if drops(graph, apart_from=graph.get_decoder()):
        return "there is dropout before it"
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(head.weight.shape[0], (1, PROOF_TOKENS), generator=generator)
    was_training = graph.training
    graph.eval()
    try:
        with torch.no_grad():
            logits = graph(input_ids=tokens, use_cache=False).logits[0].float()
            hidden = graph.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state[0]
            held = base.weight.dtype  # what is trained whole is wider
            bias = None if head.bias is None else head.bias.to(held)
            products = torch.nn.functional.linear(hidden.to(held), head.weight.to(held), bias).float()
    except (TypeError, AttributeError, RuntimeError, ValueError, FituneError) as error:
        return f"cannot be compared: {error}"
    finally:
        graph.train(was_training)
    cap = float(getattr(graph.config.get_text_config(), "final_logit_softcapping", None) or 0.0)
    ratio = float((logits * products).sum() / products.square().sum().clamp(min=1e-30))
    distances = {
        form: float((form.apply(products) - logits).norm() / logits.norm().clamp(min=1e-30))
        for form in (LogitForm(), LogitForm(scale=ratio), LogitForm(cap=cap))
    }
    best = min(distances, key=lambda form: distances[form])
    # A scaled or bent product is rounded once more than ours is.
    if not distances[best] <= (TOLERANCE if best == LogitForm() else max(TOLERANCE, torch.finfo(model.dtype).eps)):
        return f"the model does more than a linear head (differs by {distances[best]:.1e})"
    model.logit_form = best
    return None
