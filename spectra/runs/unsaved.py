"""A run that is kept in memory alone, for a probe without a folder: it can be drawn as any other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spectra.backend.errors import InputError
from spectra.estimates.density import SpectralDensity
from spectra.runs.folder import Run
from spectra.runs.jsonlines import plain
from spectra.runs.record import SpectrumRecord


class UnsavedRun(Run):
    """Records with their densities, and settings.

    Args:
        config: The settings.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.folder = Path("in memory")  # what messages and legends call it
        self._config = plain(dict(config))
        self._kept: list[tuple[SpectrumRecord, SpectralDensity | None]] = []

    @property
    def config(self) -> dict[str, Any]:
        """The settings."""
        return dict(self._config)

    @property
    def records(self) -> list[SpectrumRecord]:
        """Every record so far."""
        return [record for record, _ in self._kept]

    @property
    def telemetry(self) -> list[dict[str, Any]]:
        """None: telemetry is logged to a folder."""
        return []

    @property
    def runs(self) -> list[Run]:
        """None: this is no study."""
        return []

    def append(self, record: SpectrumRecord, density: SpectralDensity | None = None) -> SpectrumRecord:
        """Keep a record and its density.

        Args:
            record: The record.
            density: Its density.

        Returns:
            The record.
        """
        self._kept.append((record, density))
        return record

    def append_telemetry(self, fields: Mapping[str, Any]) -> None:
        """Refused.

        Args:
            fields: A line of telemetry.

        Raises:
            InputError: Always.
        """
        raise InputError("telemetry is written to a run folder, and this run has none: give the probe out=")

    def keeps_density(self, record: SpectrumRecord) -> bool:
        """Whether the density of a record was kept."""
        return any(kept is record and density is not None for kept, density in self._kept)

    def density(self, record: SpectrumRecord) -> SpectralDensity:
        """The spectral density of a record.

        Args:
            record: A record of this run, the very object.

        Returns:
            The density.

        Raises:
            InputError: If it is no record of this run, or one without a spectrum.
        """
        for kept, density in self._kept:
            if kept is record and density is not None:
                return density
        raise InputError(f"no density of a record of step {record.step} was kept: give a measured record of this run")

    def close(self) -> None:
        """Nothing is open."""
