"""What images are diffused as, a file each."""
