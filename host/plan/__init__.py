"""Deciding: from a request and what was found out to a launch plan.  Opens and starts nothing."""
