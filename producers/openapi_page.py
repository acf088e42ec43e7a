"""GET /openapi.json: the document of all surfaces that describe themselves."""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from producers.http_errors import Json
from producers.openai_openapi import OPENAI_PATHS
from producers.openapi import LIGHTLLM_PATHS, document


async def show(request: Request) -> Response:
    return Json(document(LIGHTLLM_PATHS, OPENAI_PATHS))


router = APIRouter()
router.add_route("/openapi.json", show, methods=["GET"])
