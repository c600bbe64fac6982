"""What the tools of `published_memory` did otherwise than fitune would: data, with the reasons in words.

Each amount follows from settings that the sources name, from a tool's defaults and from its code; none is fitted to a
published figure.
"""

from __future__ import annotations

from dataclasses import dataclass

from published_memory import Published

# Names of the plan's items.
FROZEN, TRAINED, GRADIENTS, STATES = "frozen weights", "trained weights", "gradients", "optimizer states"
SAVED, WORKSPACES, DECODED = "saved activations", "workspaces, logits", "decoded NF4 weight"
HOLES, CONTEXT = "allocator's holes", "CUDA context, cuBLAS"


@dataclass(frozen=True)
class Difference:
    """One thing done otherwise, and what it makes of the plan's bytes.

    Attributes:
        times: the plan's items that are larger or smaller by a factor.
        per_trained_weight: bytes for each weight that learns.
        per_vocabulary_weight: bytes for each weight of the embedding and of the head.
        per_logit: bytes of each logit (token x vocabulary) at the time of the loss, when only saved activations live
            beside them: they stand in the place of the plan's workspaces where they are more.
        per_layer_input: bytes for each number that enters a layer (token x width x layers).
        per_feed_forward: bytes for each number of a layer's feed-forward part (token x its width x layers).
        constant: bytes.
    """

    name: str
    reason: str
    times: tuple[tuple[str, float], ...] = ()
    per_trained_weight: float = 0.0
    per_vocabulary_weight: float = 0.0
    per_logit: float = 0.0
    per_layer_input: float = 0.0
    per_feed_forward: float = 0.0
    constant: int = 0


_FULL = "fitune trains float32 weights"
_SIXTEEN_BITS = Difference(
    "all in 16 bits",
    f"weights, gradients and AdamW's moments are bfloat16, 8 bytes a weight; {_FULL}: 16 bytes",
    times=((TRAINED, 0.5), (GRADIENTS, 0.5), (STATES, 0.5)),
)
_NO_COPIES = Difference(
    "no copies",
    "bfloat16 weights are computed with as they are; without recomputation fitune holds the bfloat16 copies of its "
    "float32 weights until the backward pass, 2 bytes a weight",
    per_trained_weight=-2.0,
)
_IN_BACKWARD = Difference(
    "updated in the backward pass",
    "weights and AdamW's moments are bfloat16, and each weight is updated as soon as its gradient is there, so that "
    f"none stays: 6 bytes a weight; {_FULL}: 16 bytes",
    times=((TRAINED, 0.5), (GRADIENTS, 0.0), (STATES, 0.5)),
)
_EIGHT_BITS_IN_BACKWARD = Difference(
    "updated in the backward pass, 8-bit moments",
    "weights are bfloat16, and each is updated as soon as its gradient is there, so that none stays: with 8-bit "
    f"moments 4 bytes a weight; {_FULL}, with 8-bit moments: 10 bytes",
    times=((TRAINED, 0.5), (GRADIENTS, 0.0)),
)
_PAGED_IN_BACKWARD = Difference(
    "updated in the backward pass, paged moments",
    "weights are bfloat16, each is updated as soon as its gradient is there, so that none stays, and the 8-bit "
    f"moments are paged, outside of torch's count: 2 bytes a weight; {_FULL}, with 8-bit moments: 10 bytes",
    times=((TRAINED, 0.5), (GRADIENTS, 0.0), (STATES, 0.0)),
)
_ALL_UPDATED_AT_ONCE = Difference(
    "all in 16 bits, updated at once",
    "weights, gradients and AdamW's moments have 16 bits, 8 bytes a weight, and the peak is the update, whose "
    "foreach form takes 2 more (https://docs.pytorch.org/docs/stable/generated/torch.optim.AdamW.html), whatever the "
    f"rows; {_FULL}, 16 bytes, and updates one after the other",
    times=((TRAINED, 0.5), (GRADIENTS, 0.0), (STATES, 0.5), (SAVED, 0.0), (WORKSPACES, 0.0)), per_trained_weight=4.0,
)  # fmt: skip
_NARROW_ADAPTER = Difference(
    "adapter in 16 bits",
    "adapters, their gradients and moments are bfloat16; fitune's are float32, as PEFT's",
    times=((TRAINED, 0.5), (GRADIENTS, 0.5), (STATES, 0.5)),
)
_OFFLOADED = Difference(
    "offloaded activations",
    "what the layers start from in recomputation is moved to host memory, 2 bytes a number; fitune keeps it on the "
    "card",
    per_layer_input=-2.0,
)
_CHUNKS = "fitune's loss takes them a chunk at a time"
_WHOLE_LOGITS = Difference(
    "whole logits",
    "transformers holds all logits at once in float32: as they are, shifted by a token, and as log-probabilities, 12 "
    f"bytes a logit; {_CHUNKS}",
    per_logit=12.0,
)
_TORCHTUNE_LOGITS = Difference(
    "whole logits",
    "torchtune's plain loss holds all logits at once: in bfloat16, in float32 and as log-probabilities, 10 bytes a "
    f"logit; {_CHUNKS}",
    per_logit=10.0,
)
_QWEN_LOGITS = Difference(
    "whole logits",
    "Qwen's model holds all logits at once: in bfloat16 as they are and shifted by a token, and under autocast in "
    f"float32 and as log-probabilities, 12 bytes a logit; {_CHUNKS}",
    per_logit=12.0,
)
_WHOLE_HALF_LOGITS = Difference(
    "whole logits in float16",
    "all logits are held at once, in the float16 that DeepSpeed gives the whole model: as they are, shifted by a "
    f"token, as log-probabilities and as gradients, 8 bytes a logit; {_CHUNKS}",
    per_logit=8.0,
)
_KEPT_LOGITS = Difference(
    "logits kept",
    "the head goes by chunks, but its bfloat16 logits are kept until the backward pass, with their log-probabilities "
    "and gradients, 6 bytes a logit; fitune's loss keeps none",
    per_logit=6.0,
)
_BUCKETS = Difference(
    "gradient buckets",
    "DeepSpeed's ZeRO-2 holds two buckets of 200 million float16 gradients (ds_config_zero2.json: "
    "reduce_bucket_size, overlap_comm)",
    constant=2 * 2 * 200_000_000,
)
_FLOAT32_BASE = Difference(
    "float32 base",
    "the frozen weights are float32, as from_pretrained loads them unasked; fitune holds them in 16 bits",
    times=((FROZEN, 2.0),),
)
_WIDENED = Difference(
    "widened to float32",
    "PEFT's prepare_model_for_kbit_training, which TRL calls, makes float32 of all that is not 4-bit: embeddings, "
    "head, and with them what the layers start from, 2 bytes a number more",
    per_vocabulary_weight=2.0, per_layer_input=2.0,
)  # fmt: skip


