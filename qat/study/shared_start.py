"""The spectrum at step 0, measured once for all runs that start from the same quantized model."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from spectra.runs.folder import Run
from spectra.runs.probe import SpectrumProbe

FOLDER, STATE = ".starts", "probe.safetensors"


class SharedStart:
    """Where runs of one bit-width leave their first records for each other, until the study is finished.

    A run that takes them has the records and matrices of the one that measured, bit for bit, and its probe carries on
    the same.

    Args:
        study: The study's folder.
        bits: The bit-width.
    """

    def __init__(self, study: Path, bits: float) -> None:
        self.folder = study / FOLDER / f"{bits:g}bit"

    def take(self, probe: SpectrumProbe) -> bool:
        """Add the records to the run of a probe, if they are there.

        Args:
            probe: A probe with a run folder in which nothing is recorded.

        Returns:
            Whether they were there.
        """
        if not self.folder.is_dir():
            return False
        assert probe.run is not None
        source = Run(self.folder)
        probe.load_state(self.folder / STATE)
        for record in source.records:
            probe.run.append(replace(record, lanczos=None), source.density(record))
        return True

    def give(self, probe: SpectrumProbe) -> None:
        """Leave the records of a probe's run for others, whole or not at all.

        Args:
            probe: A probe that has measured the start and nothing else.
        """
        run = probe.run
        assert run is not None
        self.folder.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.folder.parent, ignore_cleanup_errors=True) as work:
            made = Path(work) / "start"
            with Run.create(made) as copy:
                for record in run.records:
                    copy.append(replace(record, lanczos=None), run.density(record))
            probe.save_state(made / STATE)
            with contextlib.suppress(OSError):  # another run was faster
                made.rename(self.folder)


def remove_starts(study: Path) -> None:
    """Remove what the runs of a study have left for each other."""
    shutil.rmtree(study / FOLDER, ignore_errors=True)
