"""Check each request's composition against the policy and the approvals of a registry."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from cachetools import LRUCache
from sqlalchemy import select

from qrlora._said import joined, said
from qrlora.apps.serving.protocol import Facts, Permission
from qrlora.errors import PolicyError, QrloraError, RequestError
from qrlora.operations.policy.action import Rules, Source, base_in_use, combination_of_files
from qrlora.operations.policy.check import Verdict, enforce
from qrlora.operations.policy.decisions import Given, decisions
from qrlora.operations.policy.findings import forbidden_words
from qrlora.operations.registry import Artifact, Registry
from qrlora.operations.registry.database import reading
from qrlora.operations.registry.schema import AuditRow
from qrlora.operations.registry.signatures import trust_path

KEPT = 1024
"""Verdicts that are kept until the registry, the trust file or the policy changes, or the approval ends."""
LONGEST = timedelta(seconds=60)
"""Longest time that a verdict is kept: a policy ends by the calendar."""


class Gate:
    """The check that permits compositions, or raises the reason why not. Safe to use from several threads.

    Args:
        permission: where the rules are.
        registry: in place of `permission.registry`, where it is open already.

    Raises:
        QrloraError: there is no such registry, or its policy cannot be read.
    """

    def __init__(self, permission: Permission, registry: Registry | None = None):
        self.permission = permission
        self.registry = registry
        if registry is None and permission.registry:
            self.registry = Registry.open(permission.registry, create=False)
        self._lock = threading.Lock()
        self._stamp: object = None
        self._log = _Log(self.registry) if self.registry else None
        self._verdicts: LRUCache[Any, tuple[datetime, list[Verdict]]] = LRUCache(KEPT)
        self._rules = Rules.of(self.registry, permission.policy, permission.approval)
        self._given: list[Given] = []
        if not self._rules.empty:
            _ = self._base  # hashed now, so that the first request does not wait for it

    @functools.cached_property
    def _base(self) -> Artifact | None:
        return base_in_use(self.registry, self.permission.model) if self.registry else None

    def permit(
        self,
        prompt: str,
        composition: Mapping[str, float],
        strength: float | None,
        facts: Facts,
        action: str = "serve",
    ) -> tuple[float, dict[str, str]]:
        """Return the null-space strength and the digest of each adapter's file, as they are permitted.

        action: what the pictures are made for, as `check` takes it.

        Raises:
            RequestError: 403 with the reason if it is not permitted; 503 if the registry cannot be read.
        """
        if strength is None:
            from qrlora.method.composition.null_space import strength_of_roles

            strength = strength_of_roles([str(facts.adapters[name].get("role") or "") for name in composition])
        digests = {name: facts.digests[name] for name in composition}
        try:
            with self._lock:
                verdicts = self._checked(action, prompt, composition, strength, facts)
        except QrloraError as error:
            raise _unknown(error) from error
        except Exception as error:  # whatever a database or a disk raises: nothing is served that was not permitted
            raise _unknown(error) from error
        if refusals := [finding for verdict in verdicts for finding in verdict.refusals]:
            reasons = dict.fromkeys(
                said("%(rule)s: %(got)s; expected %(expected)s", rule=one.rule, got=one.got, expected=one.expected)
                for one in refusals
            )
            raise RequestError(
                "this composition is not permitted here",
                status=403,
                code="not_permitted",
                got=joined(reasons),
                remedy=refusals[0].remedy,
            )
        return strength, digests

    def _checked(
        self, action: str, prompt: str, composition: Mapping[str, float], strength: float, facts: Facts
    ) -> list[Verdict]:
        now = datetime.now(timezone.utc)
        self._look_again()
        if self._rules.empty:
            return []
        parts = sorted((facts.digests[name], name, weight) for name, weight in composition.items())
        by_prompt = any(one.about.get("prompts") for one in self._given)
        by_prompt |= any(True for policy in self._rules.policies for _ in forbidden_words(policy, [prompt]))
        key = (action, tuple(parts), strength, prompt if by_prompt else None)
        until, verdicts = self._verdicts.get(key, (now, []))
        if until > now:
            return verdicts
        sources = [(Source(name, digest, "", facts.adapters[name]), weight) for digest, name, weight in parts]
        combination = combination_of_files(self.registry, sources, strength, [prompt], self._base)
        verdicts = self._rules.verdicts(action, combination, now, self._given)
        until = min([now + LONGEST, *(verdict.until for verdict in verdicts if verdict.until)])
        self._verdicts[key] = until, verdicts
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
        files = [trust_path(self.registry)] if self.registry else []
        files += [self.permission.policy] if self.permission.policy else []
        return self._log.last_change() if self._log else None, *(_file_stamp(path) for path in files)


class _Log:
    """The audit log, in which each request looks for changes: what was looked at before is not read again."""

    def __init__(self, registry: Registry):
        self.registry = registry
        self._tip: tuple[int, str] | None = None
        self._change: tuple[int, str] | None = None

    def last_change(self) -> object:
        """Return the newest entry, but for refusals and generated pictures, which change no permission."""
        newest = select(AuditRow.seq, AuditRow.hash).order_by(AuditRow.seq.desc()).limit(1)
        changes = newest.where(AuditRow.action != "refused", AuditRow.details.not_like('%"kind":"generated"%'))
        with reading(self.registry.engine) as session:
            tip = _pair(session.execute(newest).first())
            if tip != self._tip:
                if self._tip and session.execute(newest.where(AuditRow.seq == self._tip[0])).first() == self._tip:
                    changes = changes.where(AuditRow.seq > self._tip[0])
                else:  # the log was replaced, as by a backup
                    self._change = None
                self._change, self._tip = _pair(session.execute(changes).first()) or self._change, tip
        return self._change


def _pair(row: Sequence[Any] | None) -> tuple[int, str] | None:
    return (row[0], row[1]) if row else None


def _file_stamp(path: Path) -> object:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _unknown(error: Exception) -> RequestError:
    why = error.what if isinstance(error, QrloraError) else type(error).__name__
    return RequestError(
        "whether this is permitted cannot be found out, so it is not served",
        status=503,
        code="permission_unknown",
        got=why,
        remedy="tell who runs this server: its registry or its policy cannot be read",
    )
