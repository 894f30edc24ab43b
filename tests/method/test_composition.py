"""Compositions: exact, linear and commutative on one basis; refused, or cut back to a rank, on several."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qrlora.errors import MismatchError
from qrlora.lab.baselines.deltas import Delta
from qrlora.lab.baselines.merges import null_space
from qrlora.method.basis import Basis, fingerprint
from qrlora.method.composition import Composition, compose_delta_weights, default_strength, project_out, similarity
from samples import EPS, SHAPES, assert_rounded, changed, delta_weights, make_adapter, make_basis, make_lora

EVEN, ODD = (0, 2, 4, 6), (1, 3, 5, 7)
weights = st.floats(-3.0, 3.0, allow_nan=False)


@pytest.fixture(scope="module")
def basis(tmp_path_factory: pytest.TempPathFactory) -> Basis:
    return make_basis(tmp_path_factory.mktemp("basis"))


def weighted_sum(parts, basis):
    """Σ λ ΔW, explicitly, float64."""
    terms = [{name: weight * delta for name, delta in delta_weights(a, basis).items()} for a, weight in parts]
    return {name: sum(term[name] for term in terms if name in term) for name in SHAPES}


def assert_same(got, expected, terms=64):
    for name, delta in expected.items():
        assert_rounded(got[name], delta, terms=terms)


@pytest.mark.parametrize("columns", [(EVEN, EVEN), (EVEN, ODD), ((0, 1, 2), (2, 3)), ((0,), (7,), EVEN)])
@given(data=st.data())
@settings(max_examples=10, deadline=None)
def test_a_composition_is_the_weighted_sum_of_delta_weights(basis, columns, data):
    parts = [(make_adapter(basis, c, seed=i, alpha=2.5 * i), data.draw(weights)) for i, c in enumerate(columns, 1)]
    composed = Composition(parts).adapter()
    assert composed.metadata.columns == tuple(sorted({c for part in columns for c in part}))
    assert composed.metadata.alpha == composed.metadata.rank
    assert_same(delta_weights(composed, basis), weighted_sum(parts, basis))


@given(scale=weights, a=weights, b=weights, c=weights)
@settings(max_examples=20, deadline=None)
def test_compositions_are_linear_and_commutative(basis, scale, a, b, c):
    one, two, three = (make_adapter(basis, columns, seed=i) for i, columns in enumerate((EVEN, ODD, EVEN)))
    parts = [(one, a), (two, b), (three, c)]
    whole = Composition(parts).adapter()

    def size(name):
        return sum(abs(weight) * float(adapter.deltas[name].abs().max()) for adapter, weight in parts)

    for order in itertools.permutations(parts):
        other = Composition(order).adapter()
        for name, delta in whole.deltas.items():
            assert_rounded(other.deltas[name], delta, terms=8, size=size(name))
    nested = Composition([(Composition(parts[:2]).adapter(), scale), (three, scale * c)]).adapter()
    for name, delta in nested.deltas.items():
        assert_rounded(delta, scale * whole.deltas[name], terms=8, size=abs(scale) * size(name))


def test_a_rank_of_basis_that_the_fingerprint_does_not_bear_out_is_refused(basis):
    with pytest.raises(MismatchError, match="a basis that this version does not make"):
        Composition([(changed(make_adapter(basis), basis_rank=10**12), 1.0)])


def test_roles_stay_disjoint_in_a_layer_that_holds_fewer_columns(basis):
    """proj_out holds three of eight: two are the subject's, one is the style's, none that of who owns the last two."""
    subject, style, last = (make_adapter(basis, columns, seed=i) for i, columns in enumerate((EVEN, ODD, (6, 7))))
    assert (subject.columns("proj_out"), style.columns("proj_out")) == ((0, 2), (1,)) and "proj_out" not in last.deltas
    whole = Composition([(subject, 0.7), (style, -1.2), (last, 2.0)])
    assert whole.adapter().columns("proj_out") == (0, 1, 2) and whole.adapter().deltas["proj_out"].shape == (3, 20)
    found = whole.interference().layers["proj_out"]
    assert found.cosine[0][1] == 0 and found.energy[2] == 0
    assert found.sum_energy == pytest.approx(sum(found.energy))
    assert similarity(subject, style).layers["proj_out"]["delta_w"] == 0


def test_three_are_projected_as_in_the_lab(basis):
    """Each out of the row spaces of both others, also where these cancel each other (the third undoes the second); an
    adapter of zeros takes nothing from the others."""
    one, two = make_adapter(basis, EVEN, seed=1), make_adapter(basis, ODD, seed=2)
    parts = [(one, 1.0), (two, 1.0), (two, -1.0), (make_adapter(basis, ODD, seed=3), 0.4)]
    mute = dataclasses.replace(two, deltas={name: torch.zeros_like(delta) for name, delta in two.deltas.items()})
    for some in (parts, parts[:3], [(one, 1.0), (mute, 1.0), (mute, 1.0)]):
        learned = [
            {n: Delta(basis[n].q[:, list(a.columns(n))], w * a.scaling * d) for n, d in a.deltas.items()}
            for a, w in some
        ]
        expected = {name: delta.dense() for name, delta in null_space(learned).items()}
        composed = delta_weights(Composition(some, 0.5).adapter(), basis)
        assert_same({n: d.float() for n, d in composed.items()}, expected)


def test_projection_is_the_lab_s_and_stays_on_the_basis(basis):
    """`null_space` of qrlora.lab.baselines.merges, which works on factors of ΔW and knows of no basis."""
    one, two = make_adapter(basis, EVEN, seed=1, alpha=3.0), make_adapter(basis, ODD, seed=2)
    parts = [(one, 1.4), (two, -0.6)]
    composed = Composition(parts, 0.5).adapter()
    learned = [
        {n: Delta(basis[n].q[:, list(a.columns(n))], w * a.scaling * d) for n, d in a.deltas.items()} for a, w in parts
    ]
    expected = {name: delta.dense() for name, delta in null_space(learned).items()}
    assert_same({n: d.float() for n, d in delta_weights(composed, basis).items()}, expected)
    assert composed.metadata.provenance["null_space"] == 0.5 and not composed.metadata.triangular
    assert set(composed.metadata.columns) == {*EVEN, *ODD}
    kept = project_out(parts, 0.5)
    assert [weight for _, weight in kept] == [weight for _, weight in parts]
    assert not any(part.metadata.triangular for part, _ in kept) and kept[0][0].metadata.columns == EVEN
    summed = Composition([(kept[0][0], 0.3), (kept[1][0], 2.0)]).adapter()
    assert_same(summed.deltas, Composition([(one, 0.3), (two, 2.0)], 0.5).adapter().deltas)
    back = Composition(parts[::-1], 0.5).adapter()
    assert_same(back.deltas, composed.deltas)


def test_at_strength_one_nothing_is_left_in_the_rows_of_the_others(basis):
    one, two = make_adapter(basis, (0, 2), seed=1), make_adapter(basis, (1, 3), seed=2)
    parts = [(one, 1.0), (two, 1.0)]
    composed = Composition(parts, 1.0)
    for name, delta in composed.adapter().deltas.items():
        crossed, size = one.deltas[name] @ two.deltas[name].T, float(one.deltas[name].norm() * two.deltas[name].norm())
        assert_rounded(delta[[0, 2]] @ two.deltas[name].T, 0 * crossed, terms=64, size=size)
        assert crossed.abs().max() > 0.01 * size
    assert 0 < composed.energy_kept() < 1 and Composition(parts).energy_kept() == 1
    absent = Composition([(one, 1.0), (two, 0.0)], 1.0).adapter()
    for name, delta in one.deltas.items():
        assert torch.equal(absent.deltas[name][[0, 2]], delta), "an adapter at weight 0 takes nothing"
    assert "null_space" not in Composition(parts).adapter().metadata.provenance
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(MismatchError, match="out of range"):
            Composition(parts, wrong)


def test_at_strength_zero_the_composition_is_the_exact_sum(basis):
    parts = [(make_adapter(basis, EVEN, seed=1), 1.4), (make_adapter(basis, ODD, seed=2), -0.6)]
    composed = Composition(parts, 0.0).adapter()
    for name, delta in composed.deltas.items():
        for adapter, weight in parts:
            rows = [composed.columns(name).index(column) for column in adapter.columns(name)]
            assert torch.equal(delta[rows], (weight * adapter.scaling * adapter.deltas[name].double()).float())
    assert project_out(parts, 0.0) == parts and composed.metadata.triangular


def test_only_a_subject_with_a_style_is_projected_by_default(basis):
    one, two = make_adapter(basis, EVEN, seed=1), make_adapter(basis, ODD, seed=2)

    def roles(*names: str) -> list:
        named = zip((one, two, one), names, strict=False)
        return [dataclasses.replace(a, metadata=dataclasses.replace(a.metadata, role=role)) for a, role in named]

    assert default_strength(roles("subject", "style")) == default_strength(roles("style", "subject")) == 0.5
    for others in (("subject",), ("style", "style"), ("", ""), ("composition", "style"), ("subject", "style", "style")):
        assert default_strength(roles(*others)) == 0, others


def test_alone_at_weight_one_an_adapter_is_itself(basis):
    adapter = make_adapter(basis, EVEN)
    composed = Composition([(adapter, 1.0)]).adapter()
    assert all(torch.equal(composed.deltas[name], delta) for name, delta in adapter.deltas.items())


def test_an_adapter_and_its_negative_leave_nothing(basis):
    adapter = make_adapter(basis, EVEN)
    composed = Composition([(adapter, 0.7), (adapter, -0.7)]).adapter()
    assert not any(delta.any() for delta in composed.deltas.values())


def test_parts_of_different_layers_keep_their_own(basis):
    few = {"blocks.0.ff": SHAPES["blocks.0.ff"]}
    all_layers, one_layer = make_adapter(basis, EVEN), make_adapter(basis, ODD, shapes=few)
    digests = {name: basis.digests[name] for name in few}
    one_layer = changed(one_layer, basis_fingerprint=fingerprint(digests, 8, "fast", 0))
    composed = Composition([(all_layers, 1.0), (one_layer, 1.0)]).adapter()
    assert set(composed.deltas) == set(SHAPES) and composed.metadata.basis_fingerprint == basis.fingerprint
    conv = basis["conv"].q
    assert_rounded(composed.delta_weight("conv", conv), all_layers.delta_weight("conv", conv), terms=16)
    report = Composition([(all_layers, 1.0), (one_layer, 1.0)]).interference()
    assert report.layers["conv"].energy[1] == 0.0 and report.layers["conv"].cosine[0][1] == 0.0


def test_a_composition_remembers_its_parts_and_their_licences(basis):
    subject = make_adapter(basis, EVEN, role="subject", trigger="<c>", licence="CC-BY-4.0", recipe={"steps": 5})
    style = make_adapter(basis, ODD, seed=9, role="style", trigger="<s>", licence="Apache-2.0")
    metadata = Composition([(subject, 0.9), (style, -0.25)]).adapter().metadata
    parts = metadata.provenance["parts"]
    assert metadata.role == "composition" and metadata.trigger == "<c>, <s>"
    assert metadata.licence == "CC-BY-4.0; Apache-2.0"
    assert [part["digest"] for part in parts] == [subject.digest, style.digest]
    assert [part["weight"] for part in parts] == [0.9, -0.25]
    assert parts[0]["recipe_digest"] == subject.metadata.recipe_digest


def test_triangles_stay_triangles_and_dense_parts_make_dense_sums(basis):
    triangular, dense = make_adapter(basis, EVEN), make_adapter(basis, ODD, triangular=False)
    assert Composition([(triangular, 1.0), (make_adapter(basis, ODD), 1.0)]).adapter().metadata.triangular
    assert not Composition([(triangular, 1.0), (dense, 1.0)]).adapter().metadata.triangular


@pytest.mark.parametrize(
    "options, shown",
    [({"seed": 5}, "base_weights"), ({"rank": 9}, "'basis_rank': 9"), ({"algorithm": "exact"}, "'algorithm': 'exact'")],
)
def test_other_bases_are_refused_with_both_values_and_the_way_out(basis, tmp_path, options, shown):
    ours, theirs = make_adapter(basis, EVEN), make_adapter(make_basis(tmp_path, **options), EVEN)
    with pytest.raises(MismatchError) as caught:
        Composition([(ours, 1.0), (theirs, 1.0)])
    message = str(caught.value)
    assert shown in message and "compose_delta_weights" in message
    assert ours.metadata.basis_fingerprint in message and theirs.metadata.basis_fingerprint in message


def test_a_basis_of_another_version_is_refused(basis):
    with pytest.raises(MismatchError, match="this version does not make"):
        Composition([(changed(make_adapter(basis), basis_fingerprint="0" * 64), 1.0)])


@pytest.mark.parametrize("parts", [[], [float("nan")], [float("inf")]])
def test_no_parts_and_weights_that_are_no_numbers_are_refused(basis, parts):
    with pytest.raises(MismatchError, match="nothing to compose"):
        Composition([(make_adapter(basis), weight) for weight in parts])


def test_plain_lora_is_refused_and_pointed_to_the_other_way(basis):
    with pytest.raises(MismatchError, match="compose_delta_weights"):
        Composition([(make_adapter(basis), 1.0), (make_lora(), 1.0)])


# Interference


@pytest.mark.parametrize("columns", [(EVEN, EVEN), (EVEN, (2, 3, 4)), (EVEN, ODD)])
def test_interference_from_the_files_is_that_of_the_delta_weights(basis, columns):
    parts = [(make_adapter(basis, columns[0], alpha=3.0), 0.8), (make_adapter(basis, columns[1], seed=4), -1.5)]
    report = Composition(parts).interference()
    explicit = [delta_weights(adapter, basis) for adapter, _ in parts]
    total = weighted_sum(parts, basis)
    one, two = (torch.cat([delta[name].flatten() for name in SHAPES]) for delta in explicit)
    cosine = torch.nn.functional.cosine_similarity(one, two, dim=0)
    assert report.total.cosine[0][1] == pytest.approx(float(cosine), abs=64 * EPS)
    assert report.total.energy == pytest.approx([0.64 * float(one @ one), 2.25 * float(two @ two)], rel=64 * EPS)
    assert report.total.sum_energy == pytest.approx(sum(float(d.square().sum()) for d in total.values()), rel=64 * EPS)
    for name, layer in report.layers.items():
        one, two = explicit[0][name].flatten(), explicit[1][name].flatten()
        cosine = torch.nn.functional.cosine_similarity(one, two, dim=0)
        assert layer.cosine[0][1] == pytest.approx(float(cosine), abs=64 * EPS)
    json.dumps(report.to_dict(), allow_nan=False)


def test_disjoint_columns_do_not_interfere(basis):
    report = Composition([(make_adapter(basis, EVEN), 1.0), (make_adapter(basis, ODD, seed=3), 1.0)]).interference()
    assert report.total.cosine[0][1] == 0.0
    assert report.total.sum_energy == pytest.approx(sum(report.total.energy), rel=64 * EPS)


def test_shared_rows_are_the_principal_angles(basis):
    one, two = make_adapter(basis, EVEN, triangular=False), make_adapter(basis, (1, 3), seed=3, triangular=False)
    report = Composition([(one, 1.0), (two, 1.0)]).interference()
    for name, layer in report.layers.items():
        first, second = (torch.linalg.qr(a.deltas[name].double().T).Q for a in (one, two))
        angles = torch.linalg.svdvals(first.T @ second)
        assert layer.shared_rows[0][1] == pytest.approx(float(angles.square().mean()), abs=64 * EPS)
        assert layer.shared_rows[0][0] == pytest.approx(1.0, abs=64 * EPS)


def test_an_untrained_part_interferes_with_nothing(basis):
    fresh = make_adapter(basis, EVEN)
    for delta in fresh.deltas.values():
        delta.zero_()
    report = Composition([(fresh, 1.0), (make_adapter(basis, EVEN), 1.0)]).interference()
    assert report.total.cosine[0] == [0.0, 0.0] and report.total.shared_rows[0][1] == 0.0


# Different bases, plain LoRA


def test_delta_weights_of_different_bases_add_up_exactly_at_full_rank(basis, tmp_path):
    other = make_basis(tmp_path, seed=5)
    parts = [(make_adapter(basis, EVEN), 0.9), (make_adapter(other, ODD, seed=3), -0.4), (make_lora(alpha=1.5), 1.0)]
    composed, loss = compose_delta_weights(parts, [basis, other, None], rank=11)
    expected = {
        name: 0.9 * delta_weights(parts[0][0], basis)[name]
        - 0.4 * delta_weights(parts[1][0], other)[name]
        + delta_weights(parts[2][0])[name]
        for name in SHAPES
    }
    assert_same(delta_weights(composed), expected)
    assert loss.total == pytest.approx(0.0, abs=1e-12) and composed.metadata.method == "lora"
    assert loss.other_weights == tuple(sorted(SHAPES))
    assert len(composed.metadata.provenance["parts"]) == 3


def test_plain_loras_are_projected_as_in_the_lab_and_as_on_a_basis(basis):
    """`null_space` again, on factors that no orthonormal Q stands in; and `Composition` where one does."""
    one, two = make_lora(seed=1, alpha=3.0), make_lora(seed=2)
    parts = [(one, 1.4), (two, -0.6)]
    composed, loss = compose_delta_weights(parts, [None, None], 8, null_space=0.5)
    learned = [{n: Delta(a.ups[n], w * a.scaling * d) for n, d in a.deltas.items()} for a, w in parts]
    expected = {name: delta.dense() for name, delta in null_space(learned).items()}
    assert_same({n: d.float() for n, d in delta_weights(composed).items()}, expected)
    assert composed.metadata.provenance["null_space"] == 0.5
    whole = {n: sum(part[n].dense() for part in learned) for n in SHAPES}
    kept = sum(float(d.square().sum()) for d in expected.values())
    assert loss.energy_kept == pytest.approx(
        kept / sum(float(d.square().sum()) for d in whole.values()), rel=1024 * EPS
    )
    assert loss.to_dict()["energy_kept"] == loss.energy_kept < 1

    ours = [(make_adapter(basis, EVEN, seed=1), 1.4), (make_adapter(basis, ODD, seed=2), 1.0)]
    on_basis, (summed, found) = Composition(ours, 0.7), compose_delta_weights(ours, [basis, basis], 8, 0.7)
    assert_same(delta_weights(summed), delta_weights(on_basis.adapter(), basis))
    assert found.energy_kept == pytest.approx(on_basis.energy_kept(), rel=1024 * EPS)


def test_an_adapter_at_weight_zero_takes_nothing_from_a_plain_lora(basis):
    one, two = make_lora(seed=1), make_lora(seed=2)
    composed, loss = compose_delta_weights([(one, 1.0), (two, 0.0)], [None, None], 8, null_space=1.0)
    assert_same(delta_weights(composed), delta_weights(one))
    assert loss.energy_kept == pytest.approx(1.0, abs=64 * EPS)
    whole = compose_delta_weights([(one, 1.0), (two, 1.0)], [None, None], 8)
    assert whole[1].energy_kept == 1.0 and "null_space" not in whole[0].metadata.provenance
    with pytest.raises(MismatchError, match="out of range"):
        compose_delta_weights([(one, 1.0)], [None], 2, null_space=1.5)
    narrow = {name: (shape[0], 5) for name, shape in two.shapes.items()}
    other = dataclasses.replace(two, shapes=narrow, deltas={name: delta[:, :5] for name, delta in two.deltas.items()})
    with pytest.raises(MismatchError, match="inputs of other width"):
        project_out([(one, 1.0), (other, 1.0)], 0.5)


def test_cutting_back_to_a_rank_is_the_best_cut_and_says_what_it_lost(basis):
    parts = [(make_adapter(basis, EVEN, triangular=False), 1.0), (make_lora(), 0.5)]
    composed, loss = compose_delta_weights(parts, [basis, None], rank=2)
    for name in SHAPES:
        whole = delta_weights(parts[0][0], basis)[name] + 0.5 * delta_weights(parts[1][0])[name]
        values = torch.linalg.svdvals(whole).square()
        lost = (whole - delta_weights(composed)[name]).square().sum() / values.sum()
        assert loss.layers[name] == pytest.approx(float(values[2:].sum() / values.sum()), abs=64 * EPS)
        assert loss.layers[name] == pytest.approx(float(lost), abs=64 * EPS)
    assert 0 < loss.total < 1
    json.dumps(loss.to_dict(), allow_nan=False)


def test_a_rank_beyond_the_sum_is_padded_with_zeros(basis):
    adapter = make_adapter(basis, (0, 1))
    composed, loss = compose_delta_weights([(adapter, 1.0)], [basis], rank=6)
    assert composed.metadata.rank == 6 and loss.total == pytest.approx(0.0, abs=1e-12)
    assert_same(delta_weights(composed), delta_weights(adapter, basis))


def test_delta_weights_refuse_missing_wrong_and_foreign(basis, tmp_path):
    adapter = make_adapter(basis, EVEN)
    with pytest.raises(MismatchError, match="needs its basis"):
        compose_delta_weights([(adapter, 1.0)], [None], rank=2)
    with pytest.raises(MismatchError, match="another base weight"):
        compose_delta_weights([(adapter, 1.0)], [make_basis(tmp_path, seed=5)], rank=2)
    with pytest.raises(MismatchError, match="different families"):
        compose_delta_weights([(adapter, 1.0), (make_lora(family="flux"), 1.0)], [basis, None], rank=2)
    with pytest.raises(MismatchError, match="cannot compose"):
        compose_delta_weights([(adapter, 1.0)], [basis], rank=0)


# Similarity


def test_an_adapter_is_like_itself(basis):
    adapter = make_adapter(basis, EVEN)
    report = similarity(adapter, adapter, basis, basis)
    assert set(report.total) == {"q", "r", "delta_r", "delta_w"}
    assert all(
        value == pytest.approx(1.0, abs=64 * EPS) for layer in report.layers.values() for value in layer.values()
    )


def test_q_and_r_are_compared_only_when_the_bases_are_given(basis):
    a, b = make_adapter(basis, EVEN), make_adapter(basis, EVEN, seed=3)
    assert set(similarity(a, b).total) == {"delta_r", "delta_w"}
    known = similarity(a, b, basis, basis)
    assert known.total["q"] == pytest.approx(1.0, abs=64 * EPS)
    name = "blocks.0.ff"
    trained = [(basis[name].r[list(EVEN)] + adapter.deltas[name]).flatten() for adapter in (a, b)]
    expected = torch.nn.functional.cosine_similarity(*trained, dim=0)
    assert known.layers[name]["r"] == pytest.approx(float(expected), abs=64 * EPS)


def test_delta_weights_of_other_bases_are_compared_through_their_q(basis, tmp_path):
    other = make_basis(tmp_path, seed=5)
    a, b = make_adapter(basis, EVEN), make_adapter(other, EVEN, seed=3)
    assert "delta_w" not in similarity(a, b).total
    report = similarity(a, b, basis, other)
    one, two = delta_weights(a, basis)["conv"].flatten(), delta_weights(b, other)["conv"].flatten()
    cosine = torch.nn.functional.cosine_similarity(one, two, dim=0)
    assert report.layers["conv"]["delta_w"] == pytest.approx(float(cosine), abs=64 * EPS)


def test_plain_loras_are_compared_by_their_factors_and_delta_weights(basis):
    a, b = make_lora(), make_lora(seed=7)
    report = similarity(a, b)
    assert set(report.total) == {"a", "b", "delta_w"}
    one, two = delta_weights(a)["conv"].flatten(), delta_weights(b)["conv"].flatten()
    cosine = torch.nn.functional.cosine_similarity(one, two, dim=0)
    assert report.layers["conv"]["delta_w"] == pytest.approx(float(cosine), abs=64 * EPS)
    assert set(similarity(a, make_lora(rank=5)).total) == {"delta_w"}
    assert set(similarity(a, make_adapter(basis), None, basis).total) == {"delta_w"}


def test_adapters_without_a_layer_in_common_have_no_similarity(basis):
    few = {"blocks.0.ff": SHAPES["blocks.0.ff"]}
    rest = {name: shape for name, shape in SHAPES.items() if name not in few}
    report = similarity(make_adapter(basis), make_adapter(basis, shapes=few))
    assert report.only_first == tuple(sorted(rest)) and report.only_second == ()
    with pytest.raises(MismatchError, match="no layer in common"):
        similarity(make_adapter(basis, shapes=few), make_adapter(basis, shapes=rest))
