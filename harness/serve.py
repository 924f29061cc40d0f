"""``python -m harness.serve DIR``: an edited model behind OpenAI's completions and chat completions."""

import argparse
import importlib.util
import ipaddress
import logging
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from harness.arguments import OneLineParser, one_line

if TYPE_CHECKING:
    from harness.questions import Limits
    from harness.served import Served

KEY = "SEQMMR_KEY"
LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 ended by a signal, 2 the arguments or the folder are wrong."""
    args = _parser().parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    log(LEVELS[args.log_level])
    try:
        for package in ("starlette", "uvicorn"):
            if importlib.util.find_spec(package) is None:
                raise ValueError(f"{package} is not installed; pip install 'seqmmr[serve]'")
        key = _key()
        listener = bind(args.host, args.port)
        if key is None and not _is_loopback(listener):
            print(
                f"harness.serve: {listener.getsockname()[0]} can be reached from other machines and there is "
                f"no key: whoever reaches it may ask; set {KEY}",
                file=sys.stderr,
            )
        from harness.ablation import quiet_libraries
        from harness.questions import Limits
        from harness.served import load_served

        quiet_libraries()
        limits = Limits(
            queue=args.queue, max_bytes=args.max_bytes, max_tokens=args.max_tokens, timeout=args.timeout
        )
        served = load_served(args.folder, device=args.device)
    except (ValueError, OSError) as error:
        print(f"harness.serve: {one_line(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    serve(served, listener, limits, key)
    return 0


def serve(served: "Served", listener: socket.socket, limits: "Limits", key: str | None) -> None:
    """Answer until SIGINT or SIGTERM; what runs then is finished, what waits is refused.

    listener: a bound socket. A second signal ends what runs, too.
    """
    import uvicorn

    from harness.openai_api import application

    app = application(served, limits=limits, key=key)

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            self.force_exit = self.should_exit
            self.should_exit = True

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            host, port, *_ = listener.getsockname()
            print(f"http://{f'[{host}]' if ':' in host else host}:{port}/v1", flush=True)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            app.state.worker.close()
            await super().shutdown(sockets)

    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="on",
        log_config=None,
        log_level=logging.WARNING,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=int(limits.timeout) + 5,
    )
    Server(config).run([listener])


def bind(host: str, port: int) -> socket.socket:
    """A socket that has the address but does not listen yet; ValueError if it cannot be had."""
    try:
        if not 0 <= port < 2**16:
            raise OverflowError("there is no such port")
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{host!r}, port {port}: {reason}; give another --host or --port") from None
    return listener


def log(level: int) -> None:
    """Log to the standard error; the texts of prompts, which the router logs, for those who debug."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s: %(message)s")
    logging.getLogger("harness").setLevel(level)
    logging.getLogger("harness.routed").setLevel(level if level == logging.DEBUG else logging.WARNING)


def _is_loopback(listener: socket.socket) -> bool:
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


def _key() -> str | None:
    """The key that clients must give; never named in a message."""
    key = os.environ.get(KEY)
    if key is not None and not (key.isascii() and key.isprintable() and key == key.strip() and key):
        raise ValueError(f"{KEY} is set and no key: it must be printable ASCII; correct it, or unset it")
    return key


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m harness.serve",
        description="Answer OpenAI's completions and chat completions from an edited model (docs/serve.md); "
        f"clients must give the key of the variable {KEY}, if it is set.",
    )
    add = parser.add_argument
    add("folder", metavar="DIR", type=Path, help="made by harness.edit")
    add("--host", default="127.0.0.1", help="address to answer at; default: %(default)s")
    add("--port", type=int, default=8000, help="0: any that is free; default: %(default)s")
    add("--device", help="cpu, cuda, cuda:1 ...; default: cuda if present")
    add("--queue", type=int, default=32, metavar="N", help="requests that may wait; default: %(default)s")
    add("--max-tokens", type=int, default=512, metavar="N", help="of one answer; default: %(default)s")
    add("--max-bytes", type=int, default=1 << 20, metavar="N", help="of a request; default: %(default)s")
    add("--timeout", type=float, default=120, metavar="SECONDS", help="of a request; default: %(default)s")
    add("--log-level", choices=LEVELS, default="info", help="debug: prompts too; default: %(default)s")
    return parser


if __name__ == "__main__":
    sys.exit(main())
