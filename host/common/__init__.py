"""No business of AppPot's own: what any program needs."""
