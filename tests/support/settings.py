"""A small settings file that uses every kind of memory, for tests."""

from __future__ import annotations

from pathlib import Path

from stream.settings import Settings, parse

SETTINGS = """
[modalities.pay.fields]
amount = { type = "number", min = -1_000_000, max = 1_000_000 }
merchant = { type = "category", embedding = 4, values = ["bakery", "fuel"], max_bytes = 32 }
note = { type = "text", required = false, max_bytes = 200 }
channel = { type = "category", required = false, embedding = 2 }

[modalities.offer.fields]
product = { type = "category", embedding = 3, values = ["loan", "card"] }
rate = { type = "number", required = false }
channels = { type = "items", required = false, max_items = 8 }

[model]
hidden = 16

[tasks.accepted]
on = "offer"
inputs = ["product", "rate"]
candidates = { channels = ["large_channels", "channel_counts"] }
standardise_after = 20

[[memory]]
name = "payments"
modality = "pay"
kind = "count"

[[memory]]
name = "spend_1h"
modality = "pay"
kind = "sum"
field = "amount"
half_life_s = 3600

[[memory]]
name = "spend_by_merchant"
modality = "pay"
kind = "sum"
field = "amount"
by = "merchant"
half_life_s = 60

[[memory]]
name = "sessions"
modality = "pay"
kind = "visits"
gap_s = 30
half_life_s = 3600

[[memory]]
name = "large"
modality = "pay"
kind = "count"
where = { field = "amount", above = 50 }

[[memory]]
name = "refunds"
modality = "pay"
kind = "count"
half_life_s = 60
where = { field = "amount", below = 0 }

[[memory]]
name = "last_fuel"
modality = "pay"
kind = "last_time"
where = { field = "merchant", equals = "fuel" }

[[memory]]
name = "last_by_product"
modality = "offer"
kind = "last_time"
by = "product"

[[memory]]
name = "first_by_merchant"
modality = "pay"
kind = "first_time"
by = "merchant"

[[memory]]
name = "last_amounts"
modality = "pay"
kind = "last"
field = "amount"
size = 3

[[memory]]
name = "last_products"
modality = "offer"
kind = "last"
field = "product"
size = 2

[[memory]]
name = "large_channels"
modality = "pay"
kind = "ring"
field = "channel"
size = 4
where = { field = "amount", above = 50 }

[[memory]]
name = "channel_counts"
modality = "pay"
kind = "tally"
field = "channel"
dimensions = 6
half_life_s = 3600

[[memory]]
name = "most_channels"
modality = "pay"
kind = "top"
field = "channel"
size = 2
half_life_s = 3600

[[memory]]
name = "refund_share"
modality = "pay"
kind = "count"
half_life_s = 3600
where = { field = "amount", below = 0 }
per = "sessions"

[[memory]]
name = "merchants"
modality = "pay"
kind = "sketch"
field = "merchant"
dimensions = 8
half_life_s = 3600

[[memory]]
name = "channels"
modality = "pay"
kind = "sketch"
field = "channel"
dimensions = 5
"""


def small_settings(extra: str = "", **environment: str) -> Settings:
    """The settings above, followed by `extra` TOML, under `LIVESTATE_…` variables given without the prefix."""
    return parse(SETTINGS + extra, {f"LIVESTATE_{name}": value for name, value in environment.items()})


def write_settings(path: Path, extra: str = "") -> Path:
    """Write the settings above, followed by `extra` TOML, to a file."""
    path.write_text(SETTINGS + extra)
    return path
