"""Pretraining of pico: see ``__main__`` for the command, ``plan`` for what decides the result."""
