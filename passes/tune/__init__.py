"""Passes that train: sparse optimizers, healing, distillation."""
