"""The routes that show how a server is doing: `/`, `/stats`, `/traces` and `/metrics`."""

import asyncio
import base64
import hashlib
import re
from collections.abc import Callable
from importlib.resources import files
from typing import Any, Final, TypeAlias

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from engine.serve.observed import Observed
from engine.serve.otlp import otlp
from engine.serve.refusals import forbidden, invalid
from engine.serve.report import TracesReport
from engine.serve.status import status_report
from engine.serve.traces import trace_report, visible

Viewer: TypeAlias = Callable[[Request], str | None]
PAGE: Final = "status.html"
SAFE: Final = {"cache-control": "no-store", "x-content-type-options": "nosniff"}


def routes(observed: Observed, viewer: Viewer) -> list[Route]:
    """Routes to mount.

    Args:
        viewer: the tenant who asks; None for one who may see all. Raises what the app answers
            with where a key is needed and missing. `/` holds no numbers and is for everybody; a
            tenant sees its own traces. Sums over all requests would tell what others do.
    """
    html = files("engine.serve").joinpath(PAGE).read_text("utf-8")
    page_headers = SAFE | {
        "content-security-policy": policy(html),
        "referrer-policy": "no-referrer",
    }

    async def page(request: Request) -> Response:
        return Response(html, media_type="text/html", headers=page_headers)

    async def stats(request: Request) -> Response:
        _all(viewer(request))
        return await asyncio.to_thread(lambda: _json(status_report(observed)))

    async def traces(request: Request) -> Response:
        tenant, id_ = viewer(request), request.query_params.get("id")
        form = request.query_params.get("format")
        if form not in (None, "otlp"):
            raise invalid("Invalid value for 'format': otlp is the only one.", "format")

        def found() -> Response:
            shown = visible(observed.recent, tenant, id_)
            if form == "otlp":
                return _json(otlp(shown))
            return _json(TracesReport(traces=[trace_report(trace) for trace in shown]))

        return await asyncio.to_thread(found)

    async def metrics(request: Request) -> Response:
        _all(viewer(request))
        accept = request.headers.get("accept")
        text, kind = await asyncio.to_thread(observed.metrics.exposition, accept)
        return Response(text, headers=SAFE | {"content-type": kind})

    return [
        Route("/", page),
        Route("/stats", stats),
        Route("/traces", traces),
        Route("/metrics", metrics),
    ]


def _all(tenant: str | None) -> None:
    """403 for a tenant that may not see what others do."""
    if tenant is not None:
        raise forbidden("This key may not see the server's numbers: they are not its own alone.")


def policy(html: str) -> str:
    """A content security policy under which a page's own script and style run, and no others."""
    return (
        f"default-src 'none'; script-src {_digests('script', html)}; "
        f"style-src {_digests('style', html)}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _digests(tag: str, html: str) -> str:
    found = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in found]
    return " ".join(f"'sha256-{hash_}'" for hash_ in hashes)


def _json(value: Any) -> Response:
    body = msgspec.json.encode(value)
    return Response(body, media_type="application/json", headers=SAFE)
