"""The logical form of quantised tensors: stored numbers, and the ops that give them meaning."""
