"""A run folder: the records of a run, the matrices they came from, its settings and its telemetry."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from spectra.backend.errors import InputError, first_line
from spectra.estimates.density import SpectralDensity
from spectra.runs.files import PARTIAL, write_whole
from spectra.runs.jsonlines import JsonLines, encoded, plain
from spectra.runs.lock import WriterLock, is_written_here
from spectra.runs.presentation import Presentation
from spectra.runs.record import VERSION, VERSION_NUMBER, SpectrumRecord, read_number, read_version

if TYPE_CHECKING:
    from pandas import DataFrame

CONFIG, RECORDS, TELEMETRY, LANCZOS = "config.json", "records.jsonl", "telemetry.jsonl", "lanczos"
NOT_COMPARED = ("presentation", "facts", "schedule")  # entries of config.json that may differ when a run goes on
LONGEST_VALUE = 60  # characters of a value in a message


class FolderError(InputError):
    """A run folder that cannot be made, gone on with or written."""


class Run:
    """A run folder: config.json, records.jsonl, telemetry.jsonl, and lanczos/ with one file for each record.

    Records and telemetry are appended, never rewritten. Each is on the disk before the call returns. A folder of run
    folders (a study) opens too; its runs are in `runs`.

    Any number of processes may read. One writes: a run made by `create` or `open_or_create` holds the folder's lock
    until `close`, or until it is dropped or its process ends; a run opened for reading takes the lock with its first
    append. Of several objects in one process the last to take the lock writes.

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
            inside = sorted(path.parent for path in self.folder.glob(f"*/{RECORDS}"))  # as in a Trainer's output folder
            advice = f"give {inside[0]}" if inside else "give one that holds a run"
            raise InputError(f"expected a run folder, but {self.folder} holds no {CONFIG}: {advice}")
        self._records = JsonLines(self.folder / RECORDS)
        self._telemetry = JsonLines(self.folder / TELEMETRY)
        self._read: list[SpectrumRecord] = []
        self._lock: WriterLock | None = None

    @classmethod
    def create(cls, folder: str | os.PathLike[str], config: Mapping[str, Any] | None = None) -> Run:
        """Make a run folder, and hold its lock.

        Args:
            folder: Where; made if it is not there. A run in which nothing was recorded is made anew.
            config: The settings of the run, written to config.json.

        Returns:
            The run, without records.

        Raises:
            InputError: If something is recorded in the folder already, another process writes to it, or it is a file.
        """
        folder = check_free(folder)
        folder.mkdir(parents=True, exist_ok=True)
        lock = WriterLock(folder)
        check_free(folder)  # again, as another process may have been faster
        if not (folder / RECORDS).exists() or (folder / RECORDS).stat().st_size == 0:
            for path in (folder / LANCZOS).glob("*-step-*"):  # of a writer that was killed before its first record
                path.unlink()
        (folder / RECORDS).touch()
        _write_config(folder, config or {})
        return cls._writing(folder, lock)

    @classmethod
    def open_or_create(
        cls,
        folder: str | os.PathLike[str],
        config: Mapping[str, Any] | None = None,
        *,
        not_compared: Collection[str] = (),
        only_compared: Collection[str] | None = None,
    ) -> Run:
        """Go on with the run in a folder, or make one, and hold its lock.

        A run goes on where its config.json says what `config` says. The entries "presentation", "facts" and "schedule"
        may differ, and those in `not_compared`; config.json keeps what it had. `records` then holds what was recorded
        before. Where that is no spectrum, but only why there is none, the run goes on with other settings too, which
        take the place of those that it had.

        Args:
            folder: Where; made if it is not there. A run in which nothing was recorded is made anew.
            config: The settings of the run.
            not_compared: Names of further entries that may differ.
            only_compared: Names of the entries that may not differ, None for all.

        Returns:
            The run.

        Raises:
            InputError: If the folder holds a run with other settings, whose first difference is named; if another
                process writes to it; or if it is a file.
        """
        if not is_recorded(folder):
            return cls.create(folder, config)
        run = cls(folder)
        settings: dict[str, Any] = plain(dict(config or {}))
        if run.records and not run.measured and not run.telemetry and not is_written_here(run.folder):
            lock = WriterLock(run.folder)
            _write_config(run.folder, settings)
            return cls._writing(run.folder, lock)
        names = {*settings, *run.config}
        ignored = set() if only_compared is None else names - set(only_compared)
        refuse_differences(run, settings, {*NOT_COMPARED, *not_compared, *ignored})
        return cls._writing(run.folder, WriterLock(run.folder))

    @classmethod
    def _writing(cls, folder: Path, lock: WriterLock) -> Run:
        """The run with its lock; what a writer that was killed left half-written is removed."""
        for partial in (*folder.glob(f"*{PARTIAL}"), *(folder / LANCZOS).glob(f"*{PARTIAL}")):
            partial.unlink(missing_ok=True)
        run = cls(folder)
        run._lock = lock
        return run

    def close(self) -> None:
        """Let others write. The run can still be read, and appending takes the lock again."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    def _repr_html_(self) -> str:
        """What a notebook shows: the last records, or the runs of a study."""
        from spectra.runs import flat

        return flat.shown(self)

    def to_pandas(self) -> DataFrame:
        """The records as a pandas frame, a row a record; for a study those of all runs.

        The columns are "run" (the folder, for a study), "step", "mode", "block", "label", "status" and "reason"; for
        every quantity q of the spectrum "q", "q_low", "q_high", the ends of its 95 % interval, and "q_resolved"; then
        "loss", "gradient_norm", how it was measured, and the numbers of checks and extras, as in "extras.x". What a
        record does not have is missing, and "q_resolved" is False there.

        Returns:
            The frame.

        Raises:
            MissingExtraError: If pandas is not installed.
        """
        from spectra.runs import flat

        return flat.frame(self)

    @property
    def config(self) -> dict[str, Any]:
        """The settings the run was made with; empty if the folder has none."""
        config = _read_config(self.folder)
        read_version(config, str(self.folder / CONFIG))
        config.pop(VERSION, None)
        return config

    @property
    def version(self) -> int:
        """The version of the schema that the folder was written in."""
        return read_version(_read_config(self.folder), str(self.folder / CONFIG))

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
        self._take_lock()
        if density is not None:
            mode = "".join(letter if letter.isalnum() else "-" for letter in record.mode)
            name = f"{LANCZOS}/{self._next_number():06d}-step-{record.step}-{mode}.safetensors"
            (self.folder / LANCZOS).mkdir(exist_ok=True)
            write_whole(self.folder / name, _safetensors(density.to_arrays()))
            record = replace(record, lanczos=name)
        self._records.append(record.to_dict())
        return record

    @property
    def measured(self) -> list[SpectrumRecord]:
        """The records that hold a spectrum: all but those of failed measurements."""
        return [record for record in self.records if record.is_measured]

    def keeps_density(self, record: SpectrumRecord) -> bool:
        """Whether the density of a record was kept."""
        return record.lanczos is not None

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
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise InputError(f"expected Lanczos matrices inside {self.folder}, but a record names {record.lanczos!r}")
        try:
            arrays = load_file(path)
            arrays.setdefault("seed", np.array([record.seed]))  # older files lack it
            return SpectralDensity.from_arrays(arrays)
        except (OSError, SafetensorError, KeyError, IndexError, TypeError, ValueError) as error:
            reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({first_line(error)})"
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
        self._take_lock()
        self._telemetry.append(dict(fields))

    @property
    def runs(self) -> list[Run]:
        """The runs of a study, by name. Empty for a single run."""
        folders = [records.parent for records in self.folder.glob(f"*/{RECORDS}")]
        return [Run(folder) for folder in sorted(folders, key=_number_and_name)]

    def _take_lock(self) -> None:
        """Take the folder's lock for the first append; raises InputError where another writer has it now."""
        if self._lock is None:
            self._lock = WriterLock(self.folder)
        if not self._lock.is_held:
            raise InputError(f"{self.folder} was opened again and is written there: append to that run, or close it")

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
        InputError: If something is recorded in it already, it holds the config.json of another program, or is a file.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"expected a folder to write the run to, but {folder} is a file: choose another out=")
    if is_recorded(folder):
        raise InputError(f"{folder} already holds a run: choose another out=, or delete that folder first")
    if (folder / CONFIG).exists() and not (folder / RECORDS).exists() and VERSION not in _read_config(folder):
        raise InputError(f"{folder} already holds a {CONFIG}, which is not that of a run: choose another out=")
    return folder


