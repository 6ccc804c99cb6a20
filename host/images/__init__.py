"""The image store, import and build."""
