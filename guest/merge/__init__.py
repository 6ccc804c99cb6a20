"""Layers: base image, changes and scratch become one root."""
