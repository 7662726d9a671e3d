"""A run folder: the records of a run, the matrices they came from, its settings and its telemetry."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from spectra.backend.errors import InputError
from spectra.estimates.density import SpectralDensity
from spectra.runs.jsonlines import JsonLines, plain
from spectra.runs.presentation import Presentation
from spectra.runs.record import SpectrumRecord, read_number

CONFIG, RECORDS, TELEMETRY, LANCZOS = "config.json", "records.jsonl", "telemetry.jsonl", "lanczos"


class Run:
    """A run folder: config.json, records.jsonl, telemetry.jsonl, and lanczos/ with one file for each record.

    Records and telemetry are appended, never rewritten. Each is on the disk before the call returns. A folder of run
    folders (a study) opens too; its runs are in `runs`.

    Args:
        folder: The folder of a run or a study.

    Raises:
        InputError: If the folder holds no run.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise InputError(f"expected a run folder, but there is no folder {self.folder}: check the path")
        if not any((self.folder / name).is_file() for name in (CONFIG, RECORDS)):
            raise InputError(f"expected a run folder, but {self.folder} holds no {CONFIG}: give one that holds a run")
        self._records = JsonLines(self.folder / RECORDS)
        self._telemetry = JsonLines(self.folder / TELEMETRY)
        self._read: list[SpectrumRecord] = []

    @classmethod
    def create(cls, folder: str | os.PathLike[str], config: Mapping[str, Any] | None = None) -> Run:
        """Make a run folder.

        Args:
            folder: Where; made if it is not there.
            config: The settings of the run, written to config.json.

        Returns:
            The run, without records.

        Raises:
            InputError: If the folder holds a run already, or is a file.
        """
        folder = check_free(folder)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            (folder / RECORDS).open("x").close()  # of two processes that start at once, one gets the folder
        except FileExistsError:
            raise _holds_a_run(folder) from None
        text = json.dumps(plain(dict(config or {})), indent=2, allow_nan=False, ensure_ascii=False)
        _write_whole(folder / CONFIG, text.encode() + b"\n")
        return cls(folder)

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    @property
    def config(self) -> dict[str, Any]:
        """The settings the run was made with; empty if the folder has none."""
        path = self.folder / CONFIG
        if not path.is_file():
            return {}
        try:
            config = json.loads(path.read_bytes())
        except ValueError as error:
            raise InputError(f"expected JSON in {path}, but it cannot be read ({error}): restore it") from None
        if not isinstance(config, dict):
            raise InputError(f"expected a JSON object in {path}, got {type(config).__name__}: restore it")
        return config

    @property
    def presentation(self) -> Presentation:
        """How the run is shown: its name, its group, its color, and its modes, quantities and labels in words."""
        return Presentation.of(self)

    @property
    def records(self) -> list[SpectrumRecord]:
        """Every record so far, in the order of writing. Only lines added since the last call are read."""
        lines = self._records.read()
        self._read = self._read[: len(lines)]
        for fields in lines[len(self._read) :]:
            try:
                self._read.append(SpectrumRecord.from_dict(fields))
            except InputError as error:
                raise InputError(f"{self._records.path}, record {len(self._read) + 1}: {error}") from None
        return list(self._read)

    def append(self, record: SpectrumRecord, density: SpectralDensity | None = None) -> SpectrumRecord:
        """Add a record, and the Jacobi matrices of its density.

        The matrices are written first, so that a record never names a file that is not there.

        Args:
            record: The record.
            density: The density that it was read from. None: no matrices are kept.

        Returns:
            The record as written, with the name of the file of its matrices.
        """
        if density is not None:
            mode = "".join(letter if letter.isalnum() else "-" for letter in record.mode)
            name = f"{LANCZOS}/{self._next_number():06d}-step-{record.step}-{mode}.safetensors"
            (self.folder / LANCZOS).mkdir(exist_ok=True)
            _write_whole(self.folder / name, _safetensors(density.to_arrays()))
            record = replace(record, lanczos=name)
        self._records.append(record.to_dict())
        return record

    def density(self, record: SpectrumRecord) -> SpectralDensity:
        """Read the spectral density of a record.

        Args:
            record: A record of this run.

        Returns:
            The density that the record was read from.

        Raises:
            InputError: If its Jacobi matrices were not kept, or their file cannot be read.
        """
        if record.lanczos is None:
            raise InputError(f"the record of step {record.step} in {self.folder} was written without Lanczos matrices")
        path = self.folder / record.lanczos
        try:
            arrays = load_file(path)
            arrays.setdefault("seed", np.array([record.seed]))  # older files lack it
            return SpectralDensity.from_arrays(arrays)
        except (FileNotFoundError, SafetensorError, KeyError) as error:
            reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
            raise InputError(f"{path} {reason}: measure step {record.step} again, or restore the file") from None

    @property
    def telemetry(self) -> list[dict[str, Any]]:
        """The lines logged during the training, in order. A number that was not finite reads as NaN."""
        return [{key: read_number(value) for key, value in fields.items()} for fields in self._telemetry.read()]

    def append_telemetry(self, fields: Mapping[str, Any]) -> None:
        """Add a line of telemetry.

        Args:
            fields: Numbers by name, for example {"step": 10, "loss": 2.5}.
        """
        self._telemetry.append(dict(fields))

    @property
    def runs(self) -> list[Run]:
        """The runs of a study, by name. Empty for a single run."""
        folders = [records.parent for records in self.folder.glob(f"*/{RECORDS}")]
        return [Run(folder) for folder in sorted(folders, key=_number_and_name)]

    def _next_number(self) -> int:
        """One more than the last file's, so that no file is overwritten, not even one whose record was not written."""
        starts = [path.name[:6] for path in (self.folder / LANCZOS).glob("*-step-*")]
        return max((int(start) for start in starts if start.isdigit()), default=-1) + 1


def check_free(folder: str | os.PathLike[str]) -> Path:
    """Check that a run can be made in a folder.

    Args:
        folder: The folder; it may not be there yet.

    Returns:
        The folder as a path.

    Raises:
        InputError: If it holds a run already, or is a file.
    """
    folder = Path(folder)
    if any((folder / name).exists() for name in (CONFIG, RECORDS)):
        raise _holds_a_run(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"expected a folder to write the run to, but {folder} is a file: choose another --out")
    return folder


def _holds_a_run(folder: Path) -> InputError:
    """The error for a folder that holds a run already."""
    return InputError(f"{folder} already holds a run: choose another --out, or delete that folder first")


def open_run(run: Run | str | os.PathLike[str]) -> Run:
    """Open a run.

    Args:
        run: The folder of a run; a run is returned as it is.

    Returns:
        The run.

    Raises:
        InputError: If the folder holds none.
    """
    return run if isinstance(run, Run) else Run(run)


def _number_and_name(folder: Path) -> tuple[float, str]:
    """A sort key: names that start with a number come first, in the order of the numbers; the others by name."""
    number = re.match(r"\d+(\.\d+)?", folder.name)
    return float(number[0]) if number else math.inf, folder.name


def _safetensors(arrays: Mapping[str, Any]) -> bytes:
    """The contents of a safetensors file of these arrays."""
    return save({name: np.array(array, order="C") for name, array in arrays.items()})


def _write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
