"""What networks are told besides x_t and t, a file each."""
