"""The online trainer: joins feedback with what was known at the time, learns, publishes parameters."""
