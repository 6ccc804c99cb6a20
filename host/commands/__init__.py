"""The subcommands of `apppot`, one module each; `cli` imports only the one that is asked for."""
