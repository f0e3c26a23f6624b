"""Linear layers with 4-bit weights in groups and 16-bit activations."""
