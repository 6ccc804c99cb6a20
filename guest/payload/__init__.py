"""Finding the job and running it."""
