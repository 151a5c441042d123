"""How good the predictions of each task were, from a trainer's record file: as figures and as pictures."""
