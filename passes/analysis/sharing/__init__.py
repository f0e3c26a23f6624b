"""Which layers can share parameters: costs of merging them, and colourings of least cost."""
