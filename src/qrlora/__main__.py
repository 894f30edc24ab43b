"""`python -m qrlora`."""

from qrlora.apps.cli import main

raise SystemExit(main())
