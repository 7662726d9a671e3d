"""Spectra inside other people's training loops. Each module imports its framework; none is loaded before it is used."""
