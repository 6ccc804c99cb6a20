"""Images for other machines and tools."""
