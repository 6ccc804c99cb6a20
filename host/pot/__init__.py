"""Building and keeping the pot: kernel and runtime."""
