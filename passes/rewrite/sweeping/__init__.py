"""The column sweep under quantising and sparsifying, and the patterns of zeros in it."""
