"""The machine and the job: devices, processes, signals, files."""
