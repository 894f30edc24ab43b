"""Serve pictures over HTTP, as OpenAI's images endpoint does, from one base model and a folder of adapters.

names.py      parse the composition that a request names
protocol.py   messages between front and engine
dispatch.py   Dispatcher: pictures wait here, and go to the engines in batches of different compositions
metrics.py    counters and histograms for Prometheus
request.py    fields, body and key of a request; service.py: state between requests; answer.py: the response to one
app.py        create_app: the HTTP application; the front needs no torch
engine.py     Engine: one copy of the base model with all adapters
local.py      the application and an engine in this process
cluster.py    the application and engines as deployments of Ray Serve, on one machine or on many
"""
