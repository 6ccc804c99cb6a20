"""How a process is held that runs a guest, or helps to."""
