"""Other projects' weights."""
