"""What this machine can do: facts, checks on them, a trial boot."""
