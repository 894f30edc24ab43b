"""Baselines that QR-LoRA is compared with, written from their papers; a docstring says where one is adapted.

adapters.py       ADAPTERS: training methods, all run by the package's one training loop
directions.py     a frozen Q chosen by activations instead of by the weight
merges.py         MERGES: ways to combine several ΔW, and how pictures are sampled with the result
ziplora.py        the one merge that trains
context.py        Context: the base model and the training data that some merges run on
deltas.py         Delta, Learned: ΔW of every layer; its file; adding it to a denoiser and restoring the weights
file_measures.py  between: what two ΔW say of each other before a picture is made
"""
