"""Read a policy: a company's rules for combining and using adapters, as validated TOML.

policy = Policy.load(Path("policy.toml"))
policy.digest       # of what the rules say: comments and the order of lines change nothing
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from qrlora._reading import plain_number, read_toml, validated
from qrlora._said import Said, joined, said
from qrlora.errors import PolicyError
from qrlora.operations.policy.licences import Asker, alternatives
from qrlora.operations.provenance.canonical import canonical_json, digest_of

Action = Literal["compose", "generate", "serve", "export", "catalog"]
ACTIONS: tuple[Action, ...] = get_args(Action)
USING: tuple[Action, ...] = ("serve", "export", "catalog")
"""Actions that ask for reports and approvals unless told otherwise: before, there is nothing yet to measure."""
Use = Literal["internal", "outputs", "commercial"]
Role = Literal["subject", "style", "composition", ""]


def _text(value: str) -> str:
    if not value.strip():
        raise ValueError("an empty text")
    return value


Text = Annotated[str, AfterValidator(_text)]
Range = tuple[float, float]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: Any, about: Any) -> Any:
        """Read text as a number in plain notation only: no booleans, no "1_0"."""
        annotation = cls.model_fields[about.field_name].annotation
        return plain_number(value) if {int, float, Range} & {annotation, *get_args(annotation)} else value

    @model_validator(mode="after")
    def _ordered(self) -> _Part:
        pairs = {name: value for name, value in self if isinstance(value, tuple) and len(value) == 2}
        for name, (low, high) in pairs.items():
            if type(low) in (int, float) and low > high:
                raise ValueError(f"{name}: the smaller number comes first, got {low:g}, {high:g}")
        low, high = getattr(self, "at_least", None), getattr(self, "at_most", None)
        if low is not None and high is not None and low > high:
            raise ValueError(f"at_least {low:g} is more than at_most {high:g}")
        return self


class LicenceRule(_Part):
    """The company and its use of pictures and models; without this rule licences are not checked."""

    use: Use = Field("commercial", description="internal, outputs (commercial use of pictures) or commercial (all)")
    ours: tuple[Text, ...] = Field((), description="owners in LicenseRef-Proprietary-OWNER that are us")
    revenue: float | None = Field(None, ge=0, description="ours, in US dollars a year")
    users: float | None = Field(None, ge=0, description="ours, a month")
    agreements: dict[str, Text] = Field({}, description="licence = why we may do what it forbids: a contract's number")

    @field_validator("agreements")
    @classmethod
    def _single(cls, value: dict[str, str]) -> dict[str, str]:
        found: dict[str, str] = {}
        for expression, why in value.items():
            try:
                [[one]] = alternatives(expression)
            except ValueError as error:
                raise ValueError(f"{expression!r} is not one licence") from error
            found[one] = why
        return found

    def asker(self, use: str | None = None) -> Asker:
        """Return who asks for a use; this policy's own if None."""
        return Asker(use or self.use, self.ours, self.revenue, self.users, self.agreements)


class Selector(_Part):
    """Adapters that have all of what is given; all adapters if nothing is."""

    role: Role | None = None
    owner: Text | None = None
    tag: Text | None = None
    name: Text | None = Field(None, description="in the registry, without a version")


class Never(_Part):
    """Two kinds of adapters that are never combined."""

    one: Selector
    other: Selector
    why: str = ""


class CombineRule(_Part):
    """Adapters that may be combined, and those that may not."""

    adapters: tuple[int, int] = Field((0, 1000), description="fewest and most")
    roles: tuple[tuple[Role, ...], ...] = Field((), description="sets of roles that may be combined; any if none")
    owners: tuple[Text, ...] = Field((), description="whose adapters may be used; anybody's if none")
    required_tags: tuple[Text, ...] = Field((), description="that every adapter has")
    forbidden_tags: tuple[Text, ...] = Field((), description="that no adapter has")
    null_space: Range = Field((0.0, 1.0), description="least and largest strength")
    never: tuple[Never, ...] = Field((), description="pairs that are never combined")


class WeightRule(Selector):
    """Least and largest weight of the adapters that it selects."""

    at_least: float | None = None
    at_most: float | None = None


class ScoreRule(_Part):
    """Limits of a value in a report that measured the composition (or each adapter)."""

    report: Text = Field(description="name of the report in the registry, without a version")
    value: Text = Field(description="path in it, such as total.cosine; of a list or table the worst counts")
    at_least: float | None = None
    at_most: float | None = None
    of: Literal["composition", "adapter"] = "composition"
    actions: tuple[Action, ...] = Field(USING, description="that need it")

    @model_validator(mode="after")
    def _limits(self) -> ScoreRule:
        if self.at_least is None and self.at_most is None:
            raise ValueError("a score needs at_least or at_most")
        return self


class BrandRule(_Part):
    """A report which states that the composition's pictures pass this brand sheet."""

    sheet: Text = Field(description="name of the sheet in the registry, or its sha256:…")
    at_least: float = Field(1.0, ge=0, le=1, description="share of the pictures that passes")
    actions: tuple[Action, ...] = Field(USING, description="that need it")


class ForbiddenRule(_Part):
    """Words that no prompt, and triggers that no adapter may have, in upper or lower case."""

    triggers: tuple[Text, ...] = ()
    words: tuple[Text, ...] = ()


class SignatureRule(_Part):
    """A requirement that adapters are signed."""

    adapters: bool = Field(False, description="every adapter has a signature of an author whom the registry trusts")


