"""The study behind `qat compare`: methods over bit-widths, with spectra along the way."""
