"""The use from Python: train, load, sample, edit, measure."""
