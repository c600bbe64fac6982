"""The plan of fine-tuning on GPUs beside memory that others measured and published, with reasons where they differ.

    python benchmarks/plan_published.py [--only SOURCE,...] [--json] [--output FILE.json]

Nothing is trained, and no GPU is needed: every row of `published_memory` is planned as `fitune plan --on CARD` does
it for those settings. What the tool did otherwise (`published_differences`) is then applied to the plan's own items:
that figure says what the measured run should take, and is to be near the measurement.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported

from published_differences import (
    CONTEXT,
    DECODED,
    HOLES,
    SAVED,
    TRAINED,
    WORKSPACES,
    Difference,
    differences_of,
)
from published_memory import SHAPES, Counted, Published, published_rows
from speed_result import Clock, give_result, machine_facts, title, words
from transformers import AutoConfig, PretrainedConfig

from fitune.cli.output import print_table
from fitune.config.schema import RunConfig
from fitune.errors import FituneError, InputError
from fitune.hardware import detect
from fitune.models.presets import find_preset, preset_config
from fitune.plan.elsewhere import ElsewherePlan, plan_for
from fitune.plan.machines import Machine, find_machine
from fitune.plan.planner import Workload
from fitune.train.loop import LEARNING_RATES

COLUMNS = (
    "measurement",
    "card",
    "published GB",
    "planned GB",
    "ratio",
    "done their way GB",
    "ratio",
    "done otherwise",
)
# Of the plan's items: what each card has of its own where weights are spread over several.
UNDIVIDED = (SAVED, WORKSPACES)
# Of the plan's items: what a source leaves out, by what it counted.
UNCOUNTED: Mapping[Counted, tuple[str, ...]] = {"allocated": (HOLES, CONTEXT), "reserved": (CONTEXT,)}
FLOAT32_BYTES = 4
TOLD_SHARE = 0.01  # what a difference moves at least, to be named in the table


@dataclass(frozen=True)
class Row:
    """A measurement, the plan of the same settings, and that plan with what was done otherwise.

    Attributes:
        planned_bytes: what fitune takes of a card, counted as the source counts.
        their_way_bytes: the same with the differences applied.
        differences: the names of those that move the figure by TOLD_SHARE or more.
        items: the plan's, of a card that holds everything.
        problem: why there is no plan.
    """

    case: str
    published_bytes: int
    url: str
    card: str
    planned_bytes: int = 0
    their_way_bytes: int = 0
    differences: tuple[str, ...] = ()
    items: Mapping[str, int] | None = None
    problem: str | None = None

    @property
    def ratio(self) -> float:
        """Of the plan to the measurement."""
        return self.planned_bytes / self.published_bytes

    @property
    def their_way_ratio(self) -> float:
        """Of the plan with what was done otherwise to the measurement."""
        return self.their_way_bytes / self.published_bytes


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; ends with a usage message where they cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    rows = list(published_rows())
    sources = list(dict.fromkeys(row.source.name for row in rows))
    parser.add_argument("--only", type=words, default=[], metavar="A,B", help=f"default: all of {', '.join(sources)}")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--output", type=Path, default=None, metavar="FILE", help="write the JSON object there too")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.only if name not in sources]
    if unknown:
        parser.error(f"--only: no source called {', '.join(unknown)} (there are {', '.join(sources)})")
    options.rows = [row for row in rows if not options.only or row.source.name in options.only]
    return options


def model_config(name: str) -> PretrainedConfig:
    """Of a preset, or of a shape of `published_memory`."""
    if name in SHAPES:
        fields = dict(SHAPES[name])
        return AutoConfig.for_model(fields.pop("model_type"), **fields)
    preset = find_preset(name)
    assert preset is not None, name
    return preset_config(preset)


def machine_of(published: Published) -> Machine:
    """What it ran on; raises InputError for a card that fitune does not know."""
    sized = published.card[0].isdigit()
    return find_machine(None if sized else published.card, published.card if sized else None, published.count)


def run_settings(published: Published) -> RunConfig:
    """The same settings as a run of fitune."""
    adapter = {"rank": published.rank, "targets": published.targets} if published.method != "full" else {}
    train = {
        "micro_batch": published.rows,
        "recompute": "layers" if published.recompute else "none",
        "optimizer": published.optimizer,
    }
    data = {"train": "data.jsonl", "max_tokens": published.row_tokens}
    return RunConfig.model_validate(
        {"model": published.model, "method": published.method, "data": data, "lora": adapter, "train": train}
    )


def planned(published: Published) -> Row:
    """Plans a measurement's settings."""
    row = Row(published.name, published.published_bytes, published.source.url, published.card)
    config = model_config(published.model)
    machine = machine_of(published)
    workload = Workload(0, 0, published.row_tokens, 1.0, published.row_tokens)
    rate = LEARNING_RATES["supervised"][published.method]
    try:
        plan = plan_for(run_settings(published), published.model, config, machine, workload, rate)
    except FituneError as error:
        return Row(row.case, row.published_bytes, row.url, row.card, problem=str(error))
    assert isinstance(plan, ElsewherePlan)
    items = {item.name: int(item.value) for item in plan.memory}
    total = plan.peak_bytes if plan.sharding is None else plan.sharding.peak_bytes
    total -= sum(items[name] for name in UNCOUNTED.get(published.source.counted, ()))
    added = {
        difference.name: added_bytes(difference, items, published, config) for difference in differences_of(published)
    }
    told = tuple(name for name, count in added.items() if abs(count) >= TOLD_SHARE * published.published_bytes)
    theirs = round(total + sum(added.values()))
    return Row(row.case, row.published_bytes, row.url, row.card, total, theirs, told, items)


