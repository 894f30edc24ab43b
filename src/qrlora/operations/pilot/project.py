"""Run a pilot, and keep its state: which stages ran on which inputs, their results, and the decisions.

    pilot = Pilot.open(Path("line.toml"), registry, scorers)
    pilot.run()                              # the next stage, and its reports
    pilot.decide(True, "clean on every board", key)

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

from qrlora._files import claimed, make_folder, write_atomically
from qrlora._reading import read_json
from qrlora._said import Said, joined, said, verbatim
from qrlora.errors import PolicyError, RegistryError, SignatureError
from qrlora.models.training.sources import find_pictures
from qrlora.operations.pilot.line import OURS, STAGES, STUDIED, Item, Line, Stage
from qrlora.operations.pilot.report import report
from qrlora.operations.pilot.stages import Result, one_picture, several_styles, study_arms
from qrlora.operations.pilot.whole_line import WholeLine
from qrlora.operations.pilot.work import Scorer, Show, Work
from qrlora.operations.policy.rules import Policy
from qrlora.operations.provenance.canonical import canonical_json, digest_of, file_digest
from qrlora.operations.provenance.dsse import read_envelope, sign, statement, verify
from qrlora.operations.provenance.keys import Person, SigningKey
from qrlora.operations.registry import Link, Registry
from qrlora.operations.registry.signatures import trust_of
from qrlora.quality.metrics.shares import Share
from qrlora.quality.study.ballot import Ballot
from qrlora.quality.study.votes import NoVotesError

DECISION = "urn:qrlora:pilot-decision:v1"
"""Predicate type of a decision."""
MAY_DECIDE = ("reviewer", "operator")

StageRun = Callable[[Work], Result]


@dataclass(frozen=True)
class Done:
    """A stage that has run: digests of its report and of the signed decision in the registry.

    All else is read from there, where what was edited is found: the state file can be edited by anybody.
    """

    report: str
    decision: str = ""
    """Empty until there is one."""


@dataclass(frozen=True)
class Ran:
    """What the registry holds of a stage.

    Attributes:
        inputs: digest of all that it depended on.
        author: who ran it.
        results: of the stage, as `Result.to_dict` has them.
        go: the decision, if it is signed by somebody who may decide and is about this run; None if there is none.
        by, reason: who decided, and why, as it is signed.
        faults: why a recorded decision does not count.
    """

    inputs: str
    passes: bool
    author: str
    results: Mapping[str, Any] = field(default_factory=dict)
    go: bool | None = None
    by: str = ""
    reason: str = ""
    faults: tuple[Said, ...] = ()


@dataclass
class Pilot:
    """A project file with its folder, the registry that records it, and the person at work."""

    path: Path
    line: Line
    registry: Registry
    scorers: Mapping[str, Scorer]
    stages: dict[Stage, Done]
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
                raise RegistryError(
                    said("%(state)s is no state of a pilot", state=pilot._state), got=error, remedy="restore it"
                ) from error
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
            ran = self.ran(stage)
            if ran is None or ran.go is not True or ran.inputs != self.inputs(stage):
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
            ran = self._check_ran(before)
            if ran.go is not True:
                got = joined(ran.faults) or (said("no decision") if ran.go is None else said("a no-go"))
                remedy = said("qrlora pilot decide %(path)s --go --reason TEXT --key NAME", path=self.path)
                raise PolicyError(said("stage %(before)s needs a go", before=before), got=got, remedy=remedy)

    def _check_ran(self, stage: Stage) -> Ran:
        """Return what a stage left. PolicyError unless it has run on its present inputs."""
        ran = self.ran(stage)
        if ran is None or ran.inputs != self.inputs(stage):
            raise PolicyError(
                said("stage %(before)s has to be run first", before=stage),
                got=said("not run") if ran is None else said("run before its inputs changed"),
                remedy=said("qrlora pilot run %(path)s", path=self.path),
            )
        return ran

    def run(self, stage: Stage | None = None, show: Show = lambda what, done, of: None) -> Result:
        """Run a stage (the next one if None), write its reports, and record them.

        Raises:
            PolicyError: a stage before it has no go.
        """
        from qrlora.operations.pilot.recording import ask, record  # torch, which a decision does without

        stage = stage or self.next or STAGES[-1]
        self.check_ready(stage)
        make_folder(self.folder)
        with claimed(self.folder, folder=True):
            work = Work(self.line, self.folder, stage, self.scorers, show)
            result = self._stages[stage](work)
            result = replace(result, acceptance=self._acceptance(result))
            recorded, combinations = record(self.registry, work, result, self.inputs(stage))
            result = replace(result, to_approve=ask(self.registry, combinations, self.policy))
            self._write(result)
            self.stages[stage] = Done(recorded.digest)
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

    def ballot(self, stage: Stage) -> Ballot:
        """Return the blind study of a stage, which may not be made yet."""
        return Ballot(self.folder / "study" / stage)

    def make_study(self, stage: Stage, show: Show = lambda what, done, of: None) -> Ballot:
        """Make a blind study: a stage's pictures against the base model's from a prompt in words. `run` counts its
        votes.

        Raises:
            PolicyError: as `check_studied`.
        """
        from qrlora.quality.study.trials import study_data

        self.check_studied(stage)
        with claimed(self.folder, folder=True):
            arms = study_arms(Work(self.line, self.folder, stage, self.scorers, show))
            ballot = self.ballot(stage)
            ballot.write(*study_data(arms, by_order=True))
        return ballot

    def check_studied(self, stage: Stage) -> None:
        """Raise PolicyError unless a stage is one that is studied, and has run on its present inputs."""
        if stage not in STUDIED:
            raise PolicyError(
                said("no study is made of stage %(stage)s", stage=stage),
                expected=joined(map(verbatim, STUDIED), " or "),
            )
        self._check_ran(stage)

    def study_is_about(self, stage: Stage, results: Mapping[str, Any]) -> bool:
        """Return True if there is a study of a stage, of the very pictures that these results have."""
        ballot = self.ballot(stage)
        shown = {name for group in results["groups"] for name in group["pictures"]}
        return ballot.made and ballot.shows(OURS) == shown

    def _acceptance(self, result: Result) -> Share | None:
        """Return the share of votes for the pictures of a result; None without a study of them, or votes in it."""
        if not self.study_is_about(result.stage, result.to_dict()):
            return None
        try:
            return next(iter(self.ballot(result.stage).count().pairs.values())).share
        except NoVotesError:
            return None

    # Decisions

    def decide(self, go: bool, reason: str, key: SigningKey) -> str:
        """Sign and record a go or a no-go on the stage that is due. Returns the decision's digest.

        Raises:
            PolicyError: nothing to decide, no reason, a stage whose inputs have changed, or who ran it decides.
            SignatureError: the key is not trusted to decide.
        """
        stage = self.next
        ran = self.ran(stage) if stage else None
        if stage is None or ran is None:
            raise PolicyError(
                "nothing to decide",
                got=stage or said("all stages are done"),
                remedy=said("qrlora pilot run %(path)s", path=self.path),
            )
        if ran.inputs != self.inputs(stage):
            raise PolicyError(
                said("stage %(stage)s was run on other inputs", stage=stage),
                remedy=said("qrlora pilot run %(path)s", path=self.path),
            )
        if not reason.strip():
            raise PolicyError("a decision needs a reason", expected="why, in a sentence")
        person = trust_of(self.registry).person_of(key.key_id)
        if fault := _may_not(person, ran.author):
            raise PolicyError(
                "this decision would not count",
                got=fault,
                expected=said("a %(roles)s", roles=joined(map(verbatim, MAY_DECIDE), " or ")),
            )
        report = self.stages[stage].report
        predicate = {
            **{"pilot": self.line.name, "stage": stage, "inputs": ran.inputs, "report": report, "go": go},
            **{"reason": reason, "by": person.name, "at": datetime.now(timezone.utc).isoformat()},
        }
        envelope = sign(statement(DECISION, [(f"report of {stage}", report)], predicate), key)
        found = self.registry.add_record(envelope, "approval", facts=predicate)
        self.registry.link(report, Link("approved_by", found.digest))
        self.stages[stage] = Done(report, found.digest)
        self._save()
        return found.digest

    def ran(self, stage: Stage) -> Ran | None:
        """Return what the registry holds of a stage, its bytes hashed and its decision's signature verified again.

        None if it has not run. RegistryError if its report is missing, changed or another stage's.
        """
        done = self.stages.get(stage)
        if done is None:
            return None
        artifact = self.registry.get(done.report)
        record = json.loads(self.registry.read(artifact))
        if (record.get("pilot"), record.get("stage")) != (self.line.name, stage):
            remedy = said("qrlora pilot run %(path)s --stage %(stage)s", path=self.path, stage=stage)
            raise RegistryError(
                said("%(report)s is no report of stage %(stage)s", report=done.report[:19], stage=stage),
                got=artifact.title,
                remedy=remedy,
            )
        ran = Ran(record["inputs"], record["passes"], artifact.created_by, record)
        if not done.decision:
            return ran
        try:
            return self._decided(stage, done, ran)
        except (RegistryError, SignatureError) as error:
            return replace(ran, faults=(error.text,))

    def _decided(self, stage: Stage, done: Done, ran: Ran) -> Ran:
        """Add the recorded decision, or why it does not count."""
        artifact = self.registry.get(done.decision)
        envelope, trust = read_envelope(self.registry.read(artifact)), trust_of(self.registry)
        found, people = verify(envelope, trust, at=self.registry.added_at(artifact.digest), predicate_type=DECISION)
        signed = found["predicate"]
        about: dict[str, tuple[Said, str]] = {
            "pilot": (said("pilot"), self.line.name),
            "stage": (said("stage"), stage),
            "inputs": (said("inputs"), ran.inputs),
            "report": (said("report"), done.report),
        }
        faults = [
            said("the decision was on another %(what)s", what=label)
            for key, (label, value) in about.items()
            if signed.get(key) != value
        ]
        faults += [why for person in people if (why := _may_not(person, ran.author))]
        if faults:
            return replace(ran, faults=tuple(faults))
        names = ", ".join(person.name for person in people)
        return replace(ran, go=signed.get("go") is True, by=names, reason=str(signed.get("reason", "")))

    def verify(self) -> list[str]:
        """Return what is wrong with the recorded stages and decisions, one line a fault; empty if nothing is."""
        faults = []
        for stage in self.stages:
            try:
                ran = self.ran(stage)
                faults += [f"{stage}: {fault}" for fault in (ran.faults if ran else ())]
            except RegistryError as error:
                faults.append(f"{stage}: {error}")
        return faults


def _may_not(person: Person, author: str) -> Said | None:
    """Return why a person may not decide on a stage that the author ran; None if they may."""
    if not set(person.roles) & set(MAY_DECIDE):
        roles, needed = ", ".join(person.roles), joined(map(verbatim, MAY_DECIDE), " or ")
        return said("%(name)s is %(roles)s, not a %(needed)s", name=person.name, roles=roles, needed=needed)
    if person.name == author:
        return said("%(name)s ran it: nobody decides on their own work", name=person.name)
    return None


def _without_places(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the project without the paths of its files, whose digests stand for them."""

    def item(found: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in found.items() if key != "picture"}

    styles = fields["styles"] and [item(style) for style in fields["styles"]]
    rest = {key: value for key, value in fields.items() if key not in ("brand", "products")}
    return rest | {"subject": item(fields["subject"]), "styles": styles}
