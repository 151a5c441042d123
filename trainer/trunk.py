"""The trunk as torch computes it, so that losses can be led back through it.

The same function as `stream.model` serves; the last bits differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["encoded_events", "one_thread"]


def encoded_events(dense: torch.Tensor, codes: torch.Tensor, tables: Sequence[torch.Tensor]) -> torch.Tensor:
    """(b, t, D) what the cell reads of events: dense inputs (b, t, dense), then for each of the codes (b, t, fields)
    its row of the field's table, zeros where it is -1, absent."""
    parts = [dense]
    for field, table in enumerate(tables):
        code = codes[..., field]
        embedded = nn.functional.embedding(code.clamp(min=0), table)
        parts.append(embedded * (code >= 0).unsqueeze(-1))
    return torch.cat(parts, dim=-1)


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums in an order that does not depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
