"""What a measurement leaves on disk: a record a checkpoint, in a run folder that only ever grows."""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spectra.backend.errors import InputError
from spectra.runs.record import SpectrumRecord, read_number
from spectra.runs.jsonlines import JsonLines, plain

if TYPE_CHECKING:
    from spectra.estimates.density import SpectralDensity

CONFIG, RECORDS, TELEMETRY, LANCZOS = "config.json", "records.jsonl", "telemetry.jsonl", "lanczos"






class Run:
    """A run folder: config.json, records.jsonl, telemetry.jsonl, and lanczos/ with one file a record.

    Records and telemetry are appended, each on the disk before the call returns, and never rewritten.
    A folder of such folders (a study) opens too; its runs are in `runs`.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Open a run for reading and appending. Raises InputError if there is none in the folder."""
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
        """Make a run folder that holds its config. Raises InputError if the folder holds a run already."""
        folder = check_free(folder)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            (folder / RECORDS).open("x").close()  # of two that start at once, one gets the folder
        except FileExistsError:
            raise _taken(folder) from None
        text = json.dumps(plain(dict(config or {})), indent=2, allow_nan=False, ensure_ascii=False)
        _replace(folder / CONFIG, text.encode() + b"\n")
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
    def records(self) -> list[SpectrumRecord]:
        """Every record so far, in the order of writing. Cheap to ask again: only new lines are read."""
        lines = self._records.read()
        self._read = self._read[: len(lines)]
        for fields in lines[len(self._read) :]:
            try:
                self._read.append(SpectrumRecord.from_dict(fields))
            except InputError as error:
                raise InputError(f"{self._records.path}, record {len(self._read) + 1}: {error}") from None
        return list(self._read)

    def append(self, record: SpectrumRecord, density: SpectralDensity | None = None) -> SpectrumRecord:
        """Add a record, and the Jacobi matrices of its density; the record as written is returned.

        The matrices are written first, so that a record that can be read never points to a file that is not there.
        """
        if density is not None:
            mode = "".join(letter if letter.isalnum() else "-" for letter in record.mode)
            name = f"{LANCZOS}/{self._next_number():06d}-step-{record.step}-{mode}.safetensors"
            (self.folder / LANCZOS).mkdir(exist_ok=True)
            _replace(self.folder / name, _safetensors(density.to_arrays()))
            record = replace(record, lanczos=name)
        self._records.append(record.to_dict())
        return record

    def density(self, record: SpectrumRecord) -> SpectralDensity:
        """The spectral density of a record of this run. Raises InputError if its matrices were not kept."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        from spectra.estimates.density import SpectralDensity

        if record.lanczos is None:
            raise InputError(f"the record of step {record.step} in {self.folder} was written without Lanczos matrices")
        path = self.folder / record.lanczos
        try:
            return SpectralDensity.from_arrays(load_file(path))
        except (FileNotFoundError, SafetensorError, KeyError) as error:
            reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
            raise InputError(f"{path} {reason}: measure step {record.step} again, or restore the file") from None

    @property
    def telemetry(self) -> list[dict[str, Any]]:
        """What was logged along the way, in order. A number that was not finite reads as NaN."""
        return [{key: read_number(value) for key, value in fields.items()} for fields in self._telemetry.read()]

    def append_telemetry(self, fields: Mapping[str, Any]) -> None:
        """Add a line of telemetry, for example {"step": 10, "loss": 2.5}."""
        self._telemetry.append(dict(fields))

    @property
    def runs(self) -> list[Run]:
        """The runs one level down, by name: those of a study. Empty for a single run."""
        folders = [records.parent for records in self.folder.glob(f"*/{RECORDS}")]
        return [Run(folder) for folder in sorted(folders, key=_by_name)]

    def _next_number(self) -> int:
        """One more than the last file's, so that a file whose record a crash kept from being written stays."""
        starts = [path.name[:6] for path in (self.folder / LANCZOS).glob("*-step-*")]
        return max((int(start) for start in starts if start.isdigit()), default=-1) + 1


def check_free(folder: str | os.PathLike[str]) -> Path:
    """The folder, if a run can be made in it. Raises InputError if it holds one, or is a file."""
    folder = Path(folder)
    if any((folder / name).exists() for name in (CONFIG, RECORDS)):
        raise _taken(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"expected a folder to write the run to, but {folder} is a file: choose another --out")
    return folder


def _taken(folder: Path) -> InputError:
    return InputError(f"{folder} already holds a run: choose another --out, or delete that folder first")


def open_run(run: Run | str | os.PathLike[str]) -> Run:
    """The run itself, or the one in a folder. Raises InputError if there is none."""
    return run if isinstance(run, Run) else Run(run)


def _by_name(folder: Path) -> tuple[float, str]:
    """Names that start with a number first, in its order: 1bit, 1.58bit, 2bit, 16bit, full-precision."""
    number = re.match(r"\d+(\.\d+)?", folder.name)
    return float(number[0]) if number else math.inf, folder.name


def _safetensors(arrays: Mapping[str, Any]) -> bytes:
    from safetensors.numpy import save

    return save({name: np.array(array, order="C") for name, array in arrays.items()})


def _replace(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


