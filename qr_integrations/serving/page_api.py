"""The page at `/`: the files of the folder `page`, what they need to know of the settings, and examples."""

import base64
import json
from collections.abc import Callable
from functools import lru_cache
from hashlib import sha256
from io import BytesIO
from itertools import count, islice
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from qr_integrations.bundled import SAMPLE_SOURCE, read_sample
from qr_integrations.evaluation.drawn_world import held_out_scene, questions_about_first, render, resized
from qr_integrations.serving.settings import ServerSettings

_FOLDER = Path(__file__).parent / "page"
_FILES = {
    "/": ("index.html", "text/html"),
    "/page/page.css": ("page.css", "text/css"),
    "/page/page.js": ("page.js", "text/javascript"),
    "/page/icon.svg": ("icon.svg", "image/svg+xml"),
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Cache-Control": "no-cache",  # kept, and asked for again by its ETag
    "Content-Security-Policy": _POLICY,  # narrower than that of `SecurityHeaders`, which adds the rest
}
_SCENES, _SMALL = 5000, 0.08  # scenes from that number on; the share of the picture that is asked about
_PICTURES = 8
_TOLD = ("max_documents", "max_body_bytes", "max_picture_bytes", "normalize")


def page_routes(settings: ServerSettings) -> APIRouter:
    """The page, its files below ``/page/``, and what it asks for there; all of it can be read without a key."""
    router = APIRouter(include_in_schema=False)
    for path, (name, media_type) in _FILES.items():
        _add(router, path, _always((_FOLDER / name).read_bytes(), media_type))
    about = {name: getattr(settings, name) for name in _TOLD}
    _add(router, "/page/about.json", _always(_json(about), "application/json"))

    def question(number: int, request: Request) -> Response:
        return _response(request, _question(number), "application/json")

    def picture(number: int, request: Request) -> Response:
        return _response(request, _picture(number), "application/json")

    _add(router, "/page/examples/questions/{number}", question)
    _add(router, "/page/examples/pictures/{number}", picture)
    return router


def _add(router: APIRouter, path: str, endpoint: Callable[..., Response]) -> None:
    router.add_api_route(path, endpoint, methods=["GET", "HEAD"], response_model=None)


def _always(content: bytes, media_type: str) -> Callable[[Request], Response]:
    def respond(request: Request) -> Response:
        return _response(request, content, media_type)

    return respond


def _response(request: Request, content: bytes, media_type: str) -> Response:
    """The content, or status 304 where the client has it."""
    tag = f'"{sha256(content).hexdigest()[:20]}"'
    headers = {**_HEADERS, "ETag": tag}
    known = [one.strip().removeprefix("W/") for one in request.headers.get("if-none-match", "").split(",")]
    if tag in known or "*" in known:
        return Response(status_code=304, headers=headers)
    return Response(content, media_type=media_type, headers=headers)


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


# ---- examples


@lru_cache(maxsize=1)
def _questions() -> tuple[bytes, ...]:
    """The questions that ship with ``qr-mini``, ready to be sent."""
    sample = read_sample()
    return tuple(
        _json(
            {
                "query": one.question,
                "documents": [{"title": document.title, "text": document.text} for document in one.documents],
                "of": len(sample),
                "source": SAMPLE_SOURCE,
            }
        )
        for one in sample
    )


def _question(number: int) -> bytes:
    questions = _questions()
    if not 0 <= number < len(questions):
        raise HTTPException(404)
    return questions[number]


@lru_cache(maxsize=_PICTURES)
def _picture(number: int) -> bytes:
    """A drawn scene with something small to read, and the question for it."""
    if not 0 <= number < _PICTURES:
        raise HTTPException(404)
    marked = (n for n in count(_SCENES) if held_out_scene(n).things[0].mark)
    chosen = next(islice(marked, number, None))
    scene = resized(held_out_scene(chosen), 0, _SMALL)
    encoded = BytesIO()
    render(scene).save(encoded, format="PNG")
    asked = questions_about_first(chosen, scene)[0]
    data = base64.b64encode(encoded.getvalue()).decode()
    return _json({"question": asked.text, "picture": f"data:image/png;base64,{data}", "of": _PICTURES})
