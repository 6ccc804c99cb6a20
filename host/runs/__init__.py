"""The life of one run, from a wish to its end, and its record."""
