"""What `fitune models show` and `list` print: a model's dimensions, the settings published for it, the presets."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from math import prod
from typing import TYPE_CHECKING, Any

from fitune.cli.output import gigabytes, print_facts, print_table
from fitune.config.recommended import METHODS, Recommendation, recommendations

if TYPE_CHECKING:
    from fitune.models.source import ModelSource


def model_facts(model: str, source: ModelSource) -> dict[str, Any]:
    """All that is shown of a model, for JSON. Raises InputError for a model whose tokenizer cannot be used."""
    from fitune.models.dimensions import dimensions
    from fitune.models.presets import PresetSource, family_of

    warnings = source.warnings()
    names = source.tensor_names()
    found = dimensions(source.config)
    facts: dict[str, Any] = {
        "model": model,
        "kind": source.kind,
        **asdict(found),
        "parameters": sum(prod(source.shape(name)) for name in names),
        "dtype": ", ".join(sorted({str(source.dtype(name)).removeprefix("torch.") for name in names})),
        "note": source.note,
        "warnings": warnings,
    }
    if isinstance(source, PresetSource):
        preset = source.preset
        facts |= {
            "has_chat_template": None, "files": [], "bytes": None, "family": preset.family, "hub": list(preset.hub),
            "published_parameters": preset.published, "published_is_rounded": preset.is_rounded,
            "source": preset.source,
        }  # fmt: skip
    else:
        files = source.files()
        facts |= {
            "has_chat_template": bool(source.tokenizer().chat_template), "files": files,
            "bytes": sum(path.stat().st_size for path in files), "family": family_of(source.config, model),
        }  # fmt: skip
    facts["recommended"] = [asdict_of(row) for row in recommendations(facts["family"], found.parameters)]
    return facts


def asdict_of(row: Recommendation) -> dict[str, Any]:
    """A recommendation for JSON."""
    return {"method": row.method, "settings": row.settings, "source": row.source, "note": row.note}


def print_model(facts: Mapping[str, Any]) -> None:
    """The page of one model."""
    heads = f"{facts['heads']} heads of {facts['head_dim']}, {facts['kv_heads']} of keys and values"
    nf4 = f"{gigabytes(facts['bytes_nf4'])} in NF4" if facts["bytes_nf4"] else f"no NF4: {facts['why_no_nf4']}"
    tied = "the head is the embedding" if facts["is_tied"] else "a head of its own"
    lines = {
        "architecture": f"{facts['architecture']}, {facts['layers']} layers, hidden size {facts['hidden_size']:,}",
        "feed-forward": _count(facts["feed_forward"]),
        "experts": _experts(facts) if facts["experts"] else "",
        "attention": heads if facts["heads"] else "",
        "parameters": f"{facts['parameters']:,} ({facts['dtype']}), {tied}",
        "weights": f"{gigabytes(facts['bytes_16bit'])} in 16 bits, {nf4}",
        "vocabulary": f"{facts['vocabulary']:,} tokens",
        "context": f"{facts['context_tokens']:,} tokens" if facts["context_tokens"] else "without a fixed bound",
        "chat template": {
            True: "its own",
            False: "none; the default one is used",
            None: "not known before the tokenizer is there; chat and instruct models bring one",
        }[facts["has_chat_template"]],
    }
    if facts["kind"] == "preset":
        about = "about " if facts["published_is_rounded"] else ""
        lines["published"] = f"{about}{facts['published_parameters']:,} parameters, {facts['source']}"
        lines["on the hub"] = ", ".join(facts["hub"])
    else:
        lines["lies in"] = str(facts["files"][0].parent)
    lines["note"] = facts["note"] or ""
    print_facts(f"{facts['model']} ({facts['kind']})", {name: value for name, value in lines.items() if value})
    print("\nRecommended settings, published elsewhere; what they do not name stays at fitune's default:")
    for method in METHODS:
        _print_method(method, [row for row in facts["recommended"] if row["method"] == method])


def as_overrides(settings: Mapping[str, Any]) -> list[str]:
    """Settings as they are written after `fitune train run.yaml`: `lora.targets=[q_proj,v_proj]`."""
    return [f"{name}={_word(value)}" for name, value in settings.items()]


def preset_rows() -> list[dict[str, Any]]:
    """Every preset in short, for JSON."""
    from fitune.models.preset_table import PRESETS

    return [
        {"name": preset.name, "family": preset.family, "architecture": preset.config["model_type"],
         "parameters": preset.published - preset.beyond, "is_rounded": preset.is_rounded,
         "context_tokens": preset.config["max_position_embeddings"], "hub": list(preset.hub),
         "source": preset.source}
        for preset in PRESETS
    ]  # fmt: skip


def print_presets(rows: Iterable[Mapping[str, Any]]) -> None:
    """The table of presets."""
    print_table(
        ("preset", "architecture", "parameters", "16 bits", "context", "on the hub"),
        [
            (row["name"], row["architecture"], f"{'about ' if row['is_rounded'] else ''}{row['parameters']:,}",
             gigabytes(2 * row["parameters"]), f"{row['context_tokens']:,}", row["hub"][0])
            for row in rows
        ],
    )  # fmt: skip
    print("\nA preset has dimensions, no weights: `fitune plan NAME`, `fitune models show NAME`.")


def _print_method(method: str, rows: list[dict[str, Any]]) -> None:
    if not rows:
        print(f"  {method:<6} nothing that we know of")
    for row in rows:
        print(textwrap.fill(
            " ".join(as_overrides(row["settings"])), 110, initial_indent=f"  {method:<6} ",
            subsequent_indent=" " * 9, break_long_words=False, break_on_hyphens=False,
        ))  # fmt: skip
        print(f"         {row['note']}\n         {row['source']}")


def _experts(facts: Mapping[str, Any]) -> str:
    each = f", {facts['experts_per_token']} for each token" if facts["experts_per_token"] else ""
    inner = f", feed-forward {facts['expert_feed_forward']:,}" if facts["expert_feed_forward"] else ""
    return f"{facts['experts']}{each}{inner}"


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _word(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"[{','.join(map(_word, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)
