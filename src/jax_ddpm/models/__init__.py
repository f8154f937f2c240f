"""Networks: they know nothing of processes, losses or files."""
