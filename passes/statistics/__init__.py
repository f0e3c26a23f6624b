"""Statistics of calibration data, streamed: moments of values, and of gradients.

Everything here reads batches one at a time and keeps sums; nothing of the data stays.
"""

from torchlathe.passes.statistics.accumulators import (
    Accumulator,
    Counts,
    Reservoir,
    Samples,
    Total,
)
from torchlathe.passes.statistics.calibration import Calibration
from torchlathe.passes.statistics.collecting import collect, collect_moments
from torchlathe.passes.statistics.gradients import (
    GradientMoments,
    Gradients,
    collect_gradients,
    stream_gradients,
)
from torchlathe.passes.statistics.layers import LayerMoments, collect_layers
from torchlathe.passes.statistics.moments import Moments
from torchlathe.passes.statistics.readers import Reader, patches, readers_of
from torchlathe.passes.statistics.stepping import LockstepRun
from torchlathe.passes.statistics.streaming import Stream
from torchlathe.passes.statistics.watching import Watch

__all__ = [
    "Accumulator",
    "Calibration",
    "Counts",
    "GradientMoments",
    "Gradients",
    "LayerMoments",
    "LockstepRun",
    "Moments",
    "Reader",
    "Reservoir",
    "Samples",
    "Stream",
    "Total",
    "Watch",
    "collect",
    "collect_gradients",
    "collect_layers",
    "collect_moments",
    "patches",
    "readers_of",
    "stream_gradients",
]
