"""The image repository: a static web folder that `publish` writes and `pull` reads."""
