"""Chat templates that leave a conversation's last answer open.

GLM-4 ends an answer with the token that opens what comes next, `<|user|>`, and names it among those on which
generation stops (generation_config.json); its template writes no such token where nothing comes next. A model
trained on that would not learn to stop.
"""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

_QUESTION, _ANSWER = "fituneQuestion3", "fituneAnswer8"
_END = (
    "{{% if not add_generation_prompt and messages and messages[-1]['role'] == 'assistant' %}}"
    "{{{{ '{token}' }}}}{{% endif %}}"
)


def end_last_answer(tokenizer: PreTrainedTokenizerBase, stop_ids: Iterable[int]) -> str | None:
    """Has the tokenizer's chat template write the token that ends an answer after the last one too.

    Only where it writes no added token there, and before the user's next turn one of `stop_ids`, which is taken.
    Returns that token; None where the template stays as it is.
    """
    template = tokenizer.chat_template
    if not isinstance(template, str):
        return None
    last = _after_answer(tokenizer, template, [])
    inner = _after_answer(tokenizer, template, [_turn("user", _QUESTION)])
    if last is None or inner is None or not inner.startswith(last):
        return None
    if any(token.content in last for token in tokenizer.added_tokens_decoder.values()):
        return None
    stops = [str(token) for token in tokenizer.convert_ids_to_tokens(list(stop_ids)) if token]
    token = next((each for each in stops if inner.startswith(last + each)), None)
    if token is None or "'" in token or "\\" in token:
        return None
    # Jinja drops a line feed at the end of a template, and would write it before what is added.
    ended = template.removesuffix("\n") + _END.format(token=token)
    if _after_answer(tokenizer, ended, []) != last + token:
        return None
    tokenizer.chat_template = ended
    return token


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _after_answer(tokenizer: PreTrainedTokenizerBase, template: str, later: list[dict[str, str]]) -> str | None:
    """What a template writes after an answer that `later` turns follow; None where it refuses."""
    turns = [_turn("user", _QUESTION), _turn("assistant", _ANSWER), *later]
    try:
        text = tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False)
    except Exception:  # a template may raise anything; who encodes with it is told
        return None
    return text.rpartition(_ANSWER)[2] if isinstance(text, str) and _ANSWER in text else None
