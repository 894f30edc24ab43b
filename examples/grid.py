"""One picture of all weights: python examples/grid.py subject.safetensors style.safetensors [DENOISING_STEPS]"""

import sys

from qrlora import load_adapter, load_pipeline, weight_grid

subject, style, *steps = sys.argv[1:]
pipe, family = load_pipeline("pico")
prompt, weights = "a photo of a red <c> in <s> style", [0, 0.5, 1, 1.5]
pair, few = (load_adapter(subject), load_adapter(style)), {"steps": int(steps[0])} if steps else {}
weight_grid(pipe, family, prompt, *pair, row_weights=weights, column_weights=weights, **few).save("grid.png")
