"""`qrlora serve`."""

from __future__ import annotations

import functools
import logging
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import rich_click as click

from qrlora._reading import read_text
from qrlora.apps.cli.command import Options, command, hold
from qrlora.apps.cli.keys import c2pa_option, load_certificate
from qrlora.apps.cli.permission import permission_options, place_of, rules_of
from qrlora.apps.cli.recorded import recorder_here, referable
from qrlora.apps.cli.shared import COUNT, PATH, check_there, model_options, null_space_option
from qrlora.errors import QrloraError

if TYPE_CHECKING:
    from qrlora.apps.cli.recorded import Mark
    from qrlora.apps.serving.protocol import Facts, Finish, Limits, Permission
    from qrlora.method.adapter import AdapterMetadata
    from qrlora.models.request import Request
    from qrlora.operations.provenance.certificates import Certificate

KEY_VARIABLE = "QRLORA_API_KEY"
RAY_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Serve gives up a proxy that does not answer within 5 s of its start, which takes longer where cores are busy.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
}
"""Read when Ray is imported, here and in the processes that it starts."""


@command(
    "serve",
    "Serve pictures over HTTP to any OpenAI client; every request has a composition of its own",
    "Needs pip install 'qrlora[serve]', on Ray 'qrlora[cluster]'. Ctrl-C lets running requests finish; a second one "
    "does not. See docs/serve.md.",
)
@click.option("--adapters", type=PATH, metavar="DIR", help="folder of adapter files")
@click.option(
    "--adapter",
    multiple=True,
    type=PATH,
    metavar="FILE",
    help="in place of a folder: adapter files, or registry:NAME@alias, each served by its name; given again",
)
@click.option("--record", is_flag=True, help="record every picture in the registry before it is sent; not on Ray")
@c2pa_option
@model_options
@click.option("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
@click.option("--port", type=COUNT, default=8000, help="port to listen on (default: 8000)")
@click.option(
    "--api-key-file", type=PATH, metavar="FILE", help=f"keys, one a line (or ${KEY_VARIABLE}; default: none needed)"
)
@null_space_option
@click.option("--batch-size", type=COUNT, default=8, help="pictures made at once (default: 8)")
@click.option(
    "--queue",
    type=COUNT,
    default=256,
    help="largest number of waiting pictures; beyond it requests get 429 (default: 256)",
)
@click.option(
    "--max-side",
    type=COUNT,
    metavar="PIXELS",
    help="longest side that a request may ask for (default: twice the model's own)",
)
@click.option(
    "--max-steps", type=COUNT, default=100, help="most denoising steps that a request may ask for (default: 100)"
)
@click.option("--threads", type=COUNT, help="processor cores of an engine (default: all, in equal shares)")
@click.option("--engines", type=COUNT, default=1, help="copies of the base model; more than one run on Ray Serve")
@click.option(
    "--address",
    metavar="HOST:PORT",
    help="join the Ray cluster there (auto: this machine's), or start one that ends with the server: local "
    "(default: no Ray)",
)
@permission_options
@referable()
def run_serve(options: Options) -> None:
    """Serve until told to stop."""
    rules_of(options)  # what is wrong with them is said at once
    keys = _api_keys(options.api_key_file)
    if options.adapter:
        options.adapters = _gathered(options)
    if options.adapters is None:
        raise QrloraError("nothing to serve", expected="--adapters DIR, or --adapter FILE", got="neither")
    if not options.adapters.is_dir():
        got = "a file" if options.adapters.exists() else "nothing there"
        raise QrloraError(f"{options.adapters} is no folder", expected="a folder of adapters", got=got)
    if options.address in (None, "local"):
        _check_free(options.host, options.port)
    elif options.address != "auto":
        check_there(options.address)
    on_ray = options.address or options.engines > 1
    if options.record and not recorder_here():
        expected, remedy = "--registry PLACE", "leave --record out"
        raise QrloraError("pictures cannot be recorded", expected=expected, got="no registry", remedy=remedy)
    if on_ray and (options.record or options.c2pa):
        got, remedy = "several processes", "leave --record and --c2pa out"
        expected = "one engine without --address"
        raise QrloraError("pictures cannot be recorded or marked", expected=expected, got=got, remedy=remedy)
    try:
        import qrlora.apps.serving.app  # noqa: F401
        from qrlora.apps.serving.protocol import Limits

        if on_ray:
            os.environ.update({**RAY_SETTINGS, **os.environ})
            import ray.serve  # noqa: F401
    except ImportError as error:
        extra = "cluster" if on_ray else "serve"
        remedy = f"pip install 'qrlora[{extra}]'"
        raise QrloraError("serving needs more packages", got=f"no {error.name}", remedy=remedy) from error
    limits = Limits(
        api_keys=keys,
        side=options.max_side,
        steps=options.max_steps,
        at_once=options.engines,
        batch_size=options.batch_size,
        queue_length=options.queue,
        null_space=options.null_space,
        permission=_permission(options),
    )
    (_run_on_ray if on_ray else _run_here)(options, limits)


def _permission(options: Options) -> Permission | None:
    """Return the rules that requests have to keep; None if no registry or policy is in play."""
    from qrlora.apps.serving.protocol import Permission

    place = place_of(options)
    if not place and not options.policy and not options.require_approval:
        return None
    if options.require_approval and not place:
        from qrlora.operations.registry import default_place

        place = default_place()
    return Permission(place, options.policy, options.require_approval, options.model)


def _run_here(options: Options, limits: Limits) -> None:
    from qrlora.apps.serving import local

    what = (options.model, options.adapters, options.dtype, options.threads)
    recorder = recorder_here() if options.record else None
    finish: Finish | None = None
    mark = _marker(options, signer) if (signer := load_certificate(options.c2pa)) else None
    if recorder:
        finish = recorder.of_server(options.model, options.adapters, options.null_space, mark)
    elif mark:
        finish = _without_registry(mark)
    local.run(*what, options.host, options.port, limits, lambda facts: _say_ready(facts, options, limits), finish)


def _without_registry(mark: Mark) -> Finish:
    return lambda picture, _, png: mark(picture, png, "")


def _marker(options: Options, signer: Certificate) -> Mark:
    """Return a function that puts a signed manifest into a picture."""
    from qrlora.models.exchange import load_any
    from qrlora.operations.provenance.c2pa import Origin, mark
    from qrlora.operations.provenance.canonical import known_digest

    @functools.lru_cache(maxsize=4096)
    def metadata(path: Path, _digest: str) -> AdapterMetadata:
        return load_any(path).metadata

    def marked(picture: Request, png: bytes, composition: str) -> bytes:
        paths = [options.adapters / f"{name}.safetensors" for name in sorted(picture.composition)]
        digests = map(known_digest, paths)
        parts = [(path.name, digest, metadata(path, digest)) for path, digest in zip(paths, digests, strict=True)]
        origin = Origin.of(parts, options.model, picture.prompt, picture.seed, composition)
        return mark(png, origin, signer)

    return marked


def _gathered(options: Options) -> Path:
    """Make a folder of links to the adapters that are named one by one."""
    if options.adapters:
        raise QrloraError("adapters in two ways", expected="--adapters DIR or --adapter FILE", got="both")
    folder = Path(hold(TemporaryDirectory(prefix="qrlora-")))
    for path in options.adapter:
        if (folder / path.name).exists():
            got = f"two called {path.stem}"
            raise QrloraError("adapters of one name", expected="each by a name of its own", got=got)
        if not path.is_file():
            raise QrloraError(f"no adapter {path}", expected="a file, or registry:NAME@alias", got="no such file")
        (folder / path.name).symlink_to(path.resolve())
    return folder


def _run_on_ray(options: Options, limits: Limits) -> None:
    from qrlora.apps.serving import cluster

    place = cluster.Place(options.host, options.port, options.address or "local", options.engines, options.threads)
    told = threading.Event()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a cluster would go on with what was begun
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        front = cluster.start(options.model, options.adapters, options.dtype, place, limits)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: told.set())
        _say_ready(front.facts.remote().result(), options, limits)
        told.wait()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the second one is meant
        cluster.stop(front, limits)
    finally:
        cluster.leave()


