"""What the host allows."""
