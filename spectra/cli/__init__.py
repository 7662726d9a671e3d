"""The `spectra` command."""
