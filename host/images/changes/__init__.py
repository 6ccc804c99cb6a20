"""Changes files: made, read, joined."""
