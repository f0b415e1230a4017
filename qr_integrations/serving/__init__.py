"""For clients over HTTP: Cohere's, Jina's, TEI's and OpenAI's, on this machine or on many with Ray.

Importing it loads FastAPI, not torch; models are loaded when a server starts.
"""

from importlib.util import find_spec

from qr_integrations.errors import MissingExtra

if any(find_spec(name) is None for name in ("fastapi", "uvicorn", "prometheus_client")):
    raise MissingExtra("qr_integrations.serving", "server")

from qr_integrations.serving.settings import ServerSettings

__all__ = ["ServerSettings"]
