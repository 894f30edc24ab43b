"""Train one adapter from a recipe.

recipe.py       Recipe: the validated description of a run
sources.py      find pictures, captions and masks in files and folders
dataset.py      check the pictures, and encode them with their captions
prepare.py      load the base model, encode the data, drop what training does not need
attach.py       put a fresh adapter on the denoiser
batches.py      examples, noise and timesteps of every step
loop.py         train: the steps, and the adapter that comes of them
checkpoint.py   write and read the state of a run; outputs.py: which files belong to it
monitor.py      sample sheets, trackers, selection of a step
plan.py         memory and operations of a run, from a rehearsal

Submodules are imported where they are used: a recipe can be read without loading torch.
"""
