"""What QR-LoRA is compared with, written from the papers; where one is adapted, its docstring says so.

adapters.py       ADAPTERS, teach: every way to learn from a picture, by the package's one training loop
directions.py     other directions for a frozen Q: the last ones of W, those of the lesson's outputs, of its gradient
merges.py         MERGES, drawing: every way to put several ΔW together, and how the result is drawn with
ziplora.py        one merge that learns, projections.py those by linear algebra
context.py        Context: the base model and lessons that some merges look at
deltas.py         Delta, Learned: ΔW of every layer; its file; written into a denoiser and taken out again
file_measures.py  between: what two ΔW say of each other before a picture is made
claims.py         the published claims as measurements
"""
