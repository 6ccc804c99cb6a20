"""Hypervisors behind one Protocol, one file each; `choice` knows them all."""
