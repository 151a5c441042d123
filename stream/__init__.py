"""What a serving worker runs, and what worker and trainer share."""
