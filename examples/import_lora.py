"""Put a LoRA onto the basis of an adapter: python examples/import_lora.py lora.safetensors subject.safetensors"""

import sys

from qrlora import basis_of, load_adapter, load_any, load_pipeline, project, save_adapter

pipe, _ = load_pipeline("pico")
lora, like = load_any(sys.argv[1]), load_adapter(sys.argv[2])
imported, kept = project(lora, basis_of(pipe.transformer, like), like.metadata.columns)
print(f"kept {kept.total:.2f} of the energy of ΔW")
save_adapter(imported, "imported.safetensors")
