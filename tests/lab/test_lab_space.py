"""The lab's spaces: every way runs and is kept; a member's picture is less new to a space than a style unlike all."""

from __future__ import annotations

import functools
from pathlib import Path
from types import SimpleNamespace

import pytest

from qrlora.errors import DataError
from qrlora.lab import space as lab
from qrlora.lab.compare.cells import Bench
from qrlora.lab.compare.plan import Scope
from qrlora.lab.tasks import task_of_world
from qrlora.method.space import Space, save_space, unexplained
from qrlora.models.training.attach import adapter_on
from qrlora.models.training.prepare import first_losses, prepare
from qrlora.models.training.processes import processes_here
from qrlora.models.training.recipe import Recipe

TINY = {"count": 3, "pictures": 2, "library_steps": 2, "components": 2, "names": ("chalk",), "remainders": (0.0,)}
TINY |= {"role": "style", "rate": 0.03, "decay": 0.1, "steps": 2, "asked": 1, "seed": 0}


def test_unknown_ways_and_too_many_components_are_refused(tmp_path: Path) -> None:
    for changes, said in (({"ways": ("loha",)}, "no way 'loha'"), ({"components": 3}, "more components")):
        options = SimpleNamespace(**{**TINY, "ways": ("qrlora",), "out": tmp_path, **changes})
        with pytest.raises(DataError, match=said):
            lab.main(options, print)


@pytest.mark.slow
def test_every_way_is_measured_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = SimpleNamespace(**TINY, ways=("alone", *lab.WAYS), out=tmp_path)
    lab.main(SimpleNamespace(**{**vars(options), "role": "subject", "names": ("teapot",), "ways": ("qrlora",)}), print)
    assert "nameless subjects" in capsys.readouterr().out
    lab.main(options, print)
    first = capsys.readouterr().out
    lab.main(options, print)
    again = capsys.readouterr().out
    assert "nameless styles" in first and "nameless styles" not in again
    assert again.splitlines()[-6:] == first.splitlines()[-6:]


@pytest.mark.slow
def test_a_members_picture_is_less_new_than_a_style_unlike_all(tmp_path: Path) -> None:
    study = lab.Study(Bench.open(tmp_path, Scope()), "style", 3, 4, 60, 2, 0.03, 0.1, 0)
    space, file = (
        Space.of([lab.adapter_of(study, "qrlora", style) for style in range(3)]),
        tmp_path / "a.space.safetensors",
    )
    save_space(space, file)
    mosaic = task_of_world("style", "mosaic", tmp_path / "mosaic.png", 0, "<s>").file
    left = []
    for image in (study.folder / "pictures" / "000" / "00.png", mosaic):
        recipe = Recipe.of({"role": "style", "images": image, "batch_size": 8, "space": file, "caption": "a [trigger]"})
        ready = prepare(recipe, study.bench.pipe, study.bench.family, processes_here(), None)
        with adapter_on(ready.denoiser, ready.family, recipe):
            left.append(unexplained(ready.denoiser, functools.partial(first_losses, recipe, ready, 4)))
    assert 1 - left[0] > 2 * (1 - left[1])