def is_recorded(folder: str | os.PathLike[str]) -> bool:
    """Whether anything was recorded in a folder: a spectrum or a line of telemetry, in it or in a run of a study.

    Args:
        folder: The folder; it may not be there.

    Returns:
        Whether there is a record.
    """
    folder = Path(folder)
    files = [folder / name for name in (RECORDS, TELEMETRY)]
    files += [path for name in (RECORDS, TELEMETRY) for path in folder.glob(f"*/{name}")]
    return any(JsonLines(path, report=False).read() for path in files)


def refuse_differences(run: Run, config: Mapping[str, Any], ignored: Collection[str]) -> None:
    """Raise an InputError that names the first entry in which a run's config.json differs from a new one."""
    there = run.config
    if run.version < VERSION_NUMBER:  # entries that its version did not write
        ignored = {*ignored, *(name for name in config if name not in there)}
    compared = dict.fromkeys(name for name in (*config, *there) if name not in ignored)
    for name in compared:
        difference = first_difference(there.get(name), config.get(name), name)
        if difference is not None:
            where, old, new = difference
            raise InputError(
                f"{run.folder} holds a run with other settings ({where}: {_short(old)} in the folder, {_short(new)} "
                "asked for): choose another out=, or give the same settings to go on with that run"
            )


def first_difference(one: Any, other: Any, name: str) -> tuple[str, Any, Any] | None:
    """Where two entries of a config first differ, with what stands there, or None where they do not.

    Args:
        one: A value as JSON has it.
        other: Another one.
        name: What the entry is called.

    Returns:
        The name, with those of inner entries after dots, and the two values.
    """
    if isinstance(one, dict) and isinstance(other, dict):
        for key in dict.fromkeys((*one, *other)):
            if (found := first_difference(one.get(key), other.get(key), f"{name}.{key}")) is not None:
                return found
        return None
    return None if one == other else (name, one, other)


