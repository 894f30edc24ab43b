"""A catalog in one process: its two files, what is made again and what is not, failures, the policy, the gallery."""

from __future__ import annotations

import csv
import json
import re
import sqlite3
from collections import deque
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import catalogs
from qrlora.apps.cli import main
from qrlora.errors import DataError, QrloraError, RecipeError
from qrlora.operations.catalog.engine import Lost, drain
from qrlora.operations.catalog.journal import Journal, Outcome
from qrlora.operations.catalog.plan import Settings, cells, pictures
from qrlora.operations.catalog.run import MOST_ATTEMPTS, Line
from qrlora.operations.catalog.tables import folder_name, no_registry, read_products, read_styles


@pytest.fixture(scope="module")
def shelf(tiny_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shelf")
    catalogs.adapters(tiny_sd3, folder, 3, 2)
    return folder


@pytest.fixture
def place(shelf: Path, tmp_path: Path) -> Path:
    for path in shelf.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def run(place: Path, model: Path, *more: str, **tables: Any) -> tuple[int, list[dict[str, Any]]]:
    """`qrlora catalog` in this process; the exit code, and the rows of its table."""
    arguments = catalogs.tables(place, 3, 2, **tables)
    code = main(["catalog", *arguments, "-o", str(place / "out"), "--model", str(model), "--workers", "0", *more])
    return code, rows(place / "out")


def rows(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "catalog.json").read_text())["pictures"] if (folder / "catalog.json").exists() else []


def made(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.glob("pictures/**/*.png")}


# ---------------------------------------------------------------------------------------- the files


def picture(path: Path) -> None:
    Image.radial_gradient("L").convert("RGB").save(path)


@pytest.mark.parametrize(
    "text",
    [
        "name,picture,weight\nred pot,a.png,0.9\n",
        "\ufeffName;Picture;Weight\r\nred pot;a.png;0,9\r\n;;\r\n",
        'sep=;\r\nname;picture;weight\r\n\r\n"red pot";a.png;0,9\r\n',
        "name\tpicture\tweight\nred pot\ta.png\t0.9\n",
    ],
    ids=["plain", "spreadsheet", "told", "tabs"],
)
def test_tables_as_spreadsheets_write_them(text: str, tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "products.csv").write_bytes(text.encode())
    (product,), unknown = read_products(tmp_path / "products.csv", no_registry)
    assert (product.name, product.folder, product.weight, product.called) == ("red pot", "red-pot", 0.9, "<c>")
    assert unknown == []


