"""`python -m qat`: the same as `qat`."""

from qat.cli import main

raise SystemExit(main())
