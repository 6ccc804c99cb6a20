"""Hypervisors behind one Protocol, one file each."""
