"""Train, mix, prove and keep adapters in the browser. State lives in the registry and in its folder.

app.py       the application: pages, /static, /status, the server's own endpoints under /api
guard.py     who may: login by key, hosts, CSRF, content security policy
pages.py     templates, languages, errors in words
model.py     the base model, which is loaded while the first page is already there
shelf.py     adapters of the registry and of a folder, as the engine reads them and as cards
mix.py       weights by sliders, pictures while they move, interference, save
train.py     pictures in, runs out; runs.py: the queue; worker.py: the process of one run
library.py   the registry: search, lineage, aliases, export, verify
explore.py   the space of adapters as sliders
prove.py     scores and crosstalk of two mixes, and a blind vote
pilot.py     the stages of a product line, their reports and decisions; projects.py: the files of its projects
static/      one style sheet, one script; vendor/ htmx, Alpine, Inter (see vendor/NOTICE)
locale/      studio.pot's strings in other languages, read as they are
"""
