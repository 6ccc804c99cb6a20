"""PID 1: the ordered boot steps, mounts, account, network, shutdown."""
