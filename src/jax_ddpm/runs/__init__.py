"""The folder of a run: its identity and its checkpoints."""
