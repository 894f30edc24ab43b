"""Spaces of adapters: exact at full rank, refused across bases, and read back from a file as they were written."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from qrlora.errors import AdapterFileError, MismatchError
from qrlora.method.adapter import Adapter, load_adapter, save_adapter
from qrlora.method.basis import Basis
from qrlora.method.composition import Composition
from qrlora.method.space import Space, load_space, save_space
from samples import changed, make_adapter, make_basis, make_lora

COUNT = 5


@pytest.fixture(scope="module")
def basis(tmp_path_factory: pytest.TempPathFactory) -> Basis:
    return make_basis(tmp_path_factory.mktemp("basis"))


@pytest.fixture(scope="module")
def members(basis: Basis) -> list[Adapter]:
    made = [make_adapter(basis, seed=i, role="style", trigger="<s>", licence="MIT") for i in range(1, COUNT + 1)]
    return [dataclasses.replace(adapter, name=f"style{i}") for i, adapter in enumerate(made)]


def flat(adapter: Adapter) -> torch.Tensor:
    return torch.cat([delta.double().flatten() for delta in adapter.deltas.values()])


def test_members_are_reproduced_by_all_components(members: list[Adapter]) -> None:
    space = Space.of(members)
    assert space.count == COUNT - 1 and sum(space.shares) == pytest.approx(1)
    for i, member in enumerate(members):
        assert torch.allclose(flat(space.adapter(space.coordinates[i].tolist())), flat(member), atol=1e-5)


def test_mean_and_components_are_those_of_an_svd_of_all_numbers(members: list[Adapter]) -> None:
    space = Space.of(members, 2)
    rows = torch.stack([flat(member) for member in members])
    _, values, right = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    assert torch.allclose(flat(space.mean), rows.mean(0), atol=1e-6)
    assert torch.allclose(torch.tensor(space.variances, dtype=torch.float64), values[: COUNT - 1] ** 2 / COUNT)
    for k in range(2):
        found = torch.cat([part[k].double().flatten() for part in space.components.values()])
        expected = right[k] * values[k] / COUNT**0.5
        assert min((found - expected).norm(), (found + expected).norm()) < 1e-5 * expected.norm()
    assert torch.allclose(space.coordinates.std(0, correction=0), torch.ones(2, dtype=torch.float64))


def test_what_a_point_is_made_of_is_found_again(members: list[Adapter]) -> None:
    space = Space.of(members)
    found = space.project(space.adapter([0.5, -1.0, 2.0], mean=0.7))
    assert found.mean == pytest.approx(0.7, abs=1e-4) and found.unexplained < 1e-10
    assert found.coordinates == pytest.approx((0.5, -1.0, 2.0, 0.0), abs=1e-4)
    near = space.project(members[3]).nearest
    assert next(iter(near)) == "style3" and near["style3"] == pytest.approx(1)


def test_an_adapter_of_nothing_known_is_left_unexplained(members: list[Adapter], basis: Basis) -> None:
    stranger = make_adapter(basis, seed=99, role="style")
    assert Space.of(members).project(stranger).unexplained > 0.9


def test_a_point_is_an_ordinary_adapter(members: list[Adapter], tmp_path: Path) -> None:
    point = Space.of(members).adapter([1.0, -1.0])
    save_adapter(point, tmp_path / "point.safetensors")
    loaded = load_adapter(tmp_path / "point.safetensors")
    assert torch.equal(flat(loaded), flat(point))
    assert torch.allclose(flat(Composition([(loaded, 2.0)]).adapter()), 2 * flat(point), atol=1e-6)


@pytest.mark.parametrize("triangular", [True, False])
def test_a_file_holds_the_space(basis: Basis, tmp_path: Path, triangular: bool) -> None:
    members = [make_adapter(basis, seed=i, role="style", triangular=triangular) for i in range(4)]
    space, path = Space.of(members, 2), tmp_path / "a.space.safetensors"
    save_space(space, path)
    loaded = load_space(path)
    assert loaded.digest == space.digest and loaded.members == space.members
    assert loaded.variances == space.variances and loaded.mean.metadata == space.mean.metadata
    assert torch.allclose(loaded.coordinates, space.coordinates, atol=1e-6)


def test_a_damaged_file_is_refused(members: list[Adapter], tmp_path: Path) -> None:
    path = tmp_path / "a.space.safetensors"
    save_space(Space.of(members), path)
    whole = bytearray(path.read_bytes())
    whole[-5] ^= 1
    path.write_bytes(whole)
    with pytest.raises(AdapterFileError, match="damaged"):
        load_space(path)
    path.write_bytes(whole[:-8])
    with pytest.raises(AdapterFileError, match="truncated"):
        load_space(path)


def test_a_space_is_no_adapter_and_an_adapter_no_space(members: list[Adapter], tmp_path: Path) -> None:
    space, adapter = tmp_path / "a.space.safetensors", tmp_path / "a.safetensors"
    save_space(Space.of(members), space)
    save_adapter(members[0], adapter)
    with pytest.raises(AdapterFileError, match="a space of adapters, no adapter"):
        load_adapter(space)
    with pytest.raises(AdapterFileError, match="no space of adapters"):
        load_space(adapter)
    with pytest.raises(AdapterFileError, match="a name of its own"):
        save_space(Space.of(members), tmp_path / "b.safetensors")


def test_other_bases_roles_and_columns_are_refused_with_both_values(
    members: list[Adapter], basis: Basis, tmp_path: Path
) -> None:
    other = make_basis(tmp_path, seed=1)
    cases = {
        "subject": make_adapter(basis, seed=9, role="subject"),
        "(4, 5, 6, 7)": make_adapter(basis, (4, 5, 6, 7), seed=9, role="style"),
        "8.0": make_adapter(basis, seed=9, role="style", alpha=8.0),
        make_adapter(other).metadata.basis_fingerprint: make_adapter(other, seed=9, role="style"),
    }
    for said, adapter in cases.items():
        with pytest.raises(MismatchError, match="not of one space") as caught:
            Space.of([*members, adapter])
        assert said in str(caught.value.got) and said not in str(caught.value.expected)
    with pytest.raises(MismatchError, match="no ΔR on a basis"):
        Space.of([members[0], make_lora(role="style")])


def test_too_few_adapters_or_one_twice_span_no_space(members: list[Adapter]) -> None:
    for adapters, components in ((members[:1], None), (members, COUNT), ([], None)):
        with pytest.raises(MismatchError, match="at most one component less"):
            Space.of(adapters, components)
    with pytest.raises(MismatchError, match="twice"):
        Space.of([*members, members[0]])


def test_licences_of_all_members_are_said(members: list[Adapter]) -> None:
    others = [*members[:2], changed(members[2], licence="CC-BY-4.0"), changed(members[3], licence="")]
    assert Space.of(members).mean.metadata.licence == "MIT"
    assert Space.of(others).mean.metadata.licence == "CC-BY-4.0, MIT, none given"
