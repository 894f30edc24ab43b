"""Check each request's composition against the policy and the approvals of a registry."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from qrlora.apps.serving.protocol import Facts, Permission
from qrlora.errors import PolicyError, QrloraError, RequestError
from qrlora.operations.policy.action import Rules, Source, base_in_use, combination_of_files
from qrlora.operations.policy.check import Verdict, enforce
from qrlora.operations.policy.decisions import Given, decisions
from qrlora.operations.policy.findings import forbidden_words
from qrlora.operations.registry import Artifact, Registry

KEPT = 1024
"""Verdicts that are kept until the registry, the trust file or the policy changes, or the approval ends."""
LONGEST = timedelta(seconds=60)
"""Longest time that a verdict is kept: a policy ends by the calendar."""


class Gate:
    """The check that permits compositions, or raises the reason why not. Safe to use from several threads.

    Args:
        permission: where the rules are.

    Raises:
        QrloraError: there is no such registry, or its policy cannot be read.
    """

    def __init__(self, permission: Permission):
        self.permission = permission
        self.registry = Registry.open(permission.registry, create=False) if permission.registry else None
        self._lock = threading.Lock()
        self._stamp: object = None
        self._verdicts: OrderedDict[Any, tuple[datetime, list[Verdict]]] = OrderedDict()
        self._rules = Rules.of(self.registry, permission.policy, permission.approval)
        self._base: Artifact | None = None
        self._given: list[Given] = []
        if self.registry:
            self._base = base_in_use(self.registry, permission.model)

    def permit(
        self, prompt: str, composition: Mapping[str, float], strength: float | None, facts: Facts
    ) -> tuple[float, dict[str, str]]:
        """Return the null-space strength and the digest of each adapter's file, as they are permitted.

        Raises:
            RequestError: 403 with the reason if it is not permitted; 503 if that cannot be found out.
        """
        if strength is None:
            from qrlora.method.composition.null_space import strength_of_roles

            strength = strength_of_roles([str(facts.adapters[name].get("role") or "") for name in composition])
        digests = {name: facts.digests[name] for name in composition}
        try:
            with self._lock:
                verdicts = self._checked(prompt, composition, strength, facts)
        except QrloraError as error:
            raise _unknown(error) from error
        except Exception as error:  # whatever a database or a disk raises: nothing is served that was not permitted
            raise _unknown(error) from error
        refusals = [finding for verdict in verdicts for finding in verdict.refusals]
        refusals += [one for policy in self._rules.policies for one in forbidden_words(policy, [prompt])]
        if refusals:
            said = list(dict.fromkeys(f"{one.rule}: {one.got}; expected {one.expected}" for one in refusals))
            raise RequestError(
                "this composition is not permitted here",
                status=403,
                code="not_permitted",
                got="; ".join(said)[:2000],
                remedy=refusals[0].remedy,
            )
        return strength, digests

    def _checked(self, prompt: str, composition: Mapping[str, float], strength: float, facts: Facts) -> list[Verdict]:
        now = datetime.now(timezone.utc)
        self._look_again()
        parts = sorted((facts.digests[name], name, weight) for name, weight in composition.items())
        by_prompt = any(one.about.get("prompts") for one in self._given)
        key = (tuple(parts), strength, prompt if by_prompt else None)
        until, verdicts = self._verdicts.get(key, (now, []))
        if until > now:
            return verdicts
        sources = [(Source(name, digest, "", facts.adapters[name]), weight) for digest, name, weight in parts]
        combination = combination_of_files(self.registry, sources, strength, [prompt], self._base)
        verdicts = self._rules.verdicts("serve", combination, now, self._given)
        until = min([now + LONGEST, *(verdict.until for verdict in verdicts if verdict.until)])
        self._verdicts[key] = until, verdicts
        if len(self._verdicts) > KEPT:
            self._verdicts.popitem(last=False)
        if not all(verdict.permitted for verdict in verdicts):
            with contextlib.suppress(PolicyError):  # for the audit log
                enforce(verdicts, self.registry)
        return verdicts

    def _look_again(self) -> None:
        """Forget all verdicts if the registry, the trust file or the policy's file has changed."""
        stamp = self._read_stamp()
        if stamp != self._stamp:
            self._stamp = None  # until all of it is read
            self._verdicts.clear()
            self._rules = Rules.of(self.registry, self.permission.policy, self.permission.approval)
            self._given = decisions(self.registry) if self.registry else []
            self._stamp = stamp

    def _read_stamp(self) -> object:
        files = [self.registry.folder / "trust.json"] if self.registry else []
        files += [self.permission.policy] if self.permission.policy else []
        return _last_change(self.registry) if self.registry else None, *(_file_stamp(path) for path in files)


def _last_change(registry: Registry) -> object:
    """Return the newest entry of the audit log, but for refusals and generated pictures, which change no permission."""
    from sqlalchemy import select

    from qrlora.operations.registry.database import reading
    from qrlora.operations.registry.schema import AuditRow

    newest = select(AuditRow.seq, AuditRow.hash).order_by(AuditRow.seq.desc()).limit(1)
    newest = newest.where(AuditRow.action != "refused", AuditRow.details.not_like('%"kind":"generated"%'))
    with reading(registry.engine) as session:
        row = session.execute(newest).first()
        return tuple(row) if row else None


def _file_stamp(path: Path) -> object:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _unknown(error: Exception) -> RequestError:
    said = error.what if isinstance(error, QrloraError) else type(error).__name__
    return RequestError(
        "whether this is permitted cannot be found out, so it is not served",
        status=503,
        code="permission_unknown",
        got=said,
        remedy="tell who runs this server: its registry or its policy cannot be read",
    )
