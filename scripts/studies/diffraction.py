"""Diffraction scans of random objects, simulated.

A beam, focused by a lens and let spread again (`defocus`), lights one window of the object after the other. The
detector behind counts photons::

    pattern = sqrt(Poisson(photons * |FFT(object * beam)|^2))

The object lets `amplitude` of the wave through and shifts it by `phase`; both are random textures whose power
spectrum falls as frequency^-exponent. From one pattern both maps are to be found, in the lit middle of the window.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

__all__ = ["CROP", "WINDOW", "Condition", "Samples", "beam", "empty_pattern", "intensities", "scan", "texture"]

WINDOW, CROP = 32, 16
"""Pixels along a side of a pattern, and of its maps."""

PUPIL = 6.0
"""Pixels of the detector from the middle of the empty beam to where its amplitude has fallen to exp(-1/2)."""

STRIDE = 12
"""Pixels from one window of a scan to the next: they overlap by 62 %."""

DARKEST = 0.5
"""Least amplitude; the phase lies between -1 and 1 radian before its mean is taken off."""

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Condition:
    """Conditions of a scan, which drift from task to task.

    Attributes:
        defocus: Radians by which the lens retards the wave at `PUPIL` pixels from the middle.
        photons: Expected photons of a pattern, if the object absorbed none.
        exponent: Of the textures: the larger, the smoother.
    """

    defocus: float = 4.0
    photons: float = 1e4
    exponent: float = 3.0


class Samples(NamedTuple):
    """Patterns `[n, WINDOW, WINDOW]`, and amplitudes and phases in radians `[n, CROP, CROP]`, all float32.

    Nobody can see the phase of a wave as a whole, so that of a sample has a mean of zero.
    """

    diffraction: Array
    amplitude: Array
    phase: Array


def scan(condition: Condition, side: int, rng: np.random.Generator) -> Samples:
    """All windows of a new object, `side` along each of its sides, in a random order."""
    pixels = WINDOW + STRIDE * (side - 1)
    absorbing, shifting = np.tanh(texture(2, pixels, condition.exponent, rng))
    order = rng.permutation(side * side)
    amplitude = _windows(1 - (1 - DARKEST) / 2 * (1 + absorbing))[order]
    phase = _windows(shifting)[order]
    counts = rng.poisson(intensities(amplitude * np.exp(1j * phase), condition))
    lit = _middle(phase)
    return Samples(np.sqrt(counts, dtype=np.float32), _middle(amplitude), lit - lit.mean(axis=(1, 2), keepdims=True))


def intensities(windows: NDArray[np.complex64], condition: Condition) -> Array:
    """Photons that the detector expects, `[n, WINDOW, WINDOW]`, behind windows of an object of the same shape."""
    waves = np.fft.fft2(windows * beam(condition.defocus), norm="ortho")
    return np.asarray(condition.photons * np.abs(np.fft.fftshift(waves, axes=(1, 2))) ** 2, dtype=np.float32)


@lru_cache
def beam(defocus: float) -> NDArray[np.complex64]:
    """The wave that falls on the object, `[WINDOW, WINDOW]`; its intensity sums to 1."""
    squares = (_frequencies(WINDOW) / PUPIL) ** 2
    wave = np.fft.fftshift(np.fft.ifft2(np.exp(-squares / 2 + 1j * defocus * squares)))
    return np.asarray(wave / np.linalg.norm(wave), dtype=np.complex64)


def empty_pattern(photons: float) -> Array:
    """The pattern without an object and without noise, `[WINDOW, WINDOW]`; the defocus does not change it."""
    counts = intensities(np.ones((1, WINDOW, WINDOW), np.complex64), Condition(photons=photons))
    return np.asarray(np.sqrt(counts[0]), dtype=np.float32)


def texture(count: int, pixels: int, exponent: float, rng: np.random.Generator) -> Array:
    """Random fields `[count, pixels, pixels]` of mean 0, expected variance 1 and power frequency^-exponent."""
    frequencies = _frequencies(pixels)
    gains = np.zeros_like(frequencies)
    np.power(frequencies, -exponent / 2, out=gains, where=frequencies > 0)
    gains *= pixels / np.linalg.norm(gains)
    noise = rng.standard_normal((count, pixels, pixels), dtype=np.float32)
    return np.asarray(np.fft.ifft2(np.fft.fft2(noise) * gains).real, dtype=np.float32)


def _frequencies(pixels: int) -> Array:
    """Distance of every Fourier coefficient from the constant one, in cycles a window, as `np.fft.fft2` orders them."""
    along = (np.fft.fftfreq(pixels) * pixels).astype(np.float32)
    return np.hypot(along[:, None], along)


def _windows(image: Array) -> Array:
    """Windows `[n, WINDOW, WINDOW]` of a square image, `STRIDE` pixels apart."""
    return sliding_window_view(image, (WINDOW, WINDOW))[::STRIDE, ::STRIDE].reshape(-1, WINDOW, WINDOW)


def _middle(windows: Array) -> Array:
    margin = (WINDOW - CROP) // 2
    return windows[:, margin:-margin, margin:-margin].copy()
