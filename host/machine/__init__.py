"""Acting on a launch plan: what is started, in which order, and what is said when it fails."""
