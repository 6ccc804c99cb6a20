"""The ancestor's command line, `apppot-start`."""
