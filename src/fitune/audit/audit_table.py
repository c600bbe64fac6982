"""The audit's rows as the page docs/models.md, and the comparison of two audits."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

PARTS = ("linear", "mlp", "norm", "attention", "head")
_HEADING = (
    "| model type | result | packs | quantised | linear | mlp | norm | attention | head | why not, or what is left |"
)


def audit_page(rows: Sequence[Mapping[str, Any]], versions: str) -> str:
    """Rows (as `AuditRow.as_dict` gives them) -> Markdown."""
    passed = sum(bool(row["passed"]) for row in rows)
    lines = [
        "# Models",
        "",
        "Written by `fitune models --audit --write docs/models.md`; do not edit.",
        "",
        f"Of the {len(rows)} model types that transformers maps to a causal language model, **{passed} pass**.",
        f"Checked with {versions}.",
        "",
        "Of every type a tiny random model, with every feature of its default configuration switched on, is taken "
        "through the whole road: read from a checkpoint, quantised, adapted, fused, trained, saved, loaded by PEFT, "
        "asked. It passes where",
        "",
        "- log-probabilities and all LoRA gradients equal those of transformers + PEFT in float32 (1e-4 relative), "
        "and in bfloat16 lie at most twice as far from float32 as transformers' own;",
        "- the same holds with the weights in NF4, against the decoded weights, and a step trains;",
        "- two documents in a row compute what they compute alone, or packing is refused (column *packs*);",
        "- at its default sizes 90 % of the weights outside embeddings and head are quantised (column *quantised*);",
        "- adapters go to PEFT and come from it; generation with a cache gives the tokens of full passes.",
        "",
        "Where a remark says that transformers itself does not compute a type in bfloat16, that comparison was not "
        "made; where it says that the default configuration cannot be built, *quantised* is of the tiny model.",
        "",
        "The columns *linear* to *head* say which parts run fused, and how many of each in the tiny model. "
        "What is not fused runs as transformers has it.",
        "",
        _HEADING,
        "|" + "---|" * (_HEADING.count("|") - 1),
    ]
    return "\n".join([*lines, *map(_line, rows)]) + "\n"


def _line(row: Mapping[str, Any]) -> str:
    if row["reason"] is not None:
        result, packs, share = "not audited" if not row["architecture"] else "fails", "", ""
    else:
        result = "passes" if row["passed"] else "**fails**"
        packs = "yes" if row["packs"] else "no"
        share = f"{100 * row['quantised_share']:.0f} %" if row["quantised_share"] is not None else ""
    remarks = [row["reason"], *row["failures"], *row["notes"]]
    remarks += [f"{part}: {reason}" for part, reason in _grouped(row["left"]).items()]
    counts = [str(row["replaced"].get(part, "") or "") for part in PARTS]
    said = "; ".join(str(remark) for remark in remarks if remark).replace("|", "\\|").replace("\n", " ")
    return f"| {row['model_type']} | {result} | {packs} | {share} | {' | '.join(counts)} | {said} |"


def _grouped(left: Mapping[str, str]) -> dict[str, str]:
    """Parts of one kind in different layers once."""
    found: dict[str, str] = {}
    for part, reason in left.items():
        found.setdefault(re.sub(r"\.\d+\.", ".*.", part), reason)
    return found


def read_results(page: str) -> dict[str, tuple[str, ...]]:
    """A page's rows: model type -> result, packs, quantised and the five counts."""
    lines = [line for line in page.splitlines() if line.startswith("| ") and line != _HEADING]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return {row[0]: tuple(row[1:9]) for row in cells}


def worse(before: Mapping[str, tuple[str, ...]], now: Mapping[str, tuple[str, ...]]) -> list[str]:
    """What got worse between two audits, for the types that are in both: one sentence each."""
    found = []
    for name, new in now.items():
        old = before.get(name)
        if old is None:
            continue
        if old[0] == "passes" and new[0] != "passes":
            found.append(f"{name}: passed, and now: {new[0]}")
        if old[1] == "yes" and new[1] == "no":
            found.append(f"{name}: could be packed, and cannot now")
        for part, count, count_now in zip(PARTS, old[3:], new[3:], strict=True):
            if int(count or 0) > int(count_now or 0):
                found.append(f"{name}: {count} of {part} were fused, and now {count_now or 0}")
    return found
