"""How many units each family keeps: ladders of scores, and limits on what is left."""
