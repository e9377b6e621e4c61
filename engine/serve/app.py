"""The application: which address does what."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeAlias

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from engine.serve.body import Gone
from engine.serve.call import CALL, GONE, Call, Door
from engine.serve.desk import Desk
from engine.serve.documents import Documents
from engine.serve.faults import refusal_of
from engine.serve.generate import Generate
from engine.serve.pages import routes as pages
from engine.serve.refusals import Refusal, no_route, wrong_method
from engine.serve.schema import openapi
from engine.serve.wire_documents import Health, ModelList, ModelObject

Endpoint: TypeAlias = Callable[[Request], Awaitable[Response]]


class Address:
    """What a path does, by method. Whatever goes wrong before an answer begins is answered here."""

    def __init__(self, path: str, methods: Mapping[str, Endpoint]) -> None:
        self._path = path.replace(":path", "")  # of the pattern, as people write it
        self._methods = methods

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call: Call = scope[CALL]
        call.route = self._path
        try:
            response = await self._endpoint(scope)(Request(scope, receive, send))
        except Gone:
            call.dropped = "gone"
            response = Response(status_code=GONE)  # for nobody
        except Exception as error:
            response = _refusing(refusal_of(error), call)
        await response(scope, receive, send)

    def _endpoint(self, scope: Scope) -> Endpoint:
        method: str = scope["method"]
        found = self._methods.get("GET" if method == "HEAD" else method)
        if found is None:
            allowed = sorted({*self._methods, *(["HEAD"] if "GET" in self._methods else [])})
            raise wrong_method(method, scope["path"], ", ".join(allowed))
        return found


def application(desk: Desk) -> ASGIApp:
    """The server's, without lifespan: whoever opened the desk closes it."""
    generate, documents = Generate(desk), Documents(desk)
    table: dict[str, dict[str, Endpoint]] = {
        "/v1/models": {"GET": _models(desk)},
        "/v1/models/{model:path}": {"GET": _model(desk)},
        "/v1/chat/completions": {"POST": generate.chat},
        "/v1/completions": {"POST": generate.completion},
        "/v1/documents": {"GET": documents.list, "POST": documents.add},
        "/v1/documents/{id:path}": {"GET": documents.one, "DELETE": documents.delete},
        "/healthz": {"GET": _alive},
        "/readyz": {"GET": _ready(desk)},
        "/openapi.json": {"GET": _openapi(desk)},
    }
    for page in pages(desk.observed, desk.viewer):
        table[page.path] = {"GET": page.endpoint}
    routes = [Route(path, Address(path, methods)) for path, methods in table.items()]
    return Door(Router(routes, redirect_slashes=False, default=_nowhere), desk.observed)


async def _nowhere(scope: Scope, receive: Receive, send: Send) -> None:
    response = _refusing(no_route(scope["method"], scope["path"]), scope[CALL])
    await response(scope, receive, send)


def _models(desk: Desk) -> Endpoint:
    async def models(request: Request) -> Response:
        desk.tenant(request)
        return _json(ModelList(data=[_object(desk, name) for name in desk.names]))

    return models


def _model(desk: Desk) -> Endpoint:
    async def model(request: Request) -> Response:
        desk.tenant(request)
        name = request.path_params["model"]
        desk.check_model(name)
        return _json(_object(desk, name))

    return model


async def _alive(request: Request) -> Response:
    return _json(Health(status="ok"))


def _ready(desk: Desk) -> Endpoint:
    async def ready(request: Request) -> Response:
        if desk.service.draining:
            return _json(Health(status="draining"), 503)
        return _json(Health(status="ok"))

    return ready


def _openapi(desk: Desk) -> Endpoint:
    document = msgspec.json.encode(openapi(keys=bool(desk.config.keys)))

    async def described(request: Request) -> Response:
        return Response(document, media_type="application/json")

    return described


def _object(desk: Desk, name: str) -> ModelObject:
    return ModelObject(id=name, created=int(desk.created))


def _refusing(refusal: Refusal, call: Call) -> Response:
    call.outcome = call.outcome or refusal.fault.code or refusal.fault.type
    return Response(refusal.body(), refusal.status, refusal.headers, "application/json")


def _json(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")
