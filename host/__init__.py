"""The launcher: plan, start, stream, return."""
