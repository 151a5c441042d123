"""One typed settings object, read once from a TOML file and the environment, validated at the edge.

Guarantees: a setting that is unknown, of the wrong type or out of range stops the program with its name, its
value and what would be accepted; references between settings (a memory's field, a task's modality) are checked
too. Every setting can be overridden by an environment variable: the path in capitals, its parts joined by two
underscores, after `LIVESTATE_` (`LIVESTATE_KAFKA__BOOTSTRAP_SERVERS`).

Not guaranteed: that a broker or a directory named here exists; whoever opens them says so.
"""

from stream.settings.loading import ENVIRONMENT_PREFIX, load, parse
from stream.settings.sections import (
    STATE,
    Field,
    Gbdt,
    Kafka,
    Limits,
    Memory,
    Mlp,
    Modality,
    Model,
    Online,
    Pretrain,
    Settings,
    Store,
    Task,
    Topics,
    Trainer,
    Where,
    Worker,
    row_ttls,
)

__all__ = [
    "ENVIRONMENT_PREFIX",
    "STATE",
    "Field",
    "Gbdt",
    "Kafka",
    "Limits",
    "Memory",
    "Mlp",
    "Modality",
    "Model",
    "Online",
    "Pretrain",
    "Settings",
    "Store",
    "Task",
    "Topics",
    "Trainer",
    "Where",
    "Worker",
    "load",
    "parse",
    "row_ttls",
]
