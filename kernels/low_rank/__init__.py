"""Linear layers that are the product of two narrow ones."""
