"""Connect other commands to the registry: resolve references among their inputs, and record what they make.

Nothing of the registry is imported before a command is given `--registry` or a value that begins with `registry:`.
"""

from __future__ import annotations

import contextlib
import functools
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click
from click import get_current_context

from qrlora._files import default_cache_dir, make_folder
from qrlora.apps.cli.command import Function, Options, hold
from qrlora.errors import QrloraError, RegistryError

if TYPE_CHECKING:
    from qrlora.apps.serving.protocol import Finish, Settings
    from qrlora.models.request import Request
    from qrlora.models.training.recipe import Recipe
    from qrlora.operations.registry import Artifact, Registry

    Mark = Callable[[Request, bytes, str], bytes]
    """A picture, its PNG and the digest of its composition -> the PNG with a signed manifest."""

PREFIX = "registry:"
MODELS = ("model", "base")
INPUTS = (
    *("parts", "adapter", "adapters", "file", "files", "first", "second", "what", "like", "space", "recipe"),
    *("subject", "style", "images", "training", "brand"),
)
"""Parameters of commands that take a file by reference."""
FIELDS = ("images", "space", "output")
"""Fields of recipe files that may be references, besides the model."""
KEY, PLACE_KEY = "qrlora.recorder", "qrlora.registry"

registry_option = click.option(
    "--registry",
    metavar="PLACE",
    help="folder or database URL of the registry (default: $QRLORA_REGISTRY, else one in your home)",
)
recording_option = click.option(
    "--registry",
    metavar="PLACE",
    help="record inputs and results in this registry, a folder or database URL (default: nothing is recorded unless an "
    "argument is registry:NAME; docs/registry.md)",
)


@contextlib.contextmanager
def packages() -> Iterator[None]:
    """Turn an ImportError inside into a QrloraError that names the extra `registry`."""
    try:
        yield
    except ImportError as error:
        remedy = "pip install 'qrlora[registry]'"
        what = "registries, policies and signatures need more packages"
        raise QrloraError(what, got=f"no {error.name}", remedy=remedy) from error


def open_registry(options: Options, *, create: bool = False) -> Registry:
    """Open the registry that is asked for, until the command ends.

    create: for every command that writes into a registry what it makes or is given (train, generate, catalog, pilot,
        registry add and import, keys trust): it makes the registry where none is. Commands that only read one
        (search, verify, approval, inspect, plan, a server that does not record) refuse a place without one.
    """
    with packages():
        from qrlora.operations.registry import Registry
    opened = Registry.open(options.registry, create=create)
    hold(contextlib.closing(opened))
    return opened


def referable(suffix: str = "", *, records: bool = True) -> Callable[[Function], Function]:
    """Let a command's inputs and output be references, those in its recipe file too, and record what it does.

    Args:
        suffix: of its output's file; none if it is a folder.
        records: False for a command that only reads; of one with an option --record that option decides.
    """

    def decorate(run: Function) -> Function:
        @functools.wraps(run)
        def wrapper(options: Options) -> Any:
            named = [getattr(options, key, None) for key in (*INPUTS, *MODELS, "output")]
            references = _refers(named) or _references_of_recipe(options)
            create = records and getattr(options, "record", True)
            recorder = Recorder(open_registry(options, create=create)) if options.registry or references else None
            meta = get_current_context().meta
            meta[KEY], meta[PLACE_KEY] = recorder, options.registry
            del options.registry
            if recorder:
                recorder.resolve(options, suffix)
            code = run(options)
            if recorder:
                recorder.say()
            return code

        return recording_option(wrapper)

    return decorate


def recorder_here() -> Recorder | None:
    """Return the recorder of the running command; None where no registry is in play."""
    context = get_current_context(silent=True)
    return context.meta.get(KEY) if context else None


def place_here() -> str | None:
    """Return where the running command's registry is: that of --registry, or the default one if it has a recorder."""
    context = get_current_context(silent=True)
    given: str | None = context.meta.get(PLACE_KEY) if context else None
    if given or recorder_here() is None:
        return given
    from qrlora.operations.registry import default_place

    return default_place()


def shown(path: object) -> str:
    """Return a path as the user knows it: a file that stands in for a reference by the reference."""
    recorder, text = recorder_here(), str(path)
    return recorder.shown(Path(text)) if recorder and text else text


def _references_of_recipe(options: Options) -> dict[str, Any]:
    """Return the fields of the recipe file that refer to a registry, unless an option wins over them."""
    file = getattr(options, "recipe", None)
    if file is None or _refers(file):
        return {}
    from qrlora.models.training.recipe import read_fields

    fields = read_fields(file)
    given = {key for key in fields if getattr(options, key, None) is not None}
    if any(getattr(options, role) for role in ("subject", "style")):
        given.add("images")
    return {key: fields[key] for key in (*MODELS, *FIELDS) if key not in given and _refers(fields.get(key))}


def _refers(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_refers, value))
    return isinstance(value, (str, Path)) and str(value).startswith(PREFIX)


