"""The licence of a composition is the strictest of its parts': who may do what, and why not."""

from __future__ import annotations

import itertools

import pytest

from qrlora.errors import PolicyError
from qrlora.operations.policy.licences import USES, Asker, alternatives, compute, licence_of_model, table

OURS = "LicenseRef-Proprietary-Acme"


def allowed(*expressions: str, **asker: object) -> set[str]:
    return set(compute(expressions, Asker(**asker)).allows)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("parents", "uses"),
    [
        (["Apache-2.0", "MIT", "CC-BY-4.0"], {"internal", "outputs", "commercial"}),
        (["Apache-2.0", "CC-BY-NC-4.0"], {"internal"}),
        (["LicenseRef-FLUX.1-dev-Non-Commercial", "MIT"], {"internal", "outputs"}),
        (["openrail++", "creativeml-openrail-m"], {"internal", "outputs", "commercial"}),
        (["Apache-2.0", ""], set()),
        (["Apache-2.0", "LicenseRef-Nobody-Knows"], set()),
        (["Apache-2.0", OURS], set()),
    ],
)
def test_a_composition_may_what_all_its_parents_may(parents: list[str], uses: set[str]) -> None:
    assert allowed(*parents) == uses


def test_no_parent_ever_permits_more() -> None:
    ids = [*table(), OURS, "GPL-3.0-only"]
    for one, other in itertools.product(ids, repeat=2):
        together = allowed(one, other, revenue=1.0, users=1.0, ours=["acme"])
        alone = [allowed(each, revenue=1.0, users=1.0, ours=["acme"]) for each in (one, other)]
        assert together <= alone[0] & alone[1], (one, other)
        assert together == allowed(other, one, revenue=1.0, users=1.0, ours=["acme"])


def test_of_an_or_the_choice_that_allows_the_use_is_taken() -> None:
    licence = compute(["LicenseRef-FLUX.1-dev-Non-Commercial OR MIT", "Apache-2.0"])
    assert licence.expression == "Apache-2.0 AND MIT" and "commercial" in licence.allows
    # Each of two is better for one part: it has to be one choice for all.
    both = compute(["CC-BY-SA-4.0 OR CC-BY-NC-4.0", OURS], Asker("internal", ours=["acme"]))
    assert both.expression == f"CC-BY-NC-4.0 AND {OURS.replace('Acme', 'acme')}" and both.conflict is None
    nested = compute(["(MIT AND CC-BY-NC-4.0) OR (Apache-2.0 AND CC-BY-4.0)"])
    assert nested.expression == "Apache-2.0 AND CC-BY-4.0"


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (OURS, "is proprietary"),
        ("CC-BY-NC-4.0", "forbids commercial use"),
        ("CC-BY-NC-SA-4.0", "asks for itself"),
        ("openrail++", "adds restrictions"),
        ("LicenseRef-Nobody-Knows", "is unknown"),
    ],
)
def test_share_alike_conflicts_with_what_adds_restrictions(other: str, why: str) -> None:
    licence = compute(["CC-BY-SA-4.0", other], Asker(ours=["acme"]))
    assert licence.conflict and why in licence.conflict
    assert not {"outputs", "commercial"} & licence.allows and why in licence.reasons["outputs"]


def test_share_alike_goes_with_what_adds_nothing() -> None:
    licence = compute(["CC-BY-SA-4.0", "MIT", "Apache-2.0", "CC0-1.0"])
    assert licence.conflict is None and licence.allows == set(USES)
    assert "share what is made from it under CC-BY-SA-4.0" in licence.obligations


def test_no_derivatives_lets_nothing_be_shared() -> None:
    assert "lets nothing be shared" in (compute(["CC-BY-ND-4.0"]).conflict or "")
    assert compute(["CC-BY-ND-4.0"]).allows == {"internal"}


@pytest.mark.parametrize(
    ("licence", "asker", "may"),
    [
        ("stabilityai-ai-community", {}, False),
        ("stabilityai-ai-community", {"revenue": 1_000_000}, True),
        ("stabilityai-ai-community", {"revenue": 1_000_001}, False),
        ("tongyi-qianwen", {"users": 99e6}, True),
        ("tongyi-qianwen", {"users": 101e6}, False),
        ("tongyi-qianwen", {"revenue": 1}, False),
        (OURS, {"ours": ["ACME"]}, True),
        (OURS, {"ours": ["other"]}, False),
        (OURS, {"agreements": {"LicenseRef-Proprietary-acme": "contract 7"}}, True),
        ("LicenseRef-FLUX.1-dev-Non-Commercial", {"agreements": {"LicenseRef-FLUX.1-dev-Non-Commercial": "c"}}, True),
    ],
)
def test_who_we_are_decides(licence: str, asker: dict[str, object], may: bool) -> None:
    assert ("commercial" in allowed(licence, **asker)) is may


@pytest.mark.parametrize("text", ["MIT AND", "(", "MIT license of some kind", "MIT WITH", "AND"])
def test_no_expression_is_an_error_that_says_what_one_is(text: str) -> None:
    with pytest.raises(PolicyError, match="SPDX"):
        compute([text])


def test_alternatives_are_bounded() -> None:
    many = " AND ".join(f"(LicenseRef-a{i} OR LicenseRef-b{i})" for i in range(30))
    with pytest.raises(PolicyError, match="too many alternatives"):
        alternatives(many)


def test_every_row_names_its_source_and_every_model_a_row() -> None:
    for terms in table().values():
        assert terms.source.startswith("https://") and terms.version and terms.read and terms.name
        assert terms.commercial_outputs or not terms.commercial_weights
        for alias in terms.aliases:
            assert alternatives(alias) == [{terms.id}], alias


def test_the_models_of_the_families_have_licences() -> None:
    from pathlib import Path

    pages = (Path(__file__).parents[2] / "docs" / "families").glob("*.md")
    shown = [word for page in pages for word in page.read_text().split("https://huggingface.co/")[1:]]
    models = {word.split(")")[0] for word in shown if "/" in word.split(")")[0]}
    weights = {model for model in models if "blob" not in model and model.count("/") == 1}
    assert len(weights) > 8
    for model in weights:
        assert licence_of_model(model) in table(), model
    assert licence_of_model("PICO") == "Apache-2.0" and licence_of_model("somebody/else") == ""
