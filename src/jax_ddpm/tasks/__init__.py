"""What a config trains, a file each."""
