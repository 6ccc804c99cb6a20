"""The scenario suite: what every hypervisor must do alike, and proof of which one did it.

Standard library only: it also runs where there is nothing but Python and the launcher.
"""
