"""Layers as tensor trains and as sums of Kronecker products, and adapters made of these."""