def test_every_bad_row_is_named_with_its_line(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    (tmp_path / "c.safetensors").write_bytes(b"no adapter")
    lines = [
        "name,picture,adapter,weight",
        "good,a.png,,",
        '"two\nlines",gone.png,,',
        "bad,b.png,,",
        ",a.png,,",
        "x,,,",
    ]
    lines += ["Good!,a.png,,", "much,a.png,,a lot", "long,a.png,,,,", "other,,c.safetensors,", "../..,a.png,,"]
    (tmp_path / "products.csv").write_text("\n".join(lines))
    with pytest.raises(DataError) as refused:
        read_products(tmp_path / "products.csv", no_registry)
    assert re.findall(r"line (\d+):", str(refused.value)) == ["3", "5", "6", "7", "8", "9", "10", "11", "12"]
    assert "the same name as in line 2" in str(refused.value)


@pytest.mark.parametrize("header", ["name,pictur", "name,picture,picture", "title,picture", "name,colour", ""])
def test_a_header_that_cannot_be_meant_is_refused(header: str, tmp_path: Path) -> None:
    (tmp_path / "products.csv").write_text(f"{header}\nred,a.png\n")
    with pytest.raises(DataError, match=r"first row|is empty|columns"):
        read_products(tmp_path / "products.csv", no_registry)


def test_names_never_leave_their_folder() -> None:
    assert folder_name("../../etc/passwd") == "etc-passwd"
    assert folder_name("赤い 茶瓶") == "赤い-茶瓶"
    assert "/" not in folder_name("a/b") and not folder_name(".hidden").startswith(".")


@pytest.mark.parametrize(
    "text, said",
    [
        ('[[style]]\nname = "a"', "neither a picture nor an adapter"),
        ('[[style]]\nname = "a"\npictur = "a.png"', "did you mean 'picture'"),
        ('prompts = ["a mug"]\n[[style]]\nname = "a"\npicture = "a.png"', "does not name the product"),
        ('[training]\nstep = 3\n[[style]]\nname = "a"\npicture = "a.png"', "did you mean 'steps'"),
        ('[training]\nrole = "style"\n[[style]]\nname = "a"\npicture = "a.png"', "sets role"),
        ('[[style]]\nname = "a"\npicture = "a.png"\n[[style]]\nname = "A!"\npicture = "a.png"', "another style"),
        ('[[style]]\nname = "a"\npicture = "a.png"\nnull_space = 2', "null_space"),
        ("", "required"),
    ],
)
def test_styles_that_cannot_be_used_are_refused(text: str, said: str, tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "styles.toml").write_text(text)
    with pytest.raises(RecipeError, match=said):
        read_styles(tmp_path / "styles.toml", no_registry)


def test_a_style_s_adapter_is_no_product_s(place: Path) -> None:
    (place / "products.csv").write_text("name,adapter\nred,s0.safetensors\n")
    with pytest.raises(DataError, match="adapter of a style"):
        read_products(place / "products.csv", no_registry)


# ---------------------------------------------------------------------------------------- what is made


def test_it_makes_all_and_then_nothing_again(place: Path, tiny_sd3: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = run(place, tiny_sd3, head="seeds = [0, 1]")
    assert code == 0 and [row["state"] for row in found] == ["done"] * 12
    assert {row["prompt"] for row in found} == {"a <c> in <s> style"}
    before = made(place / "out")
    assert sorted(before) == sorted(row["file"] for row in found)
    assert len({Path(place / "out" / name).read_bytes() for name in before}) == 12
    assert run(place, tiny_sd3, head="seeds = [0, 1]")[0] == 0
    assert made(place / "out") == before
    assert "12 done" in capsys.readouterr().out


def test_a_picture_is_the_one_that_generate_makes(place: Path, tiny_sd3: Path) -> None:
    run(place, tiny_sd3)
    parts = ["--adapter", f"{place}/p1.safetensors", "--adapter", f"{place}/s1.safetensors", "--null-space", "0.5"]
    prompt = ["--prompt", "a <c> in <s> style", "--model", str(tiny_sd3), "--steps", "1"]
    assert main(["generate", *prompt, *parts, "-o", str(place / "alone.png")]) == 0
    (path,) = (place / "out/pictures/product-1/style-1").glob("*.png")
    one, other = (list(Image.open(each).convert("RGB").tobytes()) for each in (path, place / "alone.png"))
    assert max(abs(a - b) for a, b in zip(one, other, strict=True)) <= 1


def test_what_changes_a_picture_makes_it_again_and_nothing_else(place: Path, tiny_sd3: Path) -> None:
    run(place, tiny_sd3)
    before = made(place / "out")
    catalogs.adapters(tiny_sd3, place, 1, 0, size=0.2)  # another product 0
    code, found = run(place, tiny_sd3)
    after = made(place / "out")
    assert code == 0 and all(after[name] == time for name, time in before.items())
    assert {row["product"] for row in found if row["file"] not in before} == {"product 0"}
    assert len(after) - len(before) == 2


def test_a_file_that_is_gone_or_cut_short_is_made_again(place: Path, tiny_sd3: Path) -> None:
    run(place, tiny_sd3)
    gone, short = (place / "out" / name for name in list(made(place / "out"))[:2])
    whole = short.read_bytes()
    gone.unlink(), short.write_bytes(whole[:100])
    assert run(place, tiny_sd3)[0] == 0
    assert gone.is_file() and len(short.read_bytes()) == len(whole)


def test_a_whole_file_without_its_row_is_kept(place: Path, tiny_sd3: Path) -> None:
    """The process that made it was killed between the file and the row."""
    run(place, tiny_sd3)
    before = made(place / "out")
    with sqlite3.connect(place / "out/catalog.db") as database:
        database.execute("DELETE FROM picture WHERE product = 'product 0'")
    database.close()
    assert run(place, tiny_sd3)[0] == 0
    assert made(place / "out") == before


def test_missing_adapters_are_trained_once(place: Path, tiny_sd3: Path) -> None:
    picture(place / "a.png")
    (place / "products.csv").write_text("name,word,picture\nred pot,pot,a.png\n")
    fields = '[sampling]\nsteps = 1\n[training]\nsteps = 2\nrank = 2\nbatch_size = 1\n[[style]]\nname = "s"\n'
    (place / "styles.toml").write_text(fields + 'adapter = "s0.safetensors"\npicture = "a.png"')
    arguments = [str(place / "products.csv"), str(place / "styles.toml"), "-o", str(place / "out")]
    options = ["--model", str(tiny_sd3), "--workers", "0"]
    assert main(["catalog", *arguments, *options]) == 0
    (adapter,) = (place / "out/adapters").iterdir()
    (row,) = rows(place / "out")
    assert row["prompt"] == "a <c> pot in <s> style" and row["scores"]["colours"] > 0
    before = adapter.stat().st_mtime_ns
    assert main(["catalog", *arguments, *options]) == 0
    assert adapter.stat().st_mtime_ns == before
    (place / "styles.toml").write_text((place / "styles.toml").read_text().replace("steps = 2", "steps = 3"))
    assert main(["catalog", *arguments, *options]) == 0
    assert len(list((place / "out/adapters").iterdir())) == 2  # another recipe


def test_one_bad_adapter_fails_its_cells_alone(place: Path, tiny_sd3: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = (place / "p1.safetensors").read_bytes()
    (place / "p1.safetensors").write_bytes(whole[:-8] + b"\x00\x00\xc0\x7f\x00\x00\xc0\x7f")  # NaN
    code, found = run(place, tiny_sd3)
    states = {(row["product"], row["state"]) for row in found}
    assert code == 1 and states == {("product 0", "done"), ("product 1", "failed"), ("product 2", "done")}
    assert all(row["reason"] for row in found if row["state"] == "failed")
    (place / "p1.safetensors").write_bytes(whole)
    assert run(place, tiny_sd3)[0] == 0


def test_a_brand_sheet_judges_and_another_one_makes_nothing_again(place: Path, tiny_sd3: Path) -> None:
    sheet = place / "brand.toml"
    sheet.write_text('[[forbidden]]\ncolour = "#ff0000"\n')
    _, found = run(place, tiny_sd3, "--brand", str(sheet))
    assert {row["passes"] for row in found} == {True}
    before = made(place / "out")
    sheet.write_text('[palette]\ncolours = ["#ff00ff"]\nat_least = 1.0\ntolerance = 0\n')
    _, found = run(place, tiny_sd3, "--brand", str(sheet))
    assert {row["passes"] for row in found} == {False} and all(row["reasons"] for row in found)
    assert made(place / "out") == before


# ---------------------------------------------------------------------------------------- the policy


POLICY = 'name = "house"\nversion = 1\n[combine]\nnull_space = [0.3, 1.0]\n'


def test_refused_cells_are_listed_and_stop_no_other(place: Path, tiny_sd3: Path) -> None:
    (place / "policy.toml").write_text(POLICY)
    arguments = catalogs.tables(place, 3, 2)
    styles = place / "styles.toml"
    styles.write_text(styles.read_text() + "null_space = 0.1\n")  # of the last style
    more = [
        "-o",
        str(place / "out"),
        "--model",
        str(tiny_sd3),
        "--workers",
        "0",
        "--policy",
        str(place / "policy.toml"),
    ]
    assert main(["catalog", *arguments, *more]) == 0
    found = rows(place / "out")
    assert [row["state"] for row in found] == ["done", "refused"] * 3
    assert all("0.3" in row["reason"] for row in found if row["state"] == "refused")
    assert not list((place / "out").glob("pictures/*/style-1"))
    page = (place / "out/index.html").read_text()
    assert "Refused by the policy" in page and "product 2 in style 1" in page


def test_a_registry_records_what_was_made_once(place: Path, tiny_sd3: Path) -> None:
    from qrlora.operations.registry import Registry

    registry = Registry.open(place / "registry", actor="ada")
    for _ in range(2):
        assert run(place, tiny_sd3, "--registry", str(place / "registry"))[0] == 0
    assert len(registry.search(kind="generated")) == 6 and len(registry.search(kind="composition")) == 6
    (edge,) = registry.edges(registry.search(kind="generated")[0].digest, relation="generated_by")
    assert {one.relation for one in registry.edges(edge.target)} >= {"composed_of"}
    adapter = registry.search(kind="adapter")[0]
    registry.set_alias("first", "live", adapter.digest)
    (place / "products.csv").write_text("name,adapter\none,registry:first@live\n")
    arguments = [str(place / "products.csv"), str(place / "styles.toml"), "-o", str(place / "new")]
    options = ["--model", str(tiny_sd3), "--workers", "0"]
    assert main(["catalog", *arguments, *options]) == 2  # no registry is in play
    code = main(["catalog", *arguments, *options, "--registry", str(place / "registry")])
    assert code == (0 if adapter.role == "subject" else 2)
    registry.close()


# ---------------------------------------------------------------------------------------- the engine


class Unreliable:
    """A pool whose worker dies, or fails, as told: job by job."""

    def __init__(self, *answers: Any) -> None:
        self.answers, self.given, self.seen = deque(answers), deque[Any](), list[list[str]]()

    @property
    def room(self) -> int:
        return 2 - len(self.given)

    @property
    def busy(self) -> int:
        return len(self.given)

    def submit(self, method: str, job: Any) -> None:
        assert self.room > 0
        self.given.append(job)

    def wait(self) -> list[tuple[Any, Any]]:
        answer = self.answers.popleft() if self.answers else "made"
        if answer == "died":
            jobs, self.given = list(self.given), deque()
            self.seen.append([one.key for one in jobs[0]])
            return [(job, Lost("killed", begun=place == 0)) for place, job in enumerate(jobs)]
        job = self.given.popleft()
        self.seen.append([one.key for one in job])
        return [(job, [Outcome(one.key, "" if answer == "made" else answer, answer == "final") for one in job])]

    def close(self) -> None: ...


@pytest.fixture
def line(place: Path) -> Any:
    arguments = catalogs.tables(place, 3, 2)
    products, _ = read_products(Path(arguments[0]), no_registry)
    file, styles = read_styles(Path(arguments[1]), no_registry)
    (place / "out").mkdir()
    with Journal(place / "out") as journal:
        line = Line(products, styles, file, Settings("pico", "float32", place / "out"), journal, batch_size=2)
        line.train(Unreliable())
        yield line


def attempts(line: Line) -> dict[str, int]:
    keys = [
        one.key for cell in cells(line.products, line.styles) for one in pictures(cell, line.adapters, line.settings)
    ]
    return {key: row["attempts"] for key, row in line.journal.rows(keys).items()}


def test_a_dead_worker_costs_its_current_pictures_alone(line: Line) -> None:
    pool = Unreliable("made", "died")
    line.render(pool, 6)
    lost = pool.seen[1]
    assert len(lost) == 2 and {key for key, count in attempts(line).items() if count > 1} == set(lost)
    assert [len(job) for job in pool.seen] == [2, 2, 2, 1, 1] or [len(job) for job in pool.seen] == [2, 2, 1, 1, 2]


def test_a_picture_that_fails_is_tried_alone_and_given_up(line: Line) -> None:
    told: list[int] = []
    line.progress = lambda what, done, of, note, left: told.append(done)
    pool = Unreliable(*["OSError: no"] * 99)
    line.render(pool, 6)
    assert set(attempts(line).values()) == {MOST_ATTEMPTS} and told == list(range(1, 7))
    assert sorted(len(job) for job in pool.seen) == [1] * 12 + [2] * 3  # together once, then alone
    assert {row.state for row in line.rows()} == {"failed"}


def test_an_error_that_would_come_again_is_not_tried_again(line: Line) -> None:
    line.render(Unreliable(*["final"] * 99), 6)
    assert set(attempts(line).values()) == {1}


def test_no_more_jobs_are_given_than_there_is_room_for() -> None:
    pool, done = Unreliable(), list[Any]()

    class Job(list[Any]):
        pass

    drain(pool, "render", iter([Job() for _ in range(9)]), lambda job, _: done.append(job) or [])
    assert len(done) == 9


def test_an_error_never_replaces_what_is_finished(line: Line) -> None:
    cell = next(cells(line.products, line.styles))
    one = next(pictures(cell, line.adapters, line.settings))
    line.journal.commit([(one, Outcome(one.key, digest="sha256:1", size=3))])
    line.journal.commit([(one, Outcome(one.key, digest="sha256:1", size=3))])
    (row,) = line.journal.rows([one.key]).values()
    assert (row["attempts"], row["size"], row["error"]) == (2, 3, "")


def test_a_journal_of_another_program_is_refused(tmp_path: Path) -> None:
    (tmp_path / "catalog.db").write_bytes(b"no database" * 100)
    with pytest.raises(QrloraError, match=r"catalog\.db cannot be used"):
        Journal(tmp_path)


# ---------------------------------------------------------------------------------------- the gallery


def test_the_gallery_is_bounded_pages_and_the_table_opens_in_a_spreadsheet(
    place: Path, tiny_sd3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qrlora.operations.catalog.gallery.PAGE", 4)
    run(place, tiny_sd3)
    out = place / "out"
    pages = sorted((out / "pages").iterdir())
    assert [page.name for page in pages] == ["page-0001.html", "page-0002.html"]
    first = pages[0].read_text()
    for link in re.findall(r'href="([^"]+)"', first):
        assert (out / "pages" / link).resolve().is_file()
    assert first.count("<img") == 4 and "http" not in re.sub(r"data:[^\"]+", "", first)
    text = (out / "catalog.csv").read_bytes()
    assert text.startswith(b"\xef\xbb\xbf")
    table = list(csv.DictReader(text.decode("utf-8-sig").splitlines()))
    assert len(table) == 6 and all((out / row["file"]).is_file() for row in table)
    before = [page.stat().st_mtime_ns for page in pages]
    run(place, tiny_sd3)
    assert [page.stat().st_mtime_ns for page in pages] == before  # a page that shows the same stays
