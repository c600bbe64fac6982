"""Whether a tokenizer belongs to a model: every token that a text can become must have a row in the embedding."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, rows: int) -> tuple[list[str], list[str]]:
    """The tokenizer and the number of the embedding's rows -> problems, warnings; one sentence each.

    Fewer tokens than rows is usual (embeddings are padded). More is a problem where ordinary text, a special token
    in use or the chat template needs them; what remains (Gemma 3 1B has a token for pictures) is a warning.
    """
    beyond = {token: number for token, number in tokenizer.get_vocab().items() if number >= rows}
    if not beyond:
        return [], []
    added = tokenizer.get_added_vocab()
    ordinary = [token for token in beyond if token not in added]
    if ordinary:
        return [f"the tokenizer does not match the embedding: {_listed(ordinary, beyond)} {_advice(rows)}"], []
    needed = [token for token in beyond if token in {getattr(tokenizer, role, None) for role in _ROLES}]
    templates = tokenizer.chat_template
    template = "\n".join(templates.values()) if isinstance(templates, dict) else str(templates or "")
    needed += [token for token in beyond if token not in needed and token in template]
    if needed:
        return [
            f"tokens were added to the tokenizer, not to the model: {_listed(needed, beyond)} {_advice(rows)}"
        ], []
    return [], [
        f"{_listed(list(beyond), beyond)} without a row in the embedding ({rows} rows); text that holds one of them "
        "cannot be trained on or answered"
    ]


def _listed(tokens: list[str], numbers: dict[str, int]) -> str:
    first = sorted(tokens, key=lambda token: numbers[token])[:3]
    more = f" and {len(tokens) - 3} more" if len(tokens) > 3 else ""
    return ", ".join(f"{token!r} (id {numbers[token]})" for token in first) + more


def _advice(rows: int) -> str:
    return (
        f"beyond its {rows} rows; take the tokenizer from the model's own folder, or give the model more rows "
        "(transformers: model.resize_token_embeddings) and save it again"
    )
