"""`qrlora studio`."""

from __future__ import annotations

import threading
import webbrowser

import rich_click as click

from qrlora.apps.cli.command import Options, command
from qrlora.apps.cli.serve import KEY_VARIABLE, _api_keys, _check_free
from qrlora.apps.cli.shared import COUNT, PATH, model_options
from qrlora.errors import QrloraError

LOCAL = ("127.0.0.1", "localhost", "::1")


@command(
    "studio",
    "Open the studio in the browser: train, mix, evaluate and register adapters",
    "Needs pip install 'qrlora[studio]'. The page is there at once; the base model is loaded behind it. Ctrl-C ends "
    "it, and a training run with it, which can be resumed. See docs/studio.md.",
)
@click.option(
    "--registry", metavar="PLACE", help="folder or database URL (or $QRLORA_REGISTRY; default: one in your home)"
)
@click.option("--adapters", type=PATH, metavar="DIR", help="a folder of adapter files, beside those of the registry")
@model_options
@click.option("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
@click.option("--port", type=COUNT, default=8765, help="port to listen on (default: 8765)")
@click.option(
    "--api-key-file",
    type=PATH,
    metavar="FILE",
    help=f"keys that people log in with, one a line (or ${KEY_VARIABLE}); needed on any other --host",
)
@click.option("--threads", type=COUNT, help="processor cores of the base model (default: all)")
@click.option("--browser/--no-browser", default=True, help="open it (default), or only print its address")
def run_studio(options: Options) -> None:
    """Serve the studio until told to stop."""
    keys = _api_keys(options.api_key_file)
    if not keys and options.host not in LOCAL:
        raise QrloraError(
            f"whoever reaches {options.host} could use this studio",
            expected="keys that people log in with",
            got="none",
            remedy=f"name a file with one key a line: --api-key-file FILE (or set {KEY_VARIABLE})",
        )
    if options.adapters and not options.adapters.is_dir():
        raise QrloraError(f"{options.adapters} is no folder", expected="a folder of adapters", remedy="check the path")
    _check_free(options.host, options.port)
    try:
        from qrlora.apps.studio.serve import serve
    except ImportError as error:
        remedy = "pip install 'qrlora[studio]'"
        raise QrloraError("the studio needs more packages", got=f"no {error.name}", remedy=remedy) from error
    serve(options, keys, lambda: _ready(options))


def _ready(options: Options) -> None:
    host = options.host if options.host not in ("0.0.0.0", "::") else "localhost"
    address = f"http://[{host}]:{options.port}/" if ":" in host else f"http://{host}:{options.port}/"
    print(f"the studio is at {address}", flush=True)
    if options.browser:
        threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
