"""Rewrites of mixture-of-experts layers: merging experts, leaving experts out."""
