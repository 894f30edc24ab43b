"""The wide world and the training on it: what must hold whatever is drawn there."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from qrlora import pico
from qrlora.pico import model, world
from qrlora.pico.pretraining import denoiser, export, text
from qrlora.pico.pretraining import wide as training
from qrlora.pico.pretraining.muon import Muon
from qrlora.pico.pretraining.plan import Plan
from qrlora.pico.pretraining.run import Run
from qrlora.pico.world import canvas, drawings, nameless, wide
from qrlora.pico.world.drawings import names
from qrlora.pico.world.palette import palette


def shown(body: str, size: float = 10) -> np.ndarray:
    """The colours (10, 10, 3) in the middle of each unit of an SVG body."""
    svg = pytest.importorskip("qrlora.pico.world.drawings.svg")
    picture = np.full((svg.GRID, svg.GRID, 3), 255.0)
    for area in svg.areas(body, size, size):
        picture[area.mask > 0] = area.paint.mean
    at = ((np.arange(10) + 0.5) * svg.GRID / 10).astype(int)
    return picture[np.ix_(at, at)].round()


RED, WHITE = [255, 0, 0], [255, 255, 255]


def test_groups_and_transforms_move_what_they_hold():
    picture = shown('<g transform="translate(4 0)"><rect fill="#f00" transform="scale(2)" width="1" height="1"/></g>')
    assert picture[0, 4].tolist() == RED and picture[1, 5].tolist() == RED
    assert picture[0, 3].tolist() == WHITE and picture[0, 6].tolist() == WHITE and picture[2, 4].tolist() == WHITE


def test_circles_and_strokes_become_areas():
    picture = shown('<circle cx="5" cy="5" r="3" fill="red"/><path d="M0 9.5h10" stroke="#00f"/>')
    assert picture[5, 5].tolist() == RED and picture[5, 2].tolist() == RED and picture[2, 2].tolist() == WHITE
    assert picture[9, 3].tolist() == [0, 0, 255] and picture[8, 3].tolist() == WHITE


@pytest.mark.parametrize(("rule", "middle"), [("evenodd", WHITE), ("nonzero", RED)])
def test_a_contour_within_another_is_a_hole_by_the_rule_that_the_path_names(rule, middle):
    picture = shown(f'<path fill="red" fill-rule="{rule}" d="M0 0h10v10h-10zM3 3h4v4h-4z"/>')
    assert picture[5, 5].tolist() == middle and picture[1, 1].tolist() == RED


def test_a_contour_the_other_way_round_is_a_hole_by_nonzero():
    assert shown('<path fill="red" d="M0 0h10v10h-10zM3 3v4h4v-4z"/>')[5, 5].tolist() == WHITE


def test_a_gradient_has_the_mean_of_what_is_seen_of_it_and_shadows_are_left_out():
    stops = '<stop offset="0" stop-color="#f00"/><stop offset="1" stop-color="#00f"/>'
    picture = shown(
        f'<defs><linearGradient id="a">{stops}</linearGradient></defs><rect fill="url(#a)" width="5" height="10"/>'
    )
    assert picture[5, 2] == pytest.approx([128, 0, 128], abs=2)
    assert shown('<rect fill="#000" opacity=".2" width="10" height="10"/>')[5, 5].tolist() == WHITE


def test_a_clip_path_cuts():
    body = '<defs><clipPath id="c"><rect width="5" height="10"/></clipPath></defs>'
    picture = shown(body + '<g clip-path="url(#c)"><rect fill="red" width="10" height="10"/></g>')
    assert picture[5, 2].tolist() == RED and picture[5, 7].tolist() == WHITE


def test_parts_of_equal_tone_that_touch_stay_apart_and_what_is_hidden_is_no_part():
    convert = pytest.importorskip("qrlora.pico.world.drawings.convert")
    two = '<rect fill="#c33" width="5" height="10"/><rect fill="#c43" x="5" width="5" height="10"/>'
    parts = convert.trace('<rect fill="#00f" x="1" y="1" width="3" height="3"/>' + two, 10, 10)
    assert len(parts) == 2 and parts[0].tone == parts[1].tone
    drawn = drawings.Drawing("", "", tuple(_painted(p) for p in parts)).parts(np.random.default_rng(0))
    seen = canvas.rasterise(drawn, canvas.Pose())
    assert set(np.unique(seen.label)) == {0, 1, 2} and len(set(seen.tone[seen.label > 0].tolist())) == 1


def _painted(part):
    contours = tuple((c / drawings.UNITS - 0.5) * 1.8 for c in part.contours)
    return drawings.PaintedPart(part.tone, part.paint.ends, None, False, contours)


def test_the_data_file_has_its_things_and_loads_fast():
    before = time.perf_counter()
    for cached in (drawings._arrays, drawings._index, drawings._starts):
        cached.cache_clear()
    drawings.drawing(0)
    assert time.perf_counter() - before < 2
    assert len(drawings.THINGS) >= 1200 and drawings.DATA.stat().st_size < 2_000_000
    assert len({d.designer for d in drawings.variants("hamburger")}) >= 3, "the same thing by several designers"


def test_notice_names_every_set_with_licence_and_version():
    notice = drawings.DATA.with_name("NOTICE").read_text()
    for source in drawings.SETS:
        assert f"{source.package} {source.version}, {source.licence}" in notice
    assert {s.licence for s in drawings.SETS} <= {"MIT", "Apache-2.0", "CC-BY-4.0"}
    assert sum(not s.trained for s in drawings.SETS) == 2


def test_a_reserved_subject_is_reserved_under_every_name():
    words = {word for name in drawings.SEEN_THINGS for word in name.split()}
    assert not words & {"teapot", "rocket", "robot", "trophy", "cupcake", "boot", "boots"}
    assert names.RESERVED.search("womans boot") and not names.RESERVED.search("phone booth")
    assert len(drawings.RESERVED_THINGS) >= 66


def test_training_never_shows_what_is_reserved_or_held_back():
    scenes = [wide.sample(i) for i in range(3000)]
    assert not {s.subject for s in scenes} & {*drawings.RESERVED_THINGS, *world.RESERVED_SUBJECTS}
    assert not {s.style for s in scenes} & {*world.RESERVED_STYLES, "gradient", "plump"}
    assert not any(wide.held_back(s.subject, s.style) for s in scenes)
    held = [wide.held_back(thing, style) for thing in drawings.SEEN_THINGS for style in world.SEEN_STYLES]
    assert 0.08 < np.mean(held) < 0.15


def test_the_word_of_a_nameless_style_is_the_same_for_eight_subjects_and_no_others():
    word = wide.word("style 7")
    scenes = [
        world.Scene(s, "style 7", "red", "white", i, world.sample_scene(i).pose)
        for i, s in enumerate(drawings.SEEN_THINGS[:8])
    ]
    short = [next(c for p in range(99) if "style" in (c := wide.caption(s, p)) or "picture" in c) for s in scenes]
    assert all(word in caption for caption in short)
    every = [wide.word(f"style {i}") for i in range(nameless.STYLE_COUNT)]
    every += [wide.word(f"thing {i}") for i in range(wide.THING_COUNT)]
    assert len(set(every)) == len(every) == nameless.STYLE_COUNT + wide.THING_COUNT and nameless.STYLE_COUNT >= 1500


def test_a_style_is_shown_on_eight_subjects_and_a_nameless_thing_in_four_styles():
    scenes = [wide.sample(i) for i in range(40_000)]
    subjects: dict[str, set[str]] = {}
    for scene in scenes:
        for key, other in ((scene.style, scene.subject), (scene.subject, scene.style)):
            subjects.setdefault(key, set()).add(other)
    shown_on = [len(subjects.get(f"style {i}", ())) for i in range(nameless.STYLE_COUNT)]
    in_styles = [len(subjects.get(f"thing {i}", ())) for i in range(wide.THING_COUNT)]
    assert np.median(shown_on) >= 8 and np.quantile(in_styles, 0.1) >= 4, "a tenth of what a long run sees"


def test_captions_and_pictures_are_the_same_twice_and_half_of_nameless_styles_are_described():
    told = []
    for number in range(0, 400, 7):
        scene = wide.sample(number)
        assert scene == wide.sample(number) and wide.caption(scene, 3) == wide.caption(scene, 3)
        if scene.style.startswith("style "):
            told += [any(f in wide.caption(scene, p) for f in wide.facts(scene)) for p in range(40)]
    assert 0.4 < np.mean(told) < 0.6
    scene = wide.sample(11)
    assert np.array_equal(wide.render(scene)[0], wide.render(scene)[0])


def test_the_small_world_is_as_it_was_within_the_wide_one():
    scene = world.sample_scene(5, subject="mug", style="neon")
    assert np.array_equal(wide.render(scene)[0], world.render(scene)[0])


@pytest.mark.parametrize("number", range(0, nameless.STYLE_COUNT, 97))
def test_every_nameless_style_shows_its_subject(number):
    scene = world.Scene("mug", f"style {number}", "red", "white", 0, world.sample_scene(0).pose)
    picture, mask = wide.render(scene)
    blank = nameless.draw(number, canvas.rasterise([], scene.pose), palette("red", "white"))
    change = np.abs(picture / 255.0 - cv2.resize(blank, picture.shape[:2], interpolation=cv2.INTER_AREA)).mean(-1)
    assert change[mask > 0.5].mean() > 0.03, nameless.description(number)
    assert nameless.description(number)


def test_a_house_style_is_the_designers_own_picture():
    thing = next(d for d in map(drawings.drawing, range(4000)) if d.designer == "plump").name
    scene = world.Scene(thing, "plump", "red", "white", 0, world.sample_scene(0).pose)
    picture, mask = wide.render(scene)
    blue = (picture[..., 2].astype(int) - picture[..., 0] > 60)[mask > 0.5]
    assert blue.mean() > 0.2, "Plump is blue whatever colour the scene has"


# ---------------------------------------------------------------- words


def test_each_word_of_the_wide_world_is_one_token_and_known_ones_stay():
    known = model.saved_tokenizer(pico.path() / "tokenizer")
    wider = text.widened(known)
    assert all(len(wider(word, add_special_tokens=False).input_ids) == 1 for word in text.wide_words()[::9])
    for number in range(50):
        caption = world.caption(world.sample_scene(number), number)
        assert wider(caption).input_ids == known(caption).input_ids
    longest = max(len(wider(wide.caption(wide.sample(i), i)).input_ids) for i in range(2000))
    assert longest <= model.LONG_TOKENS


def test_a_widened_pipeline_reads_known_captions_nearly_as_before():
    pipe = model.load(pico.path())
    wider = text.widen(pipe)
    with torch.no_grad():
        before, pooled = text.embed(pipe, ["a red mug in neon style"], 1)
        after, pooled_after = text.embed(wider, ["a red mug in neon style"], 1)
    assert after.shape[1] == model.LONG_TOKENS + 1
    assert torch.allclose(before[:, : model.TOKENS], after[:, : model.TOKENS], atol=1e-5)
    assert torch.allclose(pooled, pooled_after, atol=1e-5)


# ---------------------------------------------------------------- the loop


def _run(folder, steps, stop_at=None):
    torch.manual_seed(0)
    net = nn.Linear(6, 6)
    adam = torch.optim.AdamW([net.bias], 1e-2)
    run = Run(
        folder, "r", {"net": net}, [Muon([net.weight], 0.02), adam], steps, lambda _: 1.0, ema=0.9, keep_last=True
    )
    run.restore()

    def loss_of(step):
        if step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        x = torch.from_numpy(np.random.default_rng(step).standard_normal((4, 6), dtype=np.float32))
        return (net(x) - 1).square().mean()

    run.go(loss_of, every=3)
    return run, net


def test_a_run_that_was_stopped_goes_on_bit_for_bit_with_its_average(tmp_path):
    whole, net = _run(_made(tmp_path / "a"), 12)
    with pytest.raises(KeyboardInterrupt):
        _run(_made(tmp_path / "b"), 12, stop_at=6)
    assert torch.load(tmp_path / "b" / "r.pt", weights_only=True)["step"] == 7
    again, net_again = _run(tmp_path / "b", 12)
    assert again.step == 12 and torch.equal(net.weight, net_again.weight)
    assert all(torch.equal(x, y) for x, y in zip(whole.average, again.average, strict=True))
    assert not torch.equal(whole.average[0], net.weight)
    assert (tmp_path / "a" / "r.before.pt").exists()


@pytest.mark.slow
def test_training_on_the_wide_world_goes_on_bit_for_bit_and_exports_a_stock_pipeline(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "CHUNK", 25)
    plan = Plan(
        start=str(pico.path()), denoiser_steps=3, denoiser_batch=2, first_shards=1, shard_steps=2, threads=1, ema=0.5
    )
    training.wide_stage(_made(tmp_path / "a"), plan)
    assert len(list((tmp_path / "a").glob("wide-*.npy"))) == 2, "a shard more after two steps"
    whole, flow_loss = torch.load(tmp_path / "a" / "wide.pt", weights_only=True), denoiser.flow_loss

    def stopping(step, **parts):
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return flow_loss(step, **parts)

    monkeypatch.setattr(denoiser, "flow_loss", stopping)
    with pytest.raises(KeyboardInterrupt):
        training.wide_stage(_made(tmp_path / "b"), plan)
    monkeypatch.setattr(denoiser, "flow_loss", flow_loss)
    training.wide_stage(tmp_path / "b", plan)
    again = torch.load(tmp_path / "b" / "wide.pt", weights_only=True)
    assert again["step"] == 3 and all(
        torch.equal(x, y) for x, y in zip(whole["average"], again["average"], strict=True)
    )
    states = [s["modules"]["transformer"] for s in (whole, again)]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    export.export_stage(tmp_path / "b", plan, tmp_path / "pipeline")
    wider = model.load(tmp_path / "pipeline")
    assert wider.tokenizer.model_max_length == wider.tokenizer_max_length == model.LONG_TOKENS
    assert wider("a red accordion in neon style", num_inference_steps=1, output_type="np").images.shape == (
        1,
        128,
        128,
        3,
    )


def _made(folder):
    folder.mkdir()
    return folder


def test_bfloat16_changes_the_loss_and_its_gradients_by_rounding_only():
    """bfloat16 has 8 bits: one rounding moves a value by 0.4 % at most, and ten blocks of them what they add up to."""
    pipe = model.load(pico.path())

    def batch(step: int):
        rng = np.random.default_rng(step)
        return (
            torch.from_numpy(rng.standard_normal((4, 16, 16, 16), dtype=np.float32)),
            ["a red mug", "", "a", "b"],
            rng,
        )

    def found(bf16: int) -> tuple[float, torch.Tensor]:
        pipe.transformer.zero_grad()
        plan = Plan(bf16=bf16, long_null=0.0)
        loss = denoiser.flow_loss(3, pipe=pipe, fast=pipe.transformer, batch=batch, plan=plan)
        loss.backward()
        weight = pipe.transformer.transformer_blocks[0].attn.to_q.weight
        return loss.item(), weight.grad.flatten().clone()

    (loss, gradient), (rounded, moved) = found(0), found(1)
    assert rounded != loss and rounded == pytest.approx(loss, rel=0.02)
    assert float(torch.cosine_similarity(gradient, moved, dim=0)) > 0.98


@pytest.mark.parametrize("kind", ["", "causal", "boolean", "added"])
def test_plain_attention_is_torchs_attention(kind):
    query, key, value = torch.randn(3, 2, 4, 10, 8).unbind()
    visible = torch.rand(2, 1, 10, 10) < 0.5
    visible |= torch.eye(10, dtype=torch.bool)
    masks = {"boolean": {"attn_mask": visible}, "added": {"attn_mask": torch.randn(2, 1, 10, 10), "scale": 0.3}}
    given = {"is_causal": True} if kind == "causal" else masks.get(kind, {})
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, **given)
    torch.testing.assert_close(denoiser.plain_attention(query, key, value, **given), expected)


LINE = """
import os, signal, sys, torch
from pathlib import Path
from qrlora.pico.pretraining import processes
from qrlora.pico.pretraining.run import Run

