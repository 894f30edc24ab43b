"""Name the transformers' layers as in each model's original code, whose names ComfyUI and most trainers use.

One row per layer of the original: its name, and the diffusers layers that it holds, one below the other in its rows;
`#` stands for the number of the block. Rows were checked against diffusers' own conversion of checkpoints
(`single_file_utils`), which a test repeats. Where a trainer names layers as diffusers does, no row is needed for that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Piece:
    """Rows [start, stop) of an up matrix, and the diffusers layer that they belong to; swapped: its halves change
    places, because the original orders (shift, scale) and diffusers (scale, shift)."""

    layer: str
    start: int
    stop: int
    swapped: bool = False


@dataclass(frozen=True)
class Original:
    """A layer of the original code.

    name, layers: with `#` for the block. heights: rows of each layer in units of the hidden size, and width, its
    columns in the same units: two architectures that share names are told apart by them (0: no such rule).
    swapped: if it has two halves, they are exchanged. written: a row that export uses (others are read only).
    """

    name: str
    layers: tuple[str, ...]
    heights: tuple[int, ...] = ()
    width: int = 0
    swapped: bool = False
    written: bool = True

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """The pattern of the dotted name, and of the flattened one."""
        return template(self.name)

    def number_of(self, layer: str) -> str | None:
        """Return the block number of `layer` as text, empty if this row has no blocks; None if the row lacks the
        layer."""
        for own in self.layers:
            match = template(own).fullmatch(layer)
            if match:
                return match[1] if match.groups() else ""
        return None

    def pieces(self, number: str, height: int, width: int, modules: Shapes) -> tuple[Piece, ...]:
        """Divide `height` rows among layers, by the model's own sizes if it is given; empty if that is impossible."""
        layers = [layer.replace("#", number) for layer in self.layers]
        if modules:
            sizes = [modules[layer][0] for layer in layers if layer in modules]
        else:
            unit = self._unit(height, width)
            sizes = [unit * share for share in self.heights] if self.heights else [height]
        if len(sizes) != len(layers) or sum(sizes) != height:
            return ()
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        swapped = self.swapped and height == 2 * width
        return tuple(
            Piece(layer, end - size, end, swapped) for layer, size, end in zip(layers, sizes, ends, strict=True)
        )

    def _unit(self, height: int, width: int) -> int:
        """Rows per unit; 0 if height and width contradict each other."""
        unit = height // max(sum(self.heights), 1)
        return unit if not self.width or unit * self.width == width else 0


@cache
def template(name: str) -> re.Pattern[str]:
    """Return a pattern for a name in which `#` stands for a number, with its dots or with underscores for them."""
    return re.compile(re.escape(name).replace(r"\.", "[._]").replace(r"\#", r"(\d+)").replace("#", r"(\d+)"))


def _attention(original: str, block: str, names: Sequence[str], **options: bool) -> Original:
    return Original(original, tuple(f"{block}.{name}" for name in names), (1, 1, 1), 1, **options)


_QKV = ("to_q", "to_k", "to_v")
_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")
_DOUBLE, _SINGLE = "transformer_blocks.#", "single_transformer_blocks.#"
_FINAL = Original("final_layer.adaLN_modulation.1", ("norm_out.linear",), swapped=True)


def _same(*layers: str) -> tuple[Original, ...]:
    """Layers that the original calls as diffusers does."""
    return tuple(Original(layer, (layer,)) for layer in layers)


def _renamed(**names: str) -> tuple[Original, ...]:
    return tuple(Original(theirs.replace("__", "."), (ours,)) for theirs, ours in names.items())


def _flux_blocks(hidden: Mapping[str, tuple[str, int, int]]) -> tuple[Original, ...]:
    """Return the rows common to FLUX.1 and FLUX.2. hidden: both feed-forwards, original -> (layer, rows, columns)."""
    streams = (("img", _QKV, "attn.to_out.0", "ff"), ("txt", _ADDED, "attn.to_add_out", "ff_context"))
    rows: list[Original] = []
    for stream, attention, out, forward in streams:
        block = f"double_blocks.#.{stream}"
        rows += [_attention(f"{block}_attn.qkv", f"{_DOUBLE}.attn", attention)]
        rows += [Original(f"{block}_attn.proj", (f"{_DOUBLE}.{out}",), (1,), 1)]
        for theirs, (ours, height, width) in hidden.items():
            rows += [Original(f"{block}_mlp.{theirs}", (f"{_DOUBLE}.{forward}.{ours}",), (height,), width)]
    return tuple(rows)


_XLABS = (
    _attention("double_blocks.#.processor.qkv_lora1", f"{_DOUBLE}.attn", _QKV, written=False),
    _attention("double_blocks.#.processor.qkv_lora2", f"{_DOUBLE}.attn", _ADDED, written=False),
    _attention("single_blocks.#.processor.qkv_lora", f"{_SINGLE}.attn", _QKV, written=False),
    Original("double_blocks.#.processor.proj_lora1", (f"{_DOUBLE}.attn.to_out.0",), (1,), 1, written=False),
    Original("double_blocks.#.processor.proj_lora2", (f"{_DOUBLE}.attn.to_add_out",), (1,), 1, written=False),
    Original("single_blocks.#.processor.proj_lora", (f"{_SINGLE}.proj_out",), (1,), 5, written=False),
)