def added_bytes(
    difference: Difference, items: Mapping[str, int], published: Published, config: PretrainedConfig
) -> float:
    """What a difference adds to the plan's `items` on each card."""
    text = config.get_text_config()
    tokens, width, layers = published.rows * published.row_tokens, text.hidden_size, text.num_hidden_layers
    feed_forward = getattr(text, "intermediate_size", None) or 4 * width
    vocabulary = text.vocab_size * width * (1 if text.tie_word_embeddings else 2)
    logits = difference.per_logit * tokens * text.vocab_size
    times = 0.0
    for name, factor in difference.times:
        share = 1 if name in UNDIVIDED else published.count
        times += (factor - 1) * items.get(name, 0) / share
    return (
        times
        + (max(0.0, logits - items[WORKSPACES] - items.get(DECODED, 0)) if logits else 0.0)
        + difference.per_trained_weight * items[TRAINED] / FLOAT32_BYTES
        + difference.per_vocabulary_weight * vocabulary
        + difference.per_layer_input * tokens * width * layers
        + difference.per_feed_forward * tokens * feed_forward * layers
        + difference.constant
    )


def explanations(rows: Iterable[Published]) -> dict[str, list[str]]:
    """Name of a difference -> its reasons, in the order in which they come up."""
    found: dict[str, list[str]] = {}
    for row in rows:
        for difference in differences_of(row):
            reasons = found.setdefault(difference.name, [])
            if difference.reason not in reasons:
                reasons.append(difference.reason)
    return found


def row_cells(row: Row) -> list[str]:
    """A row of the table."""
    published = f"{row.published_bytes / 1e9:.1f}"
    if row.problem is not None:
        return [row.case, row.card, published, *["-"] * 4, row.problem.replace("\n", " ")]
    return [
        row.case, row.card, published, f"{row.planned_bytes / 1e9:.1f}", f"{row.ratio:.2f}",
        f"{row.their_way_bytes / 1e9:.1f}", f"{row.their_way_ratio:.2f}", "; ".join(row.differences),
    ]  # fmt: skip


def main() -> int:
    options = parse()
    hardware = detect(with_accelerators=False)
    clock = Clock()
    facts = machine_facts(hardware, hardware.threads)
    rows = []
    for published in options.rows:
        rows.append(planned(published))
        clock.say("  ".join(row_cells(rows[-1])))
    reasons = explanations(options.rows)
    sources = [asdict(source) for source in dict.fromkeys(row.source for row in options.rows)]
    give_result([asdict(row) for row in rows], facts, clock, options, reasons=reasons, sources=sources)
    if not options.json:
        print(title(facts))
        print_table(COLUMNS, [row_cells(row) for row in rows])
        for name, texts in reasons.items():
            print(f"\n{name}: {'; or '.join(texts)}.")
    return 1 if any(row.problem for row in rows) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(f"error: {error}")
