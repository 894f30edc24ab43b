"""Put C2PA manifests into pictures: signed statements that a model made them, with what and by whom.

marked = mark(png, Origin("a teapot", prompt="a teapot", seed=3), Certificate.load("acme"))
read(marked, own_roots()).words        # "made by ACME (acme), unchanged since"

A manifest proves who signed, and that nothing changed since; not that what was signed is true. Nothing is fetched.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import c2pa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from qrlora import __version__
from qrlora.errors import SignatureError
from qrlora.operations.provenance.certificates import Certificate
from qrlora.operations.provenance.keys import SigningKey

if TYPE_CHECKING:
    from qrlora.method.adapter import AdapterMetadata

ORIGIN = "org.qrlora.origin"
TYPES = {"adapter": "c2pa.types.model.pytorch", "base": "c2pa.types.model", "picture": "c2pa.types.dataset"}
MOST_BYTES = 256 << 20
State = Literal["valid", "unknown", "expired", "changed", "invalid", "absent"]
_FORMATS = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg", b"RIFF": "image/webp"}
_SETTINGS = {
    "verify": {"verify_after_sign": False, "remote_manifest_fetch": False, "ocsp_fetch": False, "verify_trust": True},
    "builder": {"thumbnail": {"enabled": False}},
}
_CHANGES = ("dataHash.mismatch", "hashedURI.mismatch", "claimSignature.mismatch", "claimSignature.missing")


@dataclass(frozen=True)
class Origin:
    """The prompt, seed, model and adapters that made a picture. All of it can be read by whoever has the picture.

    Attributes:
        ingredients: (name, `sha256:…`, kind out of `TYPES`) of adapters and the base model.
        composition: digest of the registered composition.
        licence: SPDX expression.
    """

    title: str
    prompt: str = ""
    seed: int | None = None
    software: str = ""
    ingredients: tuple[tuple[str, str, str], ...] = ()
    licence: str = ""
    composition: str = ""

    @classmethod
    def of(
        cls,
        parts: Sequence[tuple[str, str, AdapterMetadata]],
        model: str,
        prompt: str,
        seed: int | None,
        composition: str = "",
        *,
        title: str = "picture.png",
    ) -> Origin:
        """Return the origin of a picture that this program generated.

        Args:
            parts: name, file's digest and metadata of each adapter.
            model: name of the base model.
            composition: digest of what is registered of them; empty without a registry.
        """
        base = next((meta.base_digest for _, _, meta in parts if meta.base_digest), model)
        adapters = ((name, digest, "adapter") for name, digest, _ in parts)
        licences = " AND ".join(sorted({meta.licence for _, _, meta in parts} - {""}))
        return cls(title, prompt, seed, __version__, (*adapters, (model, base, "base")), licences, composition)

    def manifest(self) -> dict[str, Any]:
        """Return the manifest, as the builder takes it."""
        told = {"prompt": self.prompt, "seed": self.seed, "licence": self.licence, "composition": self.composition}
        version = {"version": self.software} if self.software else {}
        return {
            "title": self.title,
            "claim_generator_info": [{"name": "qrlora", **version}],
            "ingredients": [
                {
                    "title": name,
                    "relationship": "inputTo",
                    "format": "application/octet-stream",
                    "instance_id": digest,
                    "data_types": [{"type": TYPES[kind]}],
                }
                for name, digest, kind in self.ingredients
            ],
            "assertions": [{"label": ORIGIN, "data": {key: one for key, one in told.items() if one not in ("", None)}}],
        }


@dataclass(frozen=True)
class Found:
    """The statement in a picture, and whether it can be believed.

    Attributes:
        state: valid (under a root that is trusted here), unknown (intact, under another root), expired, changed,
            invalid (damaged) or absent.
        signer: as the certificate calls itself; proven where the state is valid, else a claim.
        ingredients: (name, digest).
        origin: prompt, seed, licence, composition.
    """

    state: State
    signer: str = ""
    title: str = ""
    ingredients: tuple[tuple[str, str], ...] = ()
    origin: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""

    @property
    def words(self) -> str:
        """Return the finding as a sentence."""
        return {
            "valid": f"signed by {self.signer} under a root that is trusted here, and unchanged since",
            "unknown": f"signed by somebody unknown here, who calls themselves {self.signer}, and unchanged since",
            "expired": f"unchanged since {self.signer} signed it, but that certificate has ended, and no timestamp "
            "proves that it was signed before",
            "changed": f"changed after it was signed by {self.signer or 'somebody'}",
            "invalid": f"its C2PA manifest cannot be read: {self.reason}",
            "absent": "no C2PA manifest: never marked, or stripped, as by saving it again in another program",
        }[self.state]


def mark(picture: bytes, origin: Origin, signer: Certificate) -> bytes:
    """Return the picture (PNG, JPEG or WebP) with a signed manifest in it; its pixels and text chunks stay."""
    return _signed(picture, origin, signer, embed=True)[0]


def sidecar(picture: bytes, origin: Origin, signer: Certificate) -> bytes:
    """Return the manifest alone, for a file PICTURE.c2pa beside a picture that must not change by a byte."""
    return _signed(picture, origin, signer, embed=False)[1]


def _signed(picture: bytes, origin: Origin, signer: Certificate, *, embed: bool) -> tuple[bytes, bytes]:
    signer.check()
    key = SigningKey(signer.name, signer.private)

    def sign(message: bytes) -> bytes:
        """Return r and s side by side, as COSE stores them."""
        return b"".join(number.to_bytes(32, "big") for number in decode_dss_signature(key.sign(message)))

    out = io.BytesIO()
    with (
        _errors("cannot mark this picture"),
        c2pa.Context.from_dict(_SETTINGS) as context,
        c2pa.Signer.from_callback(sign, c2pa.C2paSigningAlg.ES256, signer.chain_pem) as signing,
        c2pa.Builder(json.dumps(origin.manifest()), context) as builder,
    ):
        builder.set_intent(c2pa.C2paBuilderIntent.CREATE, c2pa.C2paDigitalSourceType.TRAINED_ALGORITHMIC_MEDIA)
        if not embed:
            builder.set_no_embed()
        manifest = builder.sign(signing, _format(picture), io.BytesIO(picture), out)
    return out.getvalue(), manifest


def read(picture: bytes, roots: Iterable[str] = (), *, manifest: bytes | None = None) -> Found:
    """Return the statement of the picture's manifest, and whether it holds.

    Args:
        roots: PEM of the certificates that are trusted, as `certificates.own_roots` finds them.
        manifest: of a sidecar file.

    Raises:
        SignatureError: it is no PNG, JPEG or WebP.
    """
    trusted = "\n".join(roots)
    settings = {**_SETTINGS, **({"trust": {"user_anchors": trusted}} if trusted else {})}
    kind = _format(picture)
    try:
        with (
            c2pa.Context.from_dict(settings) as context,
            c2pa.Reader(kind, io.BytesIO(picture), manifest, context=context) as reader,
        ):
            found = json.loads(reader.json())
    except c2pa.C2paError.ManifestNotFound:
        return Found("absent")
    except c2pa.C2paError as error:
        return Found("invalid", reason=str(error)[:300])
    return _found(found)


def _found(report: Mapping[str, Any]) -> Found:
    active = report.get("manifests", {}).get(report.get("active_manifest"), {})
    by = active.get("signature_info", {})
    failures = [one["code"] for one in report.get("validation_status", [])]
    assertions = {one["label"]: one["data"] for one in active.get("assertions", [])}
    signer = " / ".join(text for text in (by.get("issuer"), by.get("common_name")) if text)
    return Found(
        _state(str(report.get("validation_state")), failures),
        signer=signer,
        title=active.get("title", ""),
        ingredients=tuple((one.get("title", ""), one.get("instance_id", "")) for one in active.get("ingredients", [])),
        origin=assertions.get(ORIGIN, {}),
        reason=", ".join(failures),
    )


def _state(said: str, failures: list[str]) -> State:
    if any(code.endswith(_CHANGES) for code in failures):
        return "changed"
    if "signingCredential.expired" in failures:
        return "expired"
    if said == "Trusted" and not failures:
        return "valid"
    return "unknown" if said == "Valid" and failures == ["signingCredential.untrusted"] else "invalid"


def _format(picture: bytes) -> str:
    for start, kind in _FORMATS.items():
        if picture.startswith(start) and len(picture) <= MOST_BYTES:
            return kind
    expected = f"PNG, JPEG or WebP of at most {MOST_BYTES >> 20} MB"
    raise SignatureError("no picture that can carry a C2PA manifest", expected=expected, got=picture[:8])


@contextlib.contextmanager
def _errors(what: str) -> Iterator[None]:
    try:
        yield
    except c2pa.C2paError as error:
        raise SignatureError(what, got=str(error)[:300], remedy="check that the picture opens in a viewer") from error
