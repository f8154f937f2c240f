"""The folder of a run: what it is, and its checkpoints."""
