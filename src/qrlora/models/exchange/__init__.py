"""Import adapters from other programs, and export adapters to them.

names.py         the SDXL UNet's modules under the names that kohya's scripts, ComfyUI, Forge and A1111 use
keys.py          the keys of a LoRA file, whatever program wrote it
originals.py     the transformers' layers by the names of the code that each was published with
layer_names.py   LayerNames: which layers of which denoiser the names in a file mean
by_diffusers.py  traced: what diffusers' own conversion makes of names that are not found
lora_files.py    load_any: an adapter of ours or anybody's LoRA
published.py     checkpoints of the published QR-LoRA code
projection.py    project: any adapter on a basis, and the energy that it keeps there
importing.py     import_file: such a file as an adapter, as it is or on a basis
extraction.py    changed_layers, extract_lora, extract_on_basis: two checkpoints' difference as an adapter
verification.py  count_matches: what another program's own rules make of a file
forms.py         the forms that export writes, and which program reads which
export.py        export_adapter: write, read back by those rules, or refuse
notes.py         modelspec.* and ss_* metadata
"""

from __future__ import annotations

from qrlora.models.exchange.export import Export, export_adapter
from qrlora.models.exchange.extraction import changed_components, changed_layers, extract_lora, extract_on_basis
from qrlora.models.exchange.forms import target_of
from qrlora.models.exchange.importing import Onto, import_file
from qrlora.models.exchange.layer_names import LayerNames
from qrlora.models.exchange.lora_files import is_ours, left_out_of, load_any
from qrlora.models.exchange.projection import EnergyKept, project
from qrlora.models.exchange.published import Published, load_published
from qrlora.models.exchange.verification import count_matches

__all__ = [
    "EnergyKept",
    "Export",
    "LayerNames",
    "Onto",
    "Published",
    "changed_components",
    "changed_layers",
    "count_matches",
    "export_adapter",
    "extract_lora",
    "extract_on_basis",
    "import_file",
    "is_ours",
    "left_out_of",
    "load_any",
    "load_published",
    "project",
    "target_of",
]
