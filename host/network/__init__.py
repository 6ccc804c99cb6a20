"""The way out of a guest, and what guards it."""