class ApprovalRule(_Part):
    """Actions that need an approval, and who may give it."""

    actions: tuple[Action, ...] = Field(USING, description="that need it")
    approvers: tuple[Text, ...] = Field((), description="people by name; every reviewer if none")
    needed: int = Field(1, ge=1, le=10, description="people who have to approve")
    days: int | None = Field(None, ge=1, le=3660, description="after which an approval ends")


SECTIONS: dict[str, type[BaseModel]] = {
    "licence": LicenceRule,
    "combine": CombineRule,
    "weight": WeightRule,
    "score": ScoreRule,
    "brand": BrandRule,
    "forbidden": ForbiddenRule,
    "signatures": SignatureRule,
    "approval": ApprovalRule,
}


class Policy(_Part):
    """All rules of a policy. What stands in none is permitted."""

    name: Text = Field(description="of the policy")
    version: int = Field(ge=1, description="counts up; a lower one replaces a higher one only signed by an operator")
    description: str = ""
    expires: date | None = Field(None, description="last day on which it permits anything")
    licence: LicenceRule | None = None
    combine: CombineRule = CombineRule.model_validate({})
    weight: tuple[WeightRule, ...] = ()
    score: tuple[ScoreRule, ...] = ()
    brand: BrandRule | None = None
    forbidden: ForbiddenRule = ForbiddenRule.model_validate({})
    signatures: SignatureRule = SignatureRule.model_validate({})
    approval: ApprovalRule | None = None

    @classmethod
    def parse(cls, fields: Mapping[str, Any]) -> Policy:
        """Return the policy with these fields. PolicyError lists all that are wrong."""
        remedy = "docs/policy.md describes every field; `qrlora policy schema` prints them"
        return validated(cls, fields, "policy", PolicyError, sections=SECTIONS, remedy=remedy)

    @classmethod
    def load(cls, path: Path) -> Policy:
        """Read a TOML file. PolicyError if it is none, or has wrong fields."""
        return cls.parse(read_toml(path, "the policy", PolicyError, remedy="docs/policy.md has an example"))

    @classmethod
    def file_schema(cls) -> dict[str, Any]:
        """Return the JSON Schema of the file, for completion and validation in editors."""
        header = {"title": "qrlora policy", "description": "What a company combines and uses; see docs/policy.md."}
        return {"$schema": "http://json-schema.org/draft-07/schema#", **cls.model_json_schema(), **header}

    @property
    def record(self) -> dict[str, Any]:
        """Return what the file says, without the defaults: a later version of qrlora may have others."""
        return self.model_dump(mode="json", exclude_unset=True)

    @property
    def digest(self) -> str:
        """Return the digest of its canonical JSON."""
        return digest_of(canonical_json(self.record))

    @property
    def title(self) -> str:
        return f"{self.name}, version {self.version}"

    def lines(self) -> Iterator[str]:
        """Return what the rules say, a sentence each."""
        yield f"{self.title} ({self.digest[:19]})" + (f", until {self.expires}" if self.expires else "")
        if self.licence:
            yield f"licence: all licences together have to allow {self.licence.use} use"
            yield from (f"licence: {one} by agreement: {why}" for one, why in self.licence.agreements.items())
        yield from self._combine_lines()
        for rule in self.weight:
            of = ", ".join(f"{key} {value}" for key, value in _selected(rule)) or "all adapters"
            yield f"weight: of {of} {limits(rule.at_least, rule.at_most)}"
        for score in self.score:
            of = "the composition" if score.of == "composition" else "each adapter"
            yield f"score: {score.value} of {of} in report {score.report} {limits(score.at_least, score.at_most)}"
        if self.brand:
            yield f"brand: {100 * self.brand.at_least:g} % of the pictures pass the sheet {self.brand.sheet}"
        for what, words in (("triggers", self.forbidden.triggers), ("words of prompts", self.forbidden.words)):
            if words:
                yield f"forbidden: {what}: {', '.join(words)}"
        if self.signatures.adapters:
            yield "signatures: every adapter is signed by an author"
        if self.approval:
            needed, people = self.approval.needed, "people" if self.approval.needed > 1 else "person"
            until = f", for {self.approval.days} days" if self.approval.days else ""
            by = " or ".join(self.approval.approvers) or "the reviewers"
            yield f"approval: {', '.join(self.approval.actions)} needs {needed} {people} of {by}{until}"

    def _combine_lines(self) -> Iterator[str]:
        rule = self.combine
        given = rule.model_fields_set
        if "adapters" in given:
            yield f"combine: {rule.adapters[0]} to {rule.adapters[1]} adapters"
        if rule.roles:
            yield "combine: roles " + "; or ".join(" + ".join(one or "none" for one in roles) for roles in rule.roles)
        for what in ("owners", "required_tags", "forbidden_tags"):
            if getattr(rule, what):
                yield f"combine: {what.replace('_', ' ')}: {', '.join(getattr(rule, what))}"
        if "null_space" in given:
            yield f"combine: null-space projection {rule.null_space[0]:g} to {rule.null_space[1]:g}"
        for pair in rule.never:
            one, other = (
                ", ".join(f"{key} {value}" for key, value in _selected(side)) for side in (pair.one, pair.other)
            )
            yield f"combine: never {one} with {other}" + (f": {pair.why}" if pair.why else "")


def _selected(selector: Selector) -> list[tuple[str, str]]:
    found = [(name, getattr(selector, name)) for name in Selector.model_fields]
    return [(name, value) for name, value in found if value is not None]


def limits(at_least: float | None, at_most: float | None) -> Said:
    """Return limits as text."""
    parts = [said("at least %(low)s", low=f"{at_least:g}")] if at_least is not None else []
    parts += [said("at most %(high)s", high=f"{at_most:g}")] if at_most is not None else []
    return joined(parts, " and ") if parts else said("any")
