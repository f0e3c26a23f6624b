"""Things with options as text: their grammar, their typed options, and making them from it."""
