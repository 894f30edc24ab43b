"""How pico is trained: see ``__main__`` for the command, ``plan`` for what decides the result."""
