"""`python -m qrlora.cli`."""

from qrlora.cli import main

raise SystemExit(main())
