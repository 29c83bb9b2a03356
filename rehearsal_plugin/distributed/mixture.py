"""The share of each partition in what is replayed, which may change while the job runs.

A rank that is given other weights says so in its next header, by a digest. They take effect on all ranks at the same
exchange: the first whose headers show that every rank has the same ones. So a change needs no message of its own, and
no rank draws by another plan than its peers.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from rehearsal_plugin.config import SamplingConfig
from rehearsal_plugin.config.source import parse_yaml
from rehearsal_plugin.core.arrays import Float64Array, IntArray
from rehearsal_plugin.errors import ConfigError

__all__ = ["Mixture", "Weights"]

LOG = logging.getLogger(__name__)

Weights = Mapping[str, float]
"""A weight by partition key, as JSON has it."""


class Mixture:
    """Weights in force, and those that are to follow.

    Args:
        config: The section `rehearsal.sampling`.
    """

    def __init__(self, config: SamplingConfig) -> None:
        self._weights: Weights | None = None if isinstance(config.weights, str) else config.weights
        self._proposed: Weights | None = self._weights
        self._follows = config.weights == "forgetting"  # partitions that nobody knows of yet get a mean share
        self._file = None if config.weights_file is None else Path(config.weights_file)
        self._file_stamp: tuple[int, int] | None = None  # when the file was written last, and its size
        self._keys: IntArray | None = None  # those that `_columns` are the weights of
        self._columns = np.empty(0)

    def propose(self, weights: Mapping[Any, float]) -> None:
        """Take other weights as soon as all ranks have them.

        Raises:
            ConfigError: They are no weights.
        """
        checked = SamplingConfig.model_validate({"weights": dict(weights)}).weights
        assert not isinstance(checked, str)
        self._proposed = checked

    def follow(self, weights: Weights | None) -> None:
        """Take the weights that follow from the losses as soon as all ranks have them; None for none yet."""
        if weights is not None:
            self._proposed = weights

    def read_file(self) -> None:
        """Propose what the file says, if it says something new; what cannot be used is logged once."""
        if self._file is None:
            return
        try:
            status = self._file.stat()
            stamp = status.st_mtime_ns, status.st_size
            if stamp == self._file_stamp:
                return
            self._file_stamp = stamp
            weights = parse_yaml(self._file.read_text(encoding="utf-8"))
            if not isinstance(weights, dict):
                raise ConfigError(f"it holds {weights!r} and no weights by partition key")
            self.propose(weights)
        except FileNotFoundError:
            return  # it may come later
        except (OSError, ValueError, yaml.YAMLError) as error:
            LOG.warning("rehearsal.sampling.weights_file %s cannot be used: %s; the weights stay", self._file, error)

    @property
    def proposed(self) -> Weights | None:
        """The weights that this rank tells the others to have."""
        return self._proposed

    @staticmethod
    def digest(weights: Weights | None) -> int:
        """A number for a header that no other weights have."""
        if weights is None:
            return 0
        text = json.dumps(sorted(weights.items()))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1

    def agree(self, digests: IntArray, proposed: Weights | None) -> bool:
        """Put weights into force, if every rank proposes the same ones.

        Args:
            digests: `[ranks]` int64, the word `MIXTURE` of the headers of an exchange.
            proposed: The weights whose digest this rank's header had.

        Returns:
            Whether other weights are in force now.
        """
        if proposed == self._weights or (digests != digests[0]).any():
            return False
        LOG.log(
            logging.DEBUG if self._follows else logging.INFO, "rehearsal: the mixture is %s from this step on", proposed
        )
        self._weights, self._keys = proposed, None
        return True

    @property
    def in_force(self) -> Weights | None:
        """The weights that rows are drawn by."""
        return self._weights

    def weights(self, keys: IntArray) -> Float64Array | None:
        """The weights in force of partitions with `keys` `[n]`, `[n]` float64; None where all count alike."""
        if self._weights is None:
            return None
        if keys is not self._keys:  # a table makes a new array of keys when it grows
            self._keys = keys
            others = sum(self._weights.values()) / len(self._weights) if self._follows else 0.0
            self._columns = np.array([self._weights.get(str(key), others) for key in keys.tolist()], dtype=np.float64)
        return self._columns

    def state_dict(self) -> dict[str, Any]:
        """The weights in force, and those that are to follow."""
        return {
            "weights": None if self._weights is None else dict(self._weights),
            "proposed": None if self._proposed is None else dict(self._proposed),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self._weights, self._proposed = state["weights"], state["proposed"]
        self._keys = None