_FLUX = (
    *_flux_blocks({"0": ("net.0.proj", 4, 1), "2": ("net.2", 1, 4)}),
    Original("double_blocks.#.img_mod.lin", (f"{_DOUBLE}.norm1.linear",), (6,), 1),
    Original("double_blocks.#.txt_mod.lin", (f"{_DOUBLE}.norm1_context.linear",), (6,), 1),
    Original(
        "single_blocks.#.linear1",
        (*(f"{_SINGLE}.attn.{name}" for name in _QKV), f"{_SINGLE}.proj_mlp"),
        (1, 1, 1, 4),
        1,
    ),
    Original("single_blocks.#.linear2", (f"{_SINGLE}.proj_out",), (1,), 5),
    Original("single_blocks.#.modulation.lin", (f"{_SINGLE}.norm.linear",), (3,), 1),
    *_renamed(
        img_in="x_embedder",
        txt_in="context_embedder",
        time_in__in_layer="time_text_embed.timestep_embedder.linear_1",
        time_in__out_layer="time_text_embed.timestep_embedder.linear_2",
        guidance_in__in_layer="time_text_embed.guidance_embedder.linear_1",
        guidance_in__out_layer="time_text_embed.guidance_embedder.linear_2",
        vector_in__in_layer="time_text_embed.text_embedder.linear_1",
        vector_in__out_layer="time_text_embed.text_embedder.linear_2",
        final_layer__linear="proj_out",
    ),
    _FINAL,
    *_XLABS,
)

_FLUX2 = (
    *_flux_blocks({"0": ("linear_in", 6, 1), "2": ("linear_out", 1, 3)}),
    Original("single_blocks.#.linear1", (f"{_SINGLE}.attn.to_qkv_mlp_proj",), (9,), 1),
    Original("single_blocks.#.linear2", (f"{_SINGLE}.attn.to_out",), (1,), 4),
    *_renamed(
        img_in="x_embedder",
        txt_in="context_embedder",
        time_in__in_layer="time_guidance_embed.timestep_embedder.linear_1",
        time_in__out_layer="time_guidance_embed.timestep_embedder.linear_2",
        guidance_in__in_layer="time_guidance_embed.guidance_embedder.linear_1",
        guidance_in__out_layer="time_guidance_embed.guidance_embedder.linear_2",
        double_stream_modulation_img__lin="double_stream_modulation_img.linear",
        double_stream_modulation_txt__lin="double_stream_modulation_txt.linear",
        single_stream_modulation__lin="single_stream_modulation.linear",
        final_layer__linear="proj_out",
    ),
    _FINAL,
)


def _joint(stream: str, attention: Sequence[str], out: str, forward: str, norm: str) -> tuple[Original, ...]:
    block = f"joint_blocks.#.{stream}_block"
    return (
        _attention(f"{block}.attn.qkv", f"{_DOUBLE}.attn", attention),
        Original(f"{block}.attn.proj", (f"{_DOUBLE}.{out}",), (1,), 1),
        Original(f"{block}.mlp.fc1", (f"{_DOUBLE}.{forward}.net.0.proj",), (4,), 1),
        Original(f"{block}.mlp.fc2", (f"{_DOUBLE}.{forward}.net.2",), (1,), 4),
        # of the last block's context only two parts are left, in the other order
        Original(f"{block}.adaLN_modulation.1", (f"{_DOUBLE}.{norm}.linear",), swapped=True),
    )


_SD3 = (
    *_joint("x", _QKV, "attn.to_out.0", "ff", "norm1"),
    *_joint("context", _ADDED, "attn.to_add_out", "ff_context", "norm1_context"),
    _attention("joint_blocks.#.x_block.attn2.qkv", f"{_DOUBLE}.attn2", _QKV),
    Original("joint_blocks.#.x_block.attn2.proj", (f"{_DOUBLE}.attn2.to_out.0",), (1,), 1),
    *_same("context_embedder"),
    *_renamed(
        x_embedder__proj="pos_embed.proj",
        t_embedder__mlp__0="time_text_embed.timestep_embedder.linear_1",
        t_embedder__mlp__2="time_text_embed.timestep_embedder.linear_2",
        y_embedder__mlp__0="time_text_embed.text_embedder.linear_1",
        y_embedder__mlp__2="time_text_embed.text_embedder.linear_2",
        final_layer__linear="proj_out",
    ),
    _FINAL,
)

_QWEN_IMAGE = _same(
    *(f"{_DOUBLE}.attn.{name}" for name in (*_QKV, *_ADDED, "to_out.0", "to_add_out")),
    *(f"{_DOUBLE}.{stream}_{part}" for stream in ("img", "txt") for part in ("mod.1", "mlp.net.0.proj", "mlp.net.2")),
    *(f"time_text_embed.timestep_embedder.linear_{i}" for i in (1, 2)),
    *("img_in", "txt_in", "norm_out.linear", "proj_out"),
)

_Z_IMAGE = tuple(
    row
    for block in ("layers.#", "noise_refiner.#", "context_refiner.#")
    for row in (
        _attention(f"{block}.attention.qkv", f"{block}.attention", _QKV),
        Original(f"{block}.attention.out", (f"{block}.attention.to_out.0",), (1,), 1),
        *_same(*(f"{block}.feed_forward.w{i}" for i in (1, 2, 3)), f"{block}.adaLN_modulation.0"),
    )
) + (
    *_same("t_embedder.mlp.0", "t_embedder.mlp.2", "cap_embedder.1"),
    *_renamed(
        x_embedder="all_x_embedder.2-1",
        final_layer__linear="all_final_layer.2-1.linear",
        final_layer__adaLN_modulation__1="all_final_layer.2-1.adaLN_modulation.1",
    ),
)

ORIGINALS: dict[str, tuple[Original, ...]] = {
    "flux": _FLUX,
    "flux2-klein": _FLUX2,
    "qwen-image": _QWEN_IMAGE,
    "sd3": _SD3,
    "z-image": _Z_IMAGE,
}
"""Family -> its rows. The UNets' names follow by counting: names.py."""
