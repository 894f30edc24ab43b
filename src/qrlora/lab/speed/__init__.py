"""Times and memory beside the alternatives, as `qrlora lab speed`."""
