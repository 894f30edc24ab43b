"""Make the line: every product in every style.

tables.py    products.csv and styles.toml, checked as a whole before anything starts
plan.py      the pictures there are to make, each under a digest of all its inputs
journal.py   what is finished, in SQLite: one row a picture, written after its file
worker.py    a base model that trains, samples and scores
engine.py    jobs to workers, one window of them at a time; a worker in this process
cluster.py   workers as Ray actors, on this machine or a cluster
gallery.py   pages, an index, and the table as CSV and JSON
governed.py  the policy asked, and the registry told, where they are in play
run.py       all of it, from the two files to the gallery
"""
