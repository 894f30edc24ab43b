"""The published claims (arXiv 2507.04599) as measurements, as `qrlora lab claims`."""