def _short(value: Any) -> str:
    """A value in a message, "none" for None."""
    text = "none" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = " ".join(text.split())
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 3] + "..."


def _read_config(folder: Path) -> dict[str, Any]:
    """The object in config.json; empty if there is none."""
    path = folder / CONFIG
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"expected JSON in {path}, but it cannot be read ({error}): restore it") from None
    if not isinstance(config, dict):
        raise InputError(f"expected a JSON object in {path}, got {type(config).__name__}: restore it")
    return config


def _write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write config.json, with the version of the schema first."""
    fields = {VERSION: VERSION_NUMBER} | {name: value for name, value in config.items() if name != VERSION}
    write_whole(folder / CONFIG, encoded(fields, indent=2) + b"\n")


@runtime_checkable
class HasRun(Protocol):
    """What has a run, such as a `SpectrumProbe`."""

    def as_run(self) -> Run:
        """The run."""
        ...


def open_run(run: Run | HasRun | str | os.PathLike[str]) -> Run:
    """Open a run.

    Args:
        run: The folder of a run, or a probe; a run is returned as it is.

    Returns:
        The run.

    Raises:
        InputError: If the folder holds none.
    """
    if isinstance(run, HasRun):
        return run.as_run()
    return run if isinstance(run, Run) else Run(run)


def _number_and_name(folder: Path) -> tuple[float, str]:
    """A sort key: names that start with a number come first, in the order of the numbers; the others by name."""
    number = re.match(r"\d+(\.\d+)?", folder.name)
    return float(number[0]) if number else math.inf, folder.name


def _safetensors(arrays: Mapping[str, Any]) -> bytes:
    """The contents of a safetensors file of these arrays."""
    return save({name: np.array(array, order="C") for name, array in arrays.items()})
