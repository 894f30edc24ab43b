"""Recipes: defaults, overrides, and errors that name the field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from qrlora._reading import tomllib
from qrlora.errors import RecipeError
from qrlora.models.training.recipe import Recipe, default_caption

RECIPES = Path(__file__).parents[2] / "recipes"
SCHEMA = json.loads((RECIPES / "recipe.schema.json").read_text())


def test_published_prompts_are_the_default_captions() -> None:
    subject = Recipe(role="subject", images="dog.png", noun="dog")
    style = Recipe(role="style", images="cat.png", noun="cat")
    assert subject.text == "a photo of a <c> dog"
    assert style.text == "a cat in <s> style"
    assert default_caption("style", "armchair").startswith("an armchair")
    assert Recipe(role="subject", images="x.png").text == "a photo of a <c>"


def test_unset_fields_are_resolved_by_role() -> None:
    recipe = Recipe(role="style", images="cat.png", rank=8, trigger=None)
    assert (recipe.trigger, recipe.columns, recipe.alpha) == ("<s>", "style", 8)
    assert recipe.images == (Path("cat.png"),)


def test_toml_with_overrides_and_paths_from_its_own_folder(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('role = "subject"\nimages = ["a.png", "b.png"]\noutput = "a.safetensors"\nsteps = 3\n')
    recipe = Recipe.load(path, {"steps": "7", "columns": "0,2,4", "rank": 3})
    assert recipe.images == (tmp_path / "a.png", tmp_path / "b.png")
    assert recipe.output == tmp_path / "a.safetensors"
    assert (recipe.steps, recipe.columns) == (7, (0, 2, 4))


def test_a_rate_that_is_given_holds_for_any_number_of_pictures() -> None:
    fields = {"role": "style", "images": "cat.png"}
    rates = [
        ({}, 1e-3, 1e-2),
        ({"learning_rate": 2e-3}, 2e-3, 2e-3),
        ({"learning_rate": "2e-3", "learning_rate_several": 5e-3}, 2e-3, 5e-3),
        ({"method": "lora"}, 1e-3, 1e-3),
        ({"model": "flux.1-dev"}, 1e-3, 1e-3),
        ({"optimizer": "prodigy"}, 1.0, 1.0),
        ({"space": "a.space.safetensors"}, 0.03, 0.03),
    ]
    for given, one, several in rates:
        recipe = Recipe.of(fields | given)
        assert (recipe.of_pictures(1).learning_rate, recipe.of_pictures(2).learning_rate) == (one, several), given


def test_repeats_are_one_number_for_each_entry_of_images() -> None:
    fields = {"role": "subject", "images": ["a", "b"]}
    assert Recipe.of(fields | {"num_repeats": "10, 1"}).num_repeats == (10, 1)
    assert Recipe.of({"role": "subject", "images": "a", "num_repeats": 3}).num_repeats == (3,)
    for repeats, said in (((1,), "1 numbers for 2 entries"), ((0, 1), "num_repeats"), ("a,b", "num_repeats")):
        with pytest.raises(RecipeError, match=said):
            Recipe.of(fields | {"num_repeats": repeats})


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.name)
def test_example_recipes_are_valid(path: Path) -> None:
    recipe = Recipe.load(path)
    assert recipe.trigger in recipe.text
    assert not list(jsonschema.Draft7Validator(SCHEMA).iter_errors(tomllib.loads(path.read_text())))


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.name)
def test_example_recipes_say_what_every_field_is_and_where_its_schema(path: Path) -> None:
    first, *rest = path.read_text().splitlines()
    assert first == "#:schema ./recipe.schema.json"
    assert [line for line in rest if " = " in line and "#" not in line] == []


def test_committed_schema_is_that_of_the_recipe() -> None:
    """Else: qrlora train --schema > recipes/recipe.schema.json"""
    assert Recipe.file_schema() == SCHEMA
    jsonschema.Draft7Validator.check_schema(SCHEMA)


@pytest.mark.parametrize(
    ("fields", "valid"),
    [
        ({"role": "style", "images": "a.png"}, True),
        ({"role": "style", "images": ["a.png"], "preserve": "a; b", "columns": [0, 2], "targets": "all-linear"}, True),
        ({"role": "style", "images": ["a.png"], "preserve": ["a"], "columns": "0/2", "targets": ["to_q"]}, True),
        ({"images": "a.png"}, False),
        ({"role": "content", "images": "a.png"}, False),
        ({"role": "style", "images": []}, False),
        ({"role": "style", "images": "a.png", "rnk": 2}, False),
        ({"role": "style", "images": "a.png", "learning_rate": 0}, False),
        ({"role": "style", "images": "a.png", "steps": 1.5}, False),
    ],
)
def test_schema_accepts_what_the_recipe_accepts(fields: dict[str, Any], valid: bool) -> None:
    assert jsonschema.Draft7Validator(SCHEMA).is_valid(fields) == valid
    if valid:
        Recipe.of(fields)
    else:
        with pytest.raises(RecipeError):
            Recipe.of(fields)


def test_unknown_fields_are_all_named_with_the_nearest_known() -> None:
    with pytest.raises(RecipeError) as error:
        Recipe.of({"role": "subject", "images": "a.png", "learningrate": 1, "stepz": 2, "qwertyuiop": 3})
    for part in ("'learning_rate'", "'steps'", "unknown field 'qwertyuiop'\n"):
        assert part in str(error.value) + "\n"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "'role' is required"),
        ({"role": "content", "images": "a.png"}, "role = 'content'"),
        ({"role": "style"}, "'images' is required"),
        ({"role": "style", "images": []}, "images"),
        ({"role": "style", "images": "a", "rank": 0}, "rank = 0"),
        ({"role": "style", "images": "a", "steps": "many"}, "steps = 'many'"),
        ({"role": "style", "images": "a", "learning_rate": float("nan")}, "learning_rate"),
        ({"role": "style", "images": "a", "caption": "a house"}, "neither [trigger] nor the trigger '<s>'"),
        ({"role": "style", "images": "a", "method": "lora", "train_basis": True}, "train_basis"),
        ({"role": "style", "images": "a", "trigger": ""}, "trigger"),
        ({"role": "style", "images": "a", "seed": 2**63}, "seed"),
        ({"role": "style", "images": "a", "output": "mine.pt"}, "adapters are .safetensors files"),
    ],
)
def test_wrong_fields_are_named(fields: dict[str, object], said: str) -> None:
    with pytest.raises(RecipeError, match="cannot be run") as error:
        Recipe.of(fields)
    assert said in str(error.value)


def test_a_missing_role_is_the_only_complaint_about_what_follows_from_it() -> None:
    with pytest.raises(RecipeError) as error:
        Recipe.of({"images": "a.png"})
    assert str(error.value).count("is required") == 1


@pytest.mark.parametrize(("text", "said"), [(None, "cannot read"), ("steps = ", "not TOML"), ("\xff", "cannot read")])
def test_unreadable_files(tmp_path: Path, text: str | None, said: str) -> None:
    path = tmp_path / "run.toml"
    if text is not None:
        path.write_bytes(text.encode("latin-1"))
    with pytest.raises(RecipeError, match=said):
        Recipe.load(path)


def test_lists_from_the_command_line() -> None:
    recipe = Recipe(role="style", images="a.png", targets="to_q, to_out.0", preserve="a red mug; a lamp;")
    assert recipe.targets == ("to_q", "to_out.0") and recipe.preserve == ("a red mug", "a lamp")
    assert Recipe(role="style", images="a.png", targets=r".*attn\.to_(q|k)").targets == r".*attn\.to_(q|k)"


def test_record_keeps_names_not_paths_and_digest_follows_it() -> None:
    one = Recipe(role="subject", images="/home/me/a.png", output="/tmp/a.safetensors")
    two = one.replace(images=("/elsewhere/a.png",))
    assert one.record()["images"] == ["a.png"] and one.record()["output"] == "a.safetensors"
    assert one.digest == two.digest != one.replace(seed=1).digest


def test_replace_validates() -> None:
    with pytest.raises(RecipeError, match="did you mean 'rank'"):
        Recipe(role="subject", images="a.png").replace(ranks=3)
