"""Starting processes: the only forks of the host's side, with `hypervisor/xenguard`."""
