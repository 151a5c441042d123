"""How good predictions are on real streams with delayed feedback: `python -m tests.bench.quality --stream loan`."""
