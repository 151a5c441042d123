"""The rows of heads' tables that no confirmed version has."""

from __future__ import annotations

from collections.abc import Mapping

from stream.model.parameters import ParameterSet
from trainer.guards import Guards
from trainer.learner import TaskLearner
from trainer.publisher import TableRows
from trainer.tables import CategoryTable

__all__ = ["TouchedRows"]


class TouchedRows:
    """Follows the tables of the learners, by task, but those that a guard holds back."""

    def __init__(self, learners: Mapping[str, TaskLearner], guards: Guards) -> None:
        self._learners = learners
        self._guards = guards
        self._ticks: dict[str, int] = {}

    def __bool__(self) -> bool:
        return any(table.has_touched for table in self._tables())

    def offer(self) -> dict[str, TableRows]:
        """By table, the rows that changed since the last confirmed version, if they may be published."""
        found = {}
        for table in self._tables():
            rows, self._ticks[table.name] = table.touched()
            found[table.name] = TableRows(table.width, rows)
        for name, width in self._guards.held_tables():
            found[name] = TableRows(width, {})
        return found

    def confirm(self) -> None:
        """The rows that were offered last are in a confirmed version."""
        ticks, self._ticks = self._ticks, {}
        for learner in self._learners.values():
            for table in learner.tables:
                if table.name in ticks:
                    table.confirm(ticks[table.name])

    def compare(self, published: ParameterSet | None) -> None:
        """Take rows that differ from the published ones for changed."""
        for learner in self._learners.values():
            for table in learner.tables:
                table.compare(published.tables.get(table.name) if published is not None else None)

    def _tables(self) -> list[CategoryTable]:
        held = self._guards.held
        return [table for task, learner in self._learners.items() if task not in held for table in learner.tables]
