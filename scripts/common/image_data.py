"""Real images with class labels, without a download page, an account or root.

Fashion-MNIST (70,000 images of 28 x 28 in ten classes) from the Debian package `dataset-fashion-mnist`:
where it is installed, else unpacked once into a cache folder. Elsewhere scikit-learn's digits (1,797 images of
8 x 8).
"""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["ImageData", "load_images"]

PACKAGE = "dataset-fashion-mnist"
FOLDER = Path("usr/share/datasets/fashion-mnist")


@dataclass(frozen=True)
class ImageData:
    """Images as uint8 [n, height, width] and labels as int64 [n], and the name of what was loaded."""

    name: str
    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.int64]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.int64]


def load_images(download_timeout_s: float = 120.0) -> ImageData:
    """Fashion-MNIST where it can be had within the deadline, else scikit-learn's digits.

    Raises:
        ImportError: neither Fashion-MNIST nor scikit-learn is there.
    """
    unpacked = cache_folder() / PACKAGE / FOLDER
    for folder in (Path("/") / FOLDER, unpacked):
        if folder.is_dir():
            return _fashion_mnist(folder)
    try:
        _unpack_package(download_timeout_s)
        return _fashion_mnist(unpacked)
    except (OSError, subprocess.SubprocessError) as reason:
        message = f"Fashion-MNIST cannot be had here ({_one_line(reason)}): using scikit-learn's digits"
        print(message, file=sys.stderr)
        return _digits()


def cache_folder() -> Path:
    """Folder for downloads and builds of this project."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rehearsal_plugin"


def _unpack_package(timeout_s: float) -> None:
    """Download and unpack the Debian package; its folder appears only when it is whole."""
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_folder(), prefix=f".{PACKAGE}-") as work:
        _run(["apt-get", "-q", "download", PACKAGE], work, timeout_s)
        archive = next(Path(work).glob("*.deb"))
        _run(["dpkg", "-x", archive.name, "whole"], work, timeout_s)
        _fashion_mnist(Path(work, "whole") / FOLDER)
        try:
            Path(work, "whole").rename(cache_folder() / PACKAGE)
        except OSError:
            if not (cache_folder() / PACKAGE).is_dir():  # else another process was faster with the same files
                raise


def _run(command: list[str], folder: str, timeout_s: float) -> None:
    subprocess.run(command, cwd=folder, timeout=timeout_s, check=True, capture_output=True, text=True)


def _fashion_mnist(folder: Path) -> ImageData:
    return ImageData(
        "Fashion-MNIST",
        _idx(folder / "train-images-idx3-ubyte.gz"),
        _idx(folder / "train-labels-idx1-ubyte.gz").astype(np.int64),
        _idx(folder / "t10k-images-idx3-ubyte.gz"),
        _idx(folder / "t10k-labels-idx1-ubyte.gz").astype(np.int64),
    )


def _idx(path: Path) -> NDArray[np.uint8]:
    """An IDX file of bytes: the fourth byte counts the dimensions, big-endian int32 each; then the data."""
    content = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(content, ">i4", count=content[3], offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(shape)


def _digits() -> ImageData:
    try:
        from sklearn.datasets import load_digits
    except ImportError as missing:
        raise ImportError("no images to train on: pip install scikit-learn, and run this again") from missing
    images, labels = load_digits(return_X_y=True)
    pixels = (images.reshape(-1, 8, 8) * 15).astype(np.uint8)  # 0..16 as stored, 0..240 as bytes
    classes = labels.astype(np.int64)
    held_out = np.arange(len(classes)) % 5 == 0
    return ImageData("digits", pixels[~held_out], classes[~held_out], pixels[held_out], classes[held_out])


def _one_line(reason: BaseException) -> str:
    message = (getattr(reason, "stderr", None) or str(reason)).strip()
    return message.splitlines()[-1] if message else type(reason).__name__
