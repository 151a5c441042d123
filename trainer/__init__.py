"""The online trainer: joins delayed feedback with what was known at the time, learns, publishes
parameters."""
