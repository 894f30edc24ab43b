"""Compose two adapters exactly: python examples/compose.py subject.safetensors style.safetensors"""

import sys

from qrlora import Composition, load_adapter, save_adapter

subject, style = map(load_adapter, sys.argv[1:])
both = Composition([(subject, 0.9), (style, 1.0)])
print("cosine of the updates:", both.interference().to_dict()["total"]["cosine"][0][1])
save_adapter(both.adapter(), "both.safetensors")
