"""Linear layers of many experts with 4-bit weights, for tokens sorted by expert."""
