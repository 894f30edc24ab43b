"""Export an adapter, and load it with diffusers alone: python examples/export_for_diffusers.py both.safetensors"""

import sys

from qrlora import basis_of, export_adapter, load_adapter, load_pipeline

pipe, family = load_pipeline("pico")
adapter = load_adapter(sys.argv[1])
export_adapter(adapter, "exported.safetensors", "diffusers", pipe, family, basis=basis_of(pipe.transformer, adapter))
pipe.load_lora_weights("exported.safetensors")
pipe("a photo of a <c> teapot in <s> style", num_inference_steps=4).images[0].save("exported.png")