class Recorder:
    """The registry of one command: files that stand in for references, and the artifacts that it made."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.folder = Path(tempfile.mkdtemp(prefix="qrlora-"))
        hold(contextlib.ExitStack()).callback(shutil.rmtree, self.folder, ignore_errors=True)
        self.artifacts: dict[str, Artifact] = {}
        self.references: dict[str, str] = {}
        self.name: str | None = None
        self.alias = ""
        self.made: list[Artifact] = []

    # References

    def resolve(self, options: Options, suffix: str) -> None:
        """Put files in the place of the references among a command's options, and those of its recipe file."""
        if _refers(recipe := getattr(options, "recipe", None)):
            options.recipe = self._resolved(recipe)
        for key, value in _references_of_recipe(options).items():
            setattr(options, key, value)
        for key in MODELS:
            if _refers(value := getattr(options, key, None)):
                setattr(options, key, self._model(str(value)))
        for key in INPUTS:
            if _refers(value := getattr(options, key, None)):
                setattr(options, key, self._resolved(value))
        if _refers(given := getattr(options, "output", None)):
            output = self._output(Path(str(given)).as_posix(), ".png" if getattr(options, "grid", None) else suffix)
            options.output = output if isinstance(given, Path) else str(output)

    def shown(self, path: Path) -> str:
        """Return the path, or what it stands for: it, or the folder that it is in."""
        for one in (path, *path.parents):
            if reference := self.references.get(str(one)):
                return "/".join([reference, *path.relative_to(one).parts])
        return str(path)

    def _resolved(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(map(self._resolved, value))
        if not _refers(value):
            return value
        if isinstance(value, Path):
            return self._file(value.as_posix())
        found = re.fullmatch(r"(registry:(?:sha256:[0-9a-f]+|[^:]+))(:[^:]+)?", value)
        reference, weight = found.groups() if found else (value, None)
        return f"{self._file(reference)}{weight or ''}"

    def _file(self, reference: str) -> Path:
        """Return a file with the artifact's bytes, under a name that describes it."""
        one = self.registry.get(reference)
        if one.kind == "base":
            remedy = "name it as the base model"
            raise RegistryError(f"{reference} is a base model", expected="an artifact with a file", remedy=remedy)
        self._warn(reference, one)
        stem = one.names[-1].partition("@")[0].replace("/", "-") if one.names else one.digest[7:19]
        folder = self.folder / f"{len(self.artifacts)}"
        folder.mkdir()
        path = folder / f"{stem}{'.space' if one.kind == 'space' else ''}{Path(one.filename).suffix}"
        source = self.registry.path(one)
        try:
            path.symlink_to(source.resolve())
        except OSError:  # Windows without the right to make links
            shutil.copyfile(source, path)
        self.artifacts[str(path)], self.references[str(path)] = one, f"{reference} ({one.digest[:19]})"
        return path

    def _model(self, reference: str) -> str:
        from qrlora.operations.registry.bases import check_base

        one = self.registry.get(reference)
        if one.kind != "base":
            raise RegistryError(f"{reference} is no base model", expected="an artifact of kind base", got=one.kind)
        self._warn(reference, one)
        model = check_base(self.registry, one)
        self.artifacts[model] = one
        return model

    @staticmethod
    def _warn(reference: str, one: Artifact) -> None:
        if one.deprecated:
            print(f"{reference} is deprecated: {one.deprecated}", file=sys.stderr)

    def _output(self, reference: str, suffix: str) -> Path:
        """Return the path for the command's output, which then becomes the newest version of a name.

        It stays there if the command is interrupted, so that training can be resumed.
        """
        from qrlora.operations.registry.references import parse_reference

        to = parse_reference(reference)
        if to.digest or to.version:
            remedy = "leave out what stands behind the name: versions count themselves"
            raise RegistryError(f"nothing is written to {reference}", expected="NAME or NAME@alias", remedy=remedy)
        self.name, self.alias = to.name, to.alias
        folder = self._outputs(to.name)
        make_folder(folder)
        path = folder / f"{to.name.replace('/', '-')}{suffix}"
        self.references[str(path)] = reference
        return path

    # Recording

    def _add(self, one: Artifact, *, result: bool = True) -> Artifact:
        """Note what the command made, and move the alias if it is the result asked for."""
        if result and self.name and self.alias:
            self.registry.set_alias(self.name, self.alias, one.digest, reason="written by a command")
        self.made.append(one)
        return one

    def say(self) -> None:
        """Print what was recorded, on stderr, and remove what was written on the way into the registry."""
        for one in self.made:
            fresh = self.registry.get(one.digest)
            print(f"recorded: {fresh.kind} {fresh.title} {fresh.digest[:19]}", file=sys.stderr)
        if self.name and (self.made or not any(self._outputs(self.name).iterdir())):
            shutil.rmtree(self._outputs(self.name), ignore_errors=True)

    @staticmethod
    def _outputs(name: str) -> Path:
        return default_cache_dir() / "registry-outputs" / name.replace("/", "--")

    def artifact(self, path: Path) -> Artifact:
        """Return the artifact of an input; a file that is not registered is added."""
        from qrlora.operations.registry.intake import add_file

        if str(path) not in self.artifacts:
            self.artifacts[str(path)] = add_file(self.registry, path)
        return self.artifacts[str(path)]

    def base(self, model: str) -> Artifact:
        """Return the artifact of the base model that was used; one that is not registered is added."""
        from qrlora.operations.registry.bases import used_base

        if model not in self.artifacts:
            self.artifacts[model] = used_base(self.registry, model)
        return self.artifacts[model]

    def trained(self, path: Path, recipe: Recipe) -> None:
        """Record an adapter, with its pictures, recipe and base model."""
        from qrlora.operations.registry.intake import add_adapter
        from qrlora.quality.images.read import picture_files

        for picture in picture_files(recipe.images):
            self.artifact(picture)
        if recipe.space:
            self.artifact(recipe.space)
        self._add(add_adapter(self.registry, path, name=self.name, base=self.base(recipe.model)))

    def read(self, path: Path) -> None:
        """Record an adapter that was imported, extracted or put on a basis."""
        from qrlora.operations.registry.intake import add_adapter

        self._add(add_adapter(self.registry, path, name=self.name))

    def spanned(self, path: Path, members: Sequence[Path]) -> None:
        """Record a space, with its members."""
        from qrlora.operations.registry.intake import add_space

        for member in members:
            self.artifact(member)
        self._add(add_space(self.registry, path, name=self.name))

    def composition(self, parts: Sequence[tuple[Path, float]], null_space: float, model: str | None) -> Artifact:
        """Record a composition of adapters at these weights, on the base model that was used, or theirs."""
        from qrlora.operations.registry.bases import base_of
        from qrlora.operations.registry.intake import add_composition

        found = [(self.artifact(path), weight) for path, weight in parts]
        base = self.base(model) if model else base_of(self.registry, found[0][0])
        return self._add(add_composition(self.registry, base, found, null_space), result=False)

    def composed(self, path: Path, parts: Sequence[tuple[Path, float]], null_space: float, model: str | None) -> None:
        """Record a composition, and the file that holds it."""
        from qrlora.operations.registry.intake import add_adapter
        from qrlora.operations.registry.records import Link

        made = self.composition(parts, null_space, model)
        self._add(add_adapter(self.registry, path, name=self.name, links=[Link("exported_from", made.digest)]))

    def origin(self, parts: Sequence[tuple[Path, float]], null_space: float, model: str) -> Artifact:
        """Record what makes pictures: a composition, or the base model alone."""
        return self.composition(parts, null_space, model) if parts else self.base(model)

    def generated(self, pictures: Mapping[Path, Mapping[str, Any]], origin: Artifact) -> None:
        """Record pictures, each with its prompt and seed, made by what `origin` returned."""
        from qrlora.operations.registry.intake import generated

        keep = self.name is not None
        added = [generated(path, origin, made, name=self.name, keep=keep) for path, made in pictures.items()]
        for one in self.registry.add_many(added):
            self._add(one)

    def of_server(self, model: str, folder: Path, null_space: float | None, mark: Mark | None) -> Finish:
        """Return what marks (if `mark` is given) and records a picture that a server made of a folder's adapters."""
        from qrlora.method.composition import default_strength
        from qrlora.models.exchange import load_any
        from qrlora.operations.registry.intake import add_generated

        paths = {path.stem: path.resolve() for path in folder.glob("*.safetensors")}
        self.artifacts |= {str(Path(path).resolve()): one for path, one in self.artifacts.items()}
        origins: dict[Any, Artifact] = {}

        def finish(picture: Request, settings: Settings, png: bytes) -> bytes:
            parts = sorted(picture.composition.items())
            if (key := (*parts, picture.null_space)) not in origins:
                strength = null_space if picture.null_space is None else picture.null_space
                if strength is None:
                    strength = default_strength([load_any(paths[name]) for name, _ in parts])
                origins[key] = self.origin([(paths[name], weight) for name, weight in parts], strength, model)
            if mark:
                png = mark(picture, png, origins[key].digest if parts else "")
            facts = {"prompt": picture.prompt, "seed": picture.seed, **settings._asdict()}
            add_generated(self.registry, png, origins[key], facts)
            return png

        return finish

    def reported(self, page: Path, numbers: Mapping[str, Any], about: Iterable[Artifact]) -> None:
        """Record a report on artifacts."""
        from qrlora.operations.registry.intake import add_report

        self._add(add_report(self.registry, page, about, name=self.name, facts=numbers))

    def brand(self, path: Path) -> Artifact:
        """Record a brand sheet."""
        return self.registry.add(path, "brand")

    def registered(self, paths: Iterable[Path]) -> list[Artifact]:
        """Return the artifacts of those pictures that the registry has already."""
        from qrlora.operations.provenance.canonical import file_digest
        from qrlora.quality.images.read import picture_files

        digests = [file_digest(path) for path in picture_files(paths)]
        return [self.registry.get(digest) for digest in dict.fromkeys(digests) if self.registry.has(digest)]

    def exported(self, path: Path, source: Path, facts: Mapping[str, Any]) -> None:
        """Record a file for another program."""
        from qrlora.operations.registry.intake import add_export

        self._add(add_export(self.registry, path, self.artifact(source), name=self.name, facts=facts))
