"""Refitting what reads erased units, from calibration statistics."""
