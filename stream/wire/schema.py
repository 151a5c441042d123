"""What the settings say about events, compiled once into columns.

Guarantees: a field's column depends on the order of the settings alone; number fields of every modality share
`max_numbers` columns and category fields share `max_categories`, each modality counting from 0. Text fields
have no column: they are validated and kept out of the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from stream.settings import Field, Settings

__all__ = ["FieldSchema", "ModalitySchema", "Schema"]


@dataclass(frozen=True, slots=True)
class FieldSchema:
    """One field: its column (-1 for text) and the bounds its values must keep.

    `minimum` and `maximum` are inclusive and infinite where the settings give none; `max_bytes` bounds the
    UTF-8 of a category, of a text, or of each of at most `max_items` items.
    """

    name: str
    type: Literal["category", "number", "text", "items"]
    column: int
    required: bool
    max_bytes: int
    minimum: float
    maximum: float
    max_items: int


@dataclass(frozen=True, slots=True)
class ModalitySchema:
    """One kind of event; `number_fields`, `category_fields` and `item_fields` map a field's name to its column."""

    name: str
    index: int
    fields: Mapping[str, FieldSchema]
    number_fields: Mapping[str, int]
    category_fields: Mapping[str, int]
    item_fields: Mapping[str, int]
    text_fields: tuple[str, ...]
    required: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Schema:
    """All modalities, in the order of the settings; `by_name` finds one."""

    modalities: tuple[ModalitySchema, ...]
    modality_names: tuple[str, ...]
    by_name: Mapping[str, ModalitySchema]
    max_numbers: int
    max_categories: int
    max_item_fields: int

    @classmethod
    def compile(cls, settings: Settings) -> Schema:
        """The schema that `settings` describe."""
        modalities = tuple(
            _modality(index, name, modality.fields)
            for index, (name, modality) in enumerate(settings.modalities.items())
        )
        return cls(
            modalities=modalities,
            modality_names=tuple(modality.name for modality in modalities),
            by_name=MappingProxyType({modality.name: modality for modality in modalities}),
            max_numbers=max((len(modality.number_fields) for modality in modalities), default=0),
            max_categories=max((len(modality.category_fields) for modality in modalities), default=0),
            max_item_fields=max((len(modality.item_fields) for modality in modalities), default=0),
        )


def _modality(index: int, name: str, declared: Mapping[str, Field]) -> ModalitySchema:
    columns: dict[str, dict[str, int]] = {"number": {}, "category": {}, "items": {}, "text": {}}
    fields: dict[str, FieldSchema] = {}
    for field_name, field in declared.items():
        taken = columns[field.type]
        taken[field_name] = len(taken)
        fields[field_name] = FieldSchema(
            name=field_name,
            type=field.type,
            column=-1 if field.type == "text" else taken[field_name],
            required=field.required,
            max_bytes=field.max_bytes,
            minimum=-math.inf if field.min is None else field.min,
            maximum=math.inf if field.max is None else field.max,
            max_items=field.max_items,
        )
    return ModalitySchema(
        name=name,
        index=index,
        fields=MappingProxyType(fields),
        number_fields=MappingProxyType(columns["number"]),
        category_fields=MappingProxyType(columns["category"]),
        item_fields=MappingProxyType(columns["items"]),
        text_fields=tuple(columns["text"]),
        required=tuple(key for key, field in fields.items() if field.required),
    )
