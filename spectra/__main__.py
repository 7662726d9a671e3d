"""`python -m spectra`: the same as `spectra`."""

from spectra.cli.main import main

raise SystemExit(main())
