"""Linear layers with 8-bit weights of many experts, and 16-bit activations."""
