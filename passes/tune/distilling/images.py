"""Losses between images: weighed by frequency, and structural similarity at several scales."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from torchlathe.ir import InputError, OptionError

__all__ = ["SpectrumMatching", "StructuralSimilarity"]

_SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


@dataclass(frozen=True)
class SpectrumMatching:
    """Squared differences of spectra, each frequency weighed by how little the teacher has of it.

    ``mean over f of w_f |F(student) - F(teacher)|^2`` with F the unitary transform over the last
    two axes and ``w_f`` proportional to ``|F(teacher)|^-exponent``, of mean 1 for each image. With
    exponent 0 it is the mean squared error (Parseval). Weights get no gradient.

    Source: the frequency-aware distillation of Spectral Diffusion (arXiv 2211.17106); exponents
    are a reconstruction.

    Attributes:
        exponent: 0 for none; 1 gives faint frequencies, mostly high ones, as much say as strong.
        floor: Least power of a frequency, relative to the mean, so that weights stay finite.
    """

    exponent: float = 1.0
    floor: float = 1e-3

    def __post_init__(self) -> None:
        """Refuse what makes no sense.

        Raises:
            OptionError: A negative exponent, or a floor that is not positive.
        """
        if self.exponent < 0:
            raise OptionError(f"exponent is {self.exponent}, but must not be negative")
        if not self.floor > 0:
            raise OptionError(f"floor is {self.floor}, but must be positive")

    def __call__(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """The loss.

        Args:
            student: (..., height, width).
            teacher: In the same shape.

        Returns:
            A scalar.
        """
        teacher = teacher.detach()
        difference = torch.fft.fft2(student - teacher, norm="ortho").abs().square()
        power = torch.fft.fft2(teacher, norm="ortho").abs().square()
        mean = power.mean((-2, -1), keepdim=True)
        level = power / mean.clamp_min(torch.finfo(power.dtype).tiny) + self.floor
        weight = level ** (-self.exponent / 2)
        weight = weight / weight.mean((-2, -1), keepdim=True)
        found: torch.Tensor = (weight * difference).mean()
        return found


@dataclass(frozen=True)
class StructuralSimilarity:
    """One minus the structural similarity at several scales (MS-SSIM).

    Luminance is compared at the coarsest scale, contrast and structure at each, in Gaussian windows
    of 11 x 11 with a deviation of 1.5; images are halved by averaging in between. Negative
    structure, whose power would not be real, counts as none.

    Source: Wang, Simoncelli and Bovik 2003, with their weights of five scales; of fewer scales the
    first weights, divided by their sum.

    Attributes:
        data_range: The difference of the largest and least value that images can have.
        scales: How many; images have to be at least ``11 * 2^(scales - 1)`` high and wide. None for
            as many of the five as fit: all from 176 x 176 on, two of 32 x 32.
    """

    data_range: float = 1.0
    scales: int | None = None

    def __post_init__(self) -> None:
        """Refuse what makes no sense.

        Raises:
            OptionError: A range that is not positive, or scales that there are no weights for.
        """
        if not self.data_range > 0:
            raise OptionError(f"data_range is {self.data_range}, but must be positive")
        if self.scales is not None and not 1 <= self.scales <= len(_SCALES):
            raise OptionError(f"scales is {self.scales}, but must be from 1 to {len(_SCALES)}")

    def __call__(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """The loss: 0 for equal images.

        Args:
            student: (batch, channels, height, width).
            teacher: In the same shape.

        Returns:
            A scalar.

        Raises:
            InputError: Images that are too small for so many scales.
        """
        return 1 - self.similarity(student, teacher.detach()).mean()

    def similarity(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """MS-SSIM of each channel of each image, (batch, channels); at most 1."""
        scales = self._scales(a.shape[-2], a.shape[-1])
        weights = torch.tensor(_SCALES[:scales], dtype=a.dtype, device=a.device)
        weights = weights / weights.sum()
        found = a.new_ones(a.shape[:2])
        for index, weight in enumerate(weights):
            luminance, structure = self._compare(a, b)
            found = found * structure.clamp_min(1e-6) ** weight
            if index == scales - 1:
                found = found * luminance.clamp_min(1e-6) ** weight
            else:
                a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
        return found

    def _scales(self, height: int, width: int) -> int:
        fit = min(len(_SCALES), (min(height, width) // 11).bit_length())
        scales = self.scales or max(1, fit)
        if scales > fit:
            least = 11 * 2 ** (scales - 1)
            raise InputError(
                f"scales={scales} needs images of at least {least} x {least}, got "
                f"{height} x {width}",
                hint=f"scales={fit}, or as many as fit by default" if fit else "another loss",
            )
        return scales

    def _compare(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Luminance, and contrast times structure; means over windows, (batch, channels)."""
        first, second = (0.01 * self.data_range) ** 2, (0.03 * self.data_range) ** 2
        places = torch.arange(11, dtype=a.dtype, device=a.device) - 5
        line = torch.exp(-places.square() / (2 * 1.5**2))
        line = line / line.sum()
        channels = a.shape[1]
        window = (line[:, None] * line[None]).expand(channels, 1, 11, 11)

        def blur(x: torch.Tensor) -> torch.Tensor:
            return F.conv2d(x, window, groups=channels)

        mean_a, mean_b = blur(a), blur(b)
        var_a = blur(a * a) - mean_a.square()
        var_b = blur(b * b) - mean_b.square()
        both = blur(a * b) - mean_a * mean_b
        structure = (2 * both + second) / (var_a + var_b + second)
        luminance = (2 * mean_a * mean_b + first) / (mean_a.square() + mean_b.square() + first)
        return luminance.mean((-2, -1)), structure.mean((-2, -1))
