"""`qrlora policy` and `qrlora approval` as they are typed, and what docs/policy.md shows of them."""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path

import pytest

from company import Company
from qrlora.apps.cli import main

ROOT = Path(__file__).parents[2]
RULES = str(ROOT / "brands/policy.toml")


@pytest.fixture
def company(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Company:
    monkeypatch.setenv("QRLORA_KEYS", str(tmp_path / "keys"))
    monkeypatch.setenv("QRLORA_ACTOR", "ada")
    return Company(tmp_path)


def bare(text: str) -> str:
    """Without the digits of digests, which are others each time."""
    return re.sub(r"\b[0-9a-f]{8,12}\b", "…", text)


@pytest.mark.parametrize("name", ["policy.toml", "out of explain", "out of test"])
def test_the_page_shows_what_the_commands_print(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if name == "policy.toml":
        printed = Path(RULES).read_text()
    else:
        cases = [str(ROOT / "brands/policy-cases.toml")] if name == "out of test" else []
        assert main(["policy", name.removeprefix("out of "), *cases, "--policy", RULES]) == 0
        printed = capsys.readouterr().out
    assert textwrap.indent(printed, "    ") in (ROOT / "docs/policy.md").read_text()


def test_a_case_that_comes_out_otherwise_ends_with_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = tmp_path / "cases.toml"
    cases.write_text('[[case]]\nname = "nothing"\nrefused_by = ["weight"]\n')
    assert main(["policy", "test", str(cases), "--policy", RULES]) == 1
    assert "OTHERWISE    nothing: refused by combine.adapters, combine.roles, expected" in capsys.readouterr().out
    cases.write_text('[[case]]\nname = "nothing"\ncolour = "red"\n')
    assert main(["policy", "test", str(cases), "--policy", RULES]) == 2
    assert "case.0.colour" in capsys.readouterr().err


def test_check_prints_every_rule_and_ends_with_one(company: Company, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--registry", str(company.registry.folder), "--policy", RULES]
    what = ["--adapter", "registry:teapot:0.9", "--adapter", "registry:chalk:1.4"]
    assert main(["policy", "check", *where, *what, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    refused = {one["rule"] for one in found["findings"] if not one["passed"]}
    assert refused == {"licence.use", "combine.owners", "weight"} and not found["permitted"]
    assert main(["policy", "check", *where, *what]) == 1
    assert "refused  weight: chalk@v1 at weight 1.4; expected at least 0 and at most 1" in capsys.readouterr().out


def test_from_a_request_to_a_revocation(company: Company, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--registry", str(company.registry.folder)]
    what = [*where, "--adapter", "registry:teapot:0.9", "--adapter", "registry:chalk:0.8", "--null-space", "0.5"]

    def run(*arguments: str, code: int = 0) -> str:
        assert main(["approval", *arguments]) == code, capsys.readouterr()
        printed = capsys.readouterr()
        return printed.out + printed.err

    def digest(text: str, word: str) -> str:
        return re.search(rf"{word} (sha256:\w+)", text)[1]  # type: ignore[index]

    asked = digest(run("request", *what), "request")
    assert "approved by nobody: 0 of 1" in run("verify", *what, code=1)
    assert "nobody's whom this registry trusts" not in run("approve", asked, *where, "--key", "ada", code=2)
    given = digest(run("approve", asked, *where, "--key", "grace"), "approval")
    assert "approved by grace: 1 of 1" in run("verify", *what)
    other = [one.replace("0.8", "0.7") for one in what]
    refused = run("verify", *other, code=1)
    assert textwrap.indent(bare(refused), "    ") in bare((ROOT / "docs/approval.md").read_text())
    run("reject", asked, *where, "--key", "linus", "--reason", "no")
    run("revoke", given, *where, "--key", "olga", "--reason", "the campaign is over")
    assert "revoked by olga" in run("verify", *what, code=1)
    listed = run("list", *where).splitlines()
    assert [line.split()[1] for line in listed] == ["revoke", "reject", "approve", "request"]


def test_activate_refuses_a_downgrade(company: Company, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where, path = ["--registry", str(company.registry.folder)], tmp_path / "policy.toml"
    for version, code in ((2, 0), (1, 2)):
        path.write_text(f'name = "p"\nversion = {version}\n')
        assert main(["policy", "activate", str(path), *where]) == code
    assert "a version above 2, or the signature of an operator" in capsys.readouterr().err
    assert main(["policy", "activate", str(path), *where, "--key", "olga"]) == 0


def test_compose_and_export_ask_the_policy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from qrlora.method.adapter import save_adapter
    from samples import make_adapter, make_basis

    basis = make_basis(tmp_path)
    for seed, (name, role) in enumerate((("mug", "subject"), ("chalk", "style"))):
        save_adapter(make_adapter(basis, seed=seed, role=role, licence="MIT"), tmp_path / f"{name}.safetensors")
    rules, mug, chalk = tmp_path / "p.toml", str(tmp_path / "mug.safetensors"), str(tmp_path / "chalk.safetensors")
    rules.write_text('name = "p"\nversion = 1\n[[weight]]\nrole = "style"\nat_most = 1.0\n')
    out = ["-o", str(tmp_path / "out.safetensors"), "--policy", str(rules)]
    assert main(["compose", mug, f"{chalk}:1.2", *out]) == 2
    assert "compose is not permitted" in capsys.readouterr().err and not (tmp_path / "out.safetensors").exists()
    assert main(["compose", mug, f"{chalk}:1.0", *out]) == 0
    rules.write_text('name = "p"\nversion = 1\n[combine]\nroles = [["subject"]]\n')
    assert main(["export", chalk, *out]) == 2
    assert "combine.roles: style; expected subject" in capsys.readouterr().err
    assert main(["generate", "--prompt", "a mug", "--adapter", chalk, "-o", str(tmp_path / "x"), *out[2:]]) == 2
    assert "generate is not permitted" in capsys.readouterr().err
