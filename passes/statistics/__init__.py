"""Statistics of calibration data, streamed: moments of values, and of gradients.

Everything here reads batches one at a time and keeps sums; nothing of the data stays.
"""

from torchlathe.passes.statistics.activations import Watch, collect_moments
from torchlathe.passes.statistics.gradients import (
    GradientMoments,
    Gradients,
    collect_gradients,
    stream_gradients,
)
from torchlathe.passes.statistics.moments import Moments
from torchlathe.passes.statistics.readers import Reader, patches, readers_of
from torchlathe.passes.statistics.stepping import LockstepRun

__all__ = [
    "GradientMoments",
    "Gradients",
    "LockstepRun",
    "Moments",
    "Reader",
    "Watch",
    "collect_gradients",
    "collect_moments",
    "patches",
    "readers_of",
    "stream_gradients",
]
