"""Training: recipe.py says what to do, dataset.py prepares the pictures, loop.py does it, checkpoint.py keeps it.

Submodules are imported where they are used: a recipe can be read without loading torch.
"""
