"""Images from what other tools made."""