def _api_keys(path: Path | None) -> tuple[str, ...]:
    if path is None:
        return tuple(os.environ.get(KEY_VARIABLE, "").split())
    text = read_text(path, "the API keys in", QrloraError)
    keys = tuple(line.strip() for line in text.split("\n") if line.strip())
    if not keys:
        raise QrloraError(f"{path} holds no key", expected="one a line", got="none", remedy="leave --api-key-file out")
    return keys


def _check_free(host: str, port: int) -> None:
    """Check that the port is free, before the model is loaded."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((host, port))
        except (OSError, OverflowError) as error:
            what = f"cannot listen on {host}, port {port}"
            raise QrloraError(
                what, expected="a free port of this machine", got=error, remedy="name another --port"
            ) from error


def _say_ready(facts: Facts, options: Options, limits: Limits) -> None:
    for name, reason in sorted(facts.left_out.items()):
        print(f"not served: {name}: {reason}", file=sys.stderr)
    if not limits.api_keys and options.host not in ("127.0.0.1", "::1", "localhost"):
        print(f"without --api-key-file, whoever reaches {options.host} may use this server", file=sys.stderr)
    adapters = ", ".join(sorted(facts.adapters)) or "none"
    print(f"{facts.model} with adapters: {adapters}")
    print(f"ready at http://{options.host}:{options.port}/v1", flush=True)