work, stop = Path(sys.argv[1]), int(sys.argv[2])
layer = torch.nn.Linear(3, 1)
torch.nn.init.ones_(layer.weight), torch.nn.init.zeros_(layer.bias)

def loss_of(step):
    if step == stop and processes.RANK == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    x = processes.own(torch.randn(8, 3, generator=torch.Generator().manual_seed(step)))
    return (layer(x) - x.sum(1, keepdim=True) ** 2).square().mean()

with processes.joined():
    run = Run(work, "line", {"line": layer}, [torch.optim.AdamW(layer.parameters(), 0.1)], 6, lambda _: 1)
    run.restore()
    run.go(loss_of)
"""


def test_two_processes_train_what_one_does_and_end_together(tmp_path):
    """The signal reaches one of them; the checkpoint is of one step, and both go on from there."""

    def train(work, count, stop=99):
        work.mkdir(exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        env = os.environ | {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, "-c", LINE, str(work), str(stop)]
        each = [
            subprocess.Popen(command, env=env | {"RANK": str(rank)}, stderr=subprocess.PIPE) for rank in range(count)
        ]
        ends = [(one.communicate(timeout=120)[1], one.returncode) for one in each]
        state = torch.load(work / "line.pt", weights_only=True)
        return ends, state["step"], state["modules"]["line"]["weight"]

    ends, step, one = train(tmp_path / "one", 1)
    assert step == 6 and ends[0][1] == 0
    ends, step, stopped = train(tmp_path / "two", 2, stop=2)
    assert step == 3 and all(b"interrupted after step 3" in said for said, _ in ends)
    ends, step, two = train(tmp_path / "two", 2)
    assert step == 6 and [code for _, code in ends] == [0, 0], ends
    assert not torch.equal(stopped, two)
    torch.testing.assert_close(two, one)
