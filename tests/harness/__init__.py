"""What tests are made of: launchers, machines, plans and surroundings to try things in."""
