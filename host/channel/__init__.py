"""Talk with a guest, from its HELLO to its EXIT."""
