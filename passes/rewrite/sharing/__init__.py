"""Rewrites that store parameters once for several layers."""
