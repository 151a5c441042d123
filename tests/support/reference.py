"""The README's tables of commands, settings and metrics, made from the code.

`python -m tests.support.reference` writes them.
"""

from __future__ import annotations

import argparse
import inspect
import re
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import msgspec
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric

from stream import settings
from stream.cli import new_parser
from stream.metrics import ProcessMetrics, TrainerMetrics, WorkerMetrics

README = Path(__file__).resolve().parents[2] / "README.md"


def settings_table() -> str:
    """One row for each setting: name, what is accepted, default, meaning."""
    lines = ["| setting | accepted | default | meaning |", "|---|---|---|---|"]
    sections: list[tuple[str, type[msgspec.Struct]]] = [
        ("kafka.", settings.Kafka),
        ("topics.", settings.Topics),
        ("limits.", settings.Limits),
        ("modalities.NAME.", settings.Modality),
        ("modalities.NAME.fields.FIELD.", settings.Field),
        ("memory[].", settings.Memory),
        ("memory[].where.", settings.Where),
        ("model.", settings.Model),
        ("model.online.", settings.Online),
        ("tasks.NAME.", settings.Task),
        ("tasks.NAME.mlp.", settings.Mlp),
        ("tasks.NAME.gbdt.", settings.Gbdt),
        ("store.", settings.Store),
        ("worker.", settings.Worker),
        ("trainer.", settings.Trainer),
        ("pretrain.", settings.Pretrain),
    ]
    for prefix, section in sections:
        notes = _notes(section)
        hints = get_type_hints(section, include_extras=True)
        for field in msgspec.structs.fields(section):
            kind = hints[field.name]
            held = get_args(kind)[1] if get_origin(kind) is dict else kind
            if isinstance(held, type) and issubclass(held, msgspec.Struct):
                # A section of its own.
                continue
            default = "required" if field.required else _default(field)
            lines.append(f"| `{prefix}{field.name}` | {_accepted(kind)} | {default} | {notes.get(field.name, '')} |")
    return "\n".join(lines)


def metrics_table() -> str:
    """One row for each metric of Livestate's own: name, type, labels, meaning."""
    lines = ["| metric | of | type | labels | meaning |", "|---|---|---|---|---|"]
    for of, kind in (("worker", WorkerMetrics), ("trainer", TrainerMetrics)):
        made = kind(CollectorRegistry())
        labels = label_names(made)
        for metric in made.registry.collect():
            if metric.name in labels:
                names = ", ".join(f"`{n}`" for n in labels[metric.name])
                lines.append(f"| `{_exposed(metric)}` | {of} | {metric.type} | {names} | {metric.documentation} |")
    return "\n".join(lines)


def commands_table() -> str:
    """One row for each command: name, what it does, an example."""
    lines = ["| command | what it does | example |", "|---|---|---|"]
    (commands,) = [one for one in new_parser()._actions if isinstance(one, argparse._SubParsersAction)]
    helps = {one.dest: one.help for one in commands._choices_actions}
    for name, parser in commands.choices.items():
        example = (parser.epilog or "").removeprefix("example: ")
        lines.append(f"| `{name}` | {helps[name]} | `{example}` |")
    return "\n".join(lines)


def label_names(metrics: ProcessMetrics) -> dict[str, tuple[str, ...]]:
    """Labels of each metric of Livestate's own, by its name without a suffix."""
    found: dict[str, tuple[str, ...]] = {}
    for collector in metrics.registry._collector_to_names:
        if hasattr(collector, "_labelnames"):
            found[collector._name] = collector._labelnames
        elif hasattr(collector, "describe"):
            found |= {family.name: tuple(family._labelnames) for family in collector.describe()}
    return found


def _exposed(metric: Metric) -> str:
    return metric.name + ("_total" if metric.type == "counter" else "")


def _notes(section: type[msgspec.Struct]) -> dict[str, str]:
    """The `#:` comments above each setting."""
    notes: dict[str, str] = {}
    comment: list[str] = []
    for line in inspect.getsource(section).splitlines():
        text = line.strip()
        if text.startswith("#:"):
            comment.append(text[2:].strip())
        elif found := re.match(r"(\w+): ", text):
            if comment:
                notes[found[1]] = " ".join(comment)
            comment = []
    return notes


def _default(field: msgspec.structs.FieldInfo) -> str:
    if field.default_factory is not msgspec.NODEFAULT:
        return "none"
    value = field.default
    if value is None:
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return (
        f'`"{value}"`'
        if isinstance(value, str)
        else f"`{value:_}`"
        if isinstance(value, int)
        else f"`{value:,.0f}`".replace(",", "_")
        if value >= 1e5
        else f"`{value:g}`"
    )


def _accepted(kind: Any) -> str:
    if get_origin(kind) is Annotated:
        base, meta = get_args(kind)[0], get_args(kind)[1]
        bounds = [
            f"{symbol} {value:_}" if isinstance(value, int) else f"{symbol} {value:g}"
            for symbol, value in (("≥", meta.ge), (">", meta.gt), ("≤", meta.le), ("<", meta.lt))
            if value is not None
        ]
        return " ".join([_accepted(base), *bounds])
    if get_origin(kind) is dict:
        return f"table of {_accepted(get_args(kind)[1])}"
    if get_origin(kind) is list:
        return f"list of {_accepted(get_args(kind)[0])}"
    if get_args(kind) and all(isinstance(a, str) for a in get_args(kind)):
        return ", ".join(f"`{a}`" for a in get_args(kind))
    if get_args(kind):
        return " or ".join(_accepted(a) for a in get_args(kind) if a is not type(None))
    names = {str: "text", int: "integer", float: "number", bool: "`true`, `false`", settings.Where: "table"}
    return names.get(kind, getattr(kind, "__name__", str(kind)))


def rewritten(readme: str) -> str:
    """The README with its tables as the code has them."""
    for name, table in (
        ("commands", commands_table()),
        ("settings", settings_table()),
        ("metrics", metrics_table()),
    ):
        readme = re.sub(
            rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)",
            lambda found, table=table: found[1] + table + found[2],
            readme,
            flags=re.DOTALL,
        )
    return readme


if __name__ == "__main__":
    README.write_text(rewritten(README.read_text()))
