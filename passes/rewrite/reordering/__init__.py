"""Chains of linear maps, associated as is cheapest."""
