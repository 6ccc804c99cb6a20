"""Warm start: a machine that has booted to just before GO is kept, later runs resume from it."""