def _litgpt_layers(what: str, per_width: float, per_feed_forward: float) -> Difference:
    return Difference(
        "litgpt's layers",
        f"litgpt's own layers, unfused, keep for each token {per_width:g} bytes per width ({what}, query, key and "
        "value of every head, attention's output, the adapter's input and its dropout mask) and "
        f"{per_feed_forward:g} per feed-forward number",
        times=((SAVED, 0.0),), per_layer_input=per_width, per_feed_forward=per_feed_forward,
    )  # fmt: skip


def _kept_inputs(per_width: float) -> Difference:
    return Difference(
        "inputs kept",
        f"bitsandbytes of that time keeps the input of every 4-bit product, {per_width:g} bytes per width and 2 per "
        "feed-forward number, though its backward pass does not read them (MatMul4Bit in "
        "https://github.com/TimDettmers/bitsandbytes/blob/29e3420c6de4c62086603aff47107ef378062e91/bitsandbytes/"
        "autograd/_functions.py)",
        per_layer_input=per_width, per_feed_forward=2.0,
    )  # fmt: skip


def differences_of(published: Published) -> tuple[Difference, ...]:
    """What the run of a measurement did otherwise, as far as it moves the figure."""
    full, quantised = published.method == "full", published.method == "qlora"
    match published.source.name:
        case "torchtune" if full:
            return _torchtune_full(published)
        case "torchtune" if published.model == "llama-3.2-3b":
            return _NARROW_ADAPTER, _OFFLOADED
        case "litgpt" | "litgpt configs" if full:
            return _SIXTEEN_BITS, _NO_COPIES, _KEPT_LOGITS
        case "litgpt" | "litgpt configs":
            layers, kept = _litgpt(published)
            return (layers, kept, _KEPT_LOGITS) if quantised else (layers, _KEPT_LOGITS)
        case "Qwen" if quantised:
            return _WHOLE_HALF_LOGITS, _BUCKETS
        case "fms" if full:
            return (_ALL_UPDATED_AT_ONCE,)
        case "PEFT":
            return (_FLOAT32_BASE,)
        case "Hugging Face":
            return _WHOLE_LOGITS, _WIDENED
        case "fms" if published.note:
            return _WHOLE_LOGITS, _WIDENED
        case "Qwen":
            return (_QWEN_LOGITS,)
        case "fms" | "fsdp_qlora" | "PEFT ZeRO-3" | "PEFT FSDP":
            return (_WHOLE_LOGITS,)
        case "Unsloth":
            return (_OFFLOADED,)
    return ()


def _torchtune_full(published: Published) -> tuple[Difference, ...]:
    if published.model != "llama-3.2-3b":
        return (_PAGED_IN_BACKWARD,)
    if published.optimizer == "adamw8bit":
        return _EIGHT_BITS_IN_BACKWARD, _OFFLOADED
    if not published.recompute:
        narrow = (_SIXTEEN_BITS, _NO_COPIES)
        return narrow if published.note == "chunked loss" else (*narrow, _TORCHTUNE_LOGITS)
    if not published.note:
        return (_SIXTEEN_BITS,)
    return (_IN_BACKWARD, _OFFLOADED) if "offloaded" in published.note else (_IN_BACKWARD,)


def _litgpt(published: Published) -> tuple[Difference, Difference]:
    """What its layers keep, and what bitsandbytes' products keep besides."""
    if published.model == "phi-1.5":  # one norm for attention and feed-forward part
        return _litgpt_layers("the norm's input", 13.0, 2.0), _kept_inputs(4.0)
    if published.model == "stablelm-alpha-3b":
        return _litgpt_layers("two norms' inputs", 15.0, 2.0), _kept_inputs(6.0)
    if published.source.name == "litgpt configs":  # its norms widen by then
        return _litgpt_layers("two norms' inputs in float32", 19.0, 6.0), _kept_inputs(6.0)
    return _litgpt_layers("two norms' inputs", 15.0, 6.0), _kept_inputs(6.0)
