"""`python -m spectra.cli`: the same as `spectra`."""

from spectra.cli.main import main

raise SystemExit(main())
