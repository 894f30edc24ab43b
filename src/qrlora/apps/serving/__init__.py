"""Pictures over HTTP, as OpenAI's images endpoint gives them, in front of one base model and a folder of adapters.

names.py      which composition a request names
protocol.py   what front and engine say to each other
dispatch.py   Dispatcher: pictures wait here, and go to the engines in batches of different compositions
metrics.py    what is counted
app.py        create_app: the HTTP application, which needs no torch
engine.py     Engine: one copy of the base model with all adapters
local.py      the application and an engine in this process
cluster.py    the application and engines as deployments of Ray Serve, on one machine or on many
"""
