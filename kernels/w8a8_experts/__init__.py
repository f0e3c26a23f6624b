"""Linear layers with 8-bit weights of many experts, and 8-bit activations."""
