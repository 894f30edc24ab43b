"""Make a catalog: pictures of every product in every style.

tables.py    products.csv and styles.toml, checked as a whole before anything starts
plan.py      the pictures there are to make, each under a digest of all its inputs
journal.py   finished pictures, in SQLite: one row each, written after the file
worker.py    a base model that trains, samples and scores
engine.py    submit jobs to workers, as many as they have room for; a worker in this process
cluster.py   workers as Ray actors, on this machine or a cluster
gallery.py   pages, an index, and the table as CSV and JSON
governed.py  check cells by a policy and record pictures in a registry, if there are any
run.py       all of it, from the two files to the gallery
"""
