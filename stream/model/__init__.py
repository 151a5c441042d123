"""Event encoder, recurrent cell, memory of the row, heads and parameter sets.

All of them are functions of (row, event), shared by worker, trainer and replay, so that streaming and batch
processing are the same code.
"""
