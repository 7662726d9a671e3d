"""`python -m spectra.cli`."""

from spectra.cli.main import main

raise SystemExit(main())
