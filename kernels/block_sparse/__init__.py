"""Linear layers whose weights are blocks, most of which are zero and not stored."""
