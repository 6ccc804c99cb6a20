"""What is asked of a run, by whom, and within which allocation."""
