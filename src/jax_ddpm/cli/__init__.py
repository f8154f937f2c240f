"""The command line: flags, their parsing, one function for each mode."""
