"""Run a pilot, and keep its state: which stages ran on which inputs, their results, and the decisions.

    pilot = Pilot.open(Path("line.toml"), registry, scorers)
    pilot.run()                              # the next stage, and its reports
    pilot.decide(True, "clean on every board", key, trust)

State, adapters and pictures are in the folder `line.pilot` beside the project file. Everything there is written whole
or not at all, so a killed run goes on where it was.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from qrlora._files import claimed, make_folder, write_all, write_atomically
from qrlora._reading import read_json
from qrlora.errors import PolicyError, RegistryError
from qrlora.models.training.dataset import find_pictures
from qrlora.operations.pilot.line import STAGES, Item, Line, Stage
from qrlora.operations.pilot.recording import ask, record
from qrlora.operations.pilot.report import report
from qrlora.operations.pilot.stages import Result, one_picture, several_styles
from qrlora.operations.pilot.whole_line import WholeLine
from qrlora.operations.pilot.work import Scorer, Show, Work
from qrlora.operations.policy.rules import Policy
from qrlora.operations.provenance.canonical import canonical_json, digest_of, file_digest
from qrlora.operations.provenance.dsse import sign, statement, verify
from qrlora.operations.provenance.keys import SigningKey, Trust
from qrlora.operations.registry import Link, Registry
from qrlora.quality.metrics.shares import Share

DECISION = "urn:qrlora:pilot-decision:v1"
"""Predicate type of a decision."""
MAY_DECIDE = ("reviewer", "operator")

StageRun = Callable[[Work], Result]


@dataclass(frozen=True)
class Done:
    """A stage that has run. inputs: digest of all it depended on; report: of its JSON in the registry."""

    inputs: str
    report: str
    passes: bool
    author: str
    at: str
    decision: str = ""
    """Digest of the signed decision; empty until there is one."""
    go: bool | None = None


@dataclass
class Pilot:
    """A project file with its folder, the registry that records it, and the person at work."""

    path: Path
    line: Line
    registry: Registry
    scorers: Mapping[str, Scorer]
    stages: dict[str, Done]
    whole_line: WholeLine = field(default_factory=WholeLine)
    policy: Policy | None = None
    """The one in force, which approvals name."""

    @classmethod
    def open(
        cls,
        path: Path,
        registry: Registry,
        scorers: Mapping[str, Scorer],
        whole_line: WholeLine | None = None,
        policy: Policy | None = None,
    ) -> Pilot:
        """Read a project file and its state. DataError as `Line.load`; RegistryError for a damaged state file."""
        line = Line.load(path)
        pilot = cls(path, line, registry, scorers, {}, whole_line or WholeLine(), policy)
        if pilot._state.is_file():
            found = read_json(pilot._state, "state of a pilot", RegistryError)
            try:
                pilot.stages = {name: Done(**found[name]) for name in STAGES if name in found}
            except TypeError as error:
                raise RegistryError(f"{pilot._state} is no state of a pilot", got=error, remedy="restore it") from error
        return pilot

    @property
    def folder(self) -> Path:
        """The folder of state, adapters, pictures and reports."""
        return self.path.with_suffix(".pilot")

    @property
    def _state(self) -> Path:
        return self.folder / "state.json"

    @property
    def next(self) -> Stage | None:
        """The stage that is to be run or decided; None after the last one's go."""
        for stage in STAGES:
            done = self.stages.get(stage)
            if done is None or done.go is not True or done.inputs != self.inputs(stage):
                return stage
        return None

    def inputs(self, stage: Stage) -> str:
        """Return the digest of what a stage depends on: the project, its pictures and tables, and the stages before
        it."""
        fields = self.line.model_dump(mode="json", exclude={"languages", "gates"})
        fields["gate"] = getattr(self.line.gates, stage).model_dump(mode="json")
        pictures = {item.name: self._pictures(item) for item in self.line.items}
        tables = {name: file_digest(path) for name in ("brand", "products") if (path := getattr(self.line, name))}
        if stage == "one_picture":  # styles and products may still change
            fields, pictures = (
                {**fields, "styles": None, "products": None},
                {self.line.subject.name: pictures[self.line.subject.name]},
            )
            tables.pop("products", None)
        before = [self.stages[name].report for name in STAGES[: STAGES.index(stage)] if name in self.stages]
        return digest_of(canonical_json([stage, _without_places(fields), pictures, tables, before]))

    @staticmethod
    def _pictures(item: Item) -> list[str]:
        return [file_digest(source.picture) for source in find_pictures([item.picture])]

    def check_ready(self, stage: Stage) -> None:
        """Raise PolicyError unless the stages before have a go that was decided on their present inputs."""
        for before in STAGES[: STAGES.index(stage)]:
            done = self.stages.get(before)
            if done is None or done.inputs != self.inputs(before):
                got = "not run" if done is None else "run before its inputs changed"
                raise PolicyError(
                    f"stage {before} has to be run first", got=got, remedy=f"qrlora pilot run {self.path}"
                )
            if done.go is not True:
                got = "no decision" if done.go is None else "a no-go"
                remedy = f"qrlora pilot decide {self.path} --go --reason TEXT --key NAME"
                raise PolicyError(f"stage {before} needs a go", got=got, remedy=remedy)

    def run(self, stage: Stage | None = None, show: Show = lambda what, done, of: None) -> Result:
        """Run a stage (the next one if None), write its reports, and record them.

        Raises:
            PolicyError: a stage before it has no go.
        """
        stage = stage or self.next or STAGES[-1]
        self.check_ready(stage)
        make_folder(self.folder)
        with claimed(self.folder, folder=True):
            work = Work(self.line, self.folder, stage, self.scorers, show)
            result = replace(self._stages[stage](work), acceptance=self._acceptance(stage))
            recorded, combinations = record(self.registry, work, result, self.inputs(stage))
            result = replace(result, to_approve=ask(self.registry, combinations, self.policy))
            self._write(result)
            at = datetime.now(timezone.utc).isoformat()
            self.stages[stage] = Done(self.inputs(stage), recorded.digest, result.passes, self.registry.actor, at)
            self._save()
        return result

    @property
    def _stages(self) -> dict[str, StageRun]:
        return {"one_picture": one_picture, "several_styles": several_styles, "line": self.whole_line}

    def report_folder(self, stage: Stage, language: str) -> Path:
        """Return the folder of a stage's report in this language."""
        return self.folder / "reports" / stage / language

    def _write(self, result: Result) -> None:
        for language in self.line.languages:
            page = report(result, self.line, dict(self.scorers), language, self.path.name)
            page.write(self.report_folder(result.stage, language))

    def _save(self) -> None:
        content = json.dumps({name: vars(done) for name, done in self.stages.items()}, indent=1)
        write_atomically(self._state, content.encode())

    # Votes

    def votes(self, stage: Stage) -> Path:
        """Folder of the votes of a stage's blind study."""
        return self.folder / "study" / stage / "votes"

    def make_study(self, show: Show = lambda what, done, of: None) -> Path:
        """Write a blind study of stage 2: pictures with the adapters against the base model's from a prompt in words.

        Returns the page's path. Votes go into the folder `votes` beside it; `run` counts them.

        Raises:
            PolicyError: stage 2 has not run.
        """
        from qrlora.quality.study.trials import make_study

        stage: Stage = "several_styles"
        if stage not in self.stages:
            raise PolicyError(f"stage {stage} has to be run first", remedy=f"qrlora pilot run {self.path}")
        work, line = Work(self.line, self.folder, stage, self.scorers, show), self.line
        ours, words = [], []
        for style in line.styles:
            pair, strength = [(line.subject, 1.0), (style, 1.0)], line.sampling.null_space
            triggers = {"subject": work.recipe(line.subject).trigger, "style": work.recipe(style).trigger}
            ours += work.pictures([text.format(**triggers) for text in line.prompts.composed], pair, strength)
            names = {"subject": line.subject.name, "style": style.name}
            words += work.pictures([text.format(**names) for text in line.prompts.composed])
        page, key = make_study({"adapters": ours, "words": words}, by_order=True)
        folder = self.votes(stage).parent
        make_folder(self.votes(stage))
        write_all(
            {folder / "key.json": json.dumps(key, ensure_ascii=False).encode(), folder / "vote.html": page.encode()}
        )
        return folder / "vote.html"

    def _acceptance(self, stage: Stage) -> Share | None:
        """Return the share of votes for the pilot's pictures in the stage's study, if any were cast."""
        from qrlora.quality.study.votes import checked_key, count_votes

        key_file, votes = self.votes(stage).parent / "key.json", sorted(self.votes(stage).glob("*.json"))
        if not key_file.is_file() or not votes:
            return None
        key = checked_key(read_json(key_file, "key of a study", RegistryError), str(key_file))
        cast = [read_json(path, "votes", RegistryError) for path in votes]
        found = count_votes(cast, key, names=[str(path) for path in votes])
        return next(iter(found.pairs.values())).share

    # Decisions

    def decide(self, go: bool, reason: str, key: SigningKey, trust: Trust) -> str:
        """Sign and record a go or a no-go on the stage that is due. Returns the decision's digest.

        Raises:
            PolicyError: nothing to decide, no reason, a stage whose inputs have changed, or who ran it decides.
            SignatureError: the key is not trusted to decide.
        """
        stage = self.next
        done = self.stages.get(stage) if stage else None
        if stage is None or done is None:
            raise PolicyError(
                "nothing to decide", got=stage or "all stages are done", remedy=f"qrlora pilot run {self.path}"
            )
        if done.inputs != self.inputs(stage):
            raise PolicyError(f"stage {stage} was run on other inputs", remedy=f"qrlora pilot run {self.path}")
        if not reason.strip():
            raise PolicyError("a decision needs a reason", expected="why, in a sentence")
        person = trust.person_of(key.key_id)
        if not set(person.roles) & set(MAY_DECIDE):
            raise PolicyError(f"{person.name} may not decide", expected=" or ".join(MAY_DECIDE), got=list(person.roles))
        if person.name == done.author:
            raise PolicyError("nobody decides on their own work", got=f"{person.name} ran stage {stage}")
        predicate = {
            **{"pilot": self.line.name, "stage": stage, "inputs": done.inputs, "report": done.report, "go": go},
            **{"reason": reason, "by": person.name, "at": datetime.now(timezone.utc).isoformat()},
        }
        envelope = sign(statement(DECISION, [(f"report of {stage}", done.report)], predicate), key)
        found = self.registry.add_record(envelope, "approval", facts=predicate)
        self.registry.link(done.report, Link("approved_by", found.digest))
        self.stages[stage] = replace(done, decision=found.digest, go=go)
        self._save()
        return found.digest

    def verify(self, trust: Trust) -> list[str]:
        """Return what is wrong with the recorded stages and decisions, one line a fault; empty if nothing is."""
        faults = []
        for stage, done in self.stages.items():
            try:
                self.registry.read(done.report)
                if done.decision:
                    faults += self._wrong(stage, done, trust)
            except ValueError as error:
                faults.append(f"{stage}: {error}")
        return faults

    def _wrong(self, stage: str, done: Done, trust: Trust) -> list[str]:
        envelope = json.loads(self.registry.read(done.decision))
        at = self.registry.get(done.decision).created_at
        found, people = verify(envelope, trust, at=at, predicate_type=DECISION)
        said = found["predicate"]
        expected = {"stage": stage, "inputs": done.inputs, "report": done.report, "go": done.go}
        faults = [
            f"{stage}: the decision was on another {key}" for key, value in expected.items() if said.get(key) != value
        ]
        faults += [f"{stage}: {one.name} decided on their own work" for one in people if one.name == done.author]
        may = any(set(one.roles) & set(MAY_DECIDE) for one in people)
        return faults + ([] if may else [f"{stage}: decided by somebody who may not"])


def _without_places(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the project without the paths of its files, whose digests stand for them."""

    def item(found: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in found.items() if key != "picture"}

    styles = fields["styles"] and [item(style) for style in fields["styles"]]
    rest = {key: value for key, value in fields.items() if key not in ("brand", "products")}
    return rest | {"subject": item(fields["subject"]), "styles": styles}
