"""Linear layers with 8-bit weights and activations, integers or floats."""
