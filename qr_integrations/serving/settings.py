"""What is served and how much is let in: everything about a server that is not a request."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

from qr_integrations.errors import InputError


class ServerSettings(BaseModel):
    """Which models are served, to whom, and how much of everything is let in.

    Attributes:
        model: the model that ranks, and answers where no `vision_model` is asked for: a bundled name, a folder or a hub
            id.
        vision_model: a second model, for chats with pictures; None: `model` alone.
        model_id, vision_model_id: what clients call them; None: the last part of the name.
        device, dtype, device_map: for loading both, see `Backend.load`.
        method, heads, layout: see `RerankSettings`; ``layout="block"`` finds a known document in any list.
        normalize: the scale of scores: ``"share"`` of the list (from 0 to 1, as clients expect it), ``"sigmoid"``, or
            None for attention as it is, which stands in `qr_score` in any case.
        truncation: what is done about documents that do not fit, see `RerankSettings`.
        max_context_tokens: the longest prompt; longer lists are ranked in several. None is the model's window.
        cache_bytes: memory for keys and values of documents that all requests share; besides it, the two lists used
            last are kept as they stand in their prompts.
        cache_dtype: how they are kept, see `DocumentCache`.
        cache_folder: where they go when that is full; None drops them.
        cache_disk_bytes: of the files there; None sets no limit.
        queue_size: requests that may wait for each model; one more is answered with status 429.
        max_batch: queries over the same documents that go through the model together.
        deadline: seconds after which a request is given up, waiting included.
        grace: seconds for requests that have begun when the server is told to stop.
        api_keys: any of these lets a client in; none lets in everybody who can reach the server.
        allowed_hosts: names that requests may call the server by, besides localhost and addresses, against web pages
            that reach for servers in the browser's own network; ``"*"`` allows all. Empty: no others while `host` is
            this machine's own, else all.
        host, port: where it listens.
        max_body_bytes: of a request.
        max_documents: of a request.
        max_request_tokens: of all documents of a request together, before anything is cut.
        max_new_tokens: the longest answer that may be asked for.
        default_new_tokens: the longest answer where the request does not say.
        max_pictures: of a conversation.
        max_picture_bytes, max_picture_pixels: of each.
        allow_urls: fetch pictures from public http and https addresses.
        picture_timeout: seconds for fetching one.
        log_text: write queries, documents and messages into the log.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: str
    vision_model: str | None = None
    model_id: str | None = None
    vision_model_id: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    device_map: str | None = None
    method: Literal["qrhead", "icr"] = "qrhead"
    heads: str = "auto"
    layout: Literal["joint", "block"] = "joint"
    normalize: Literal["share", "sigmoid"] | None = "share"
    truncation: Literal["head", "chunk", "error"] = "head"
    max_context_tokens: int | None = Field(default=None, ge=1)
    cache_bytes: int = Field(default=2**30, ge=0)
    cache_dtype: Literal["auto", "float32", "float16", "bfloat16", "int8"] = "auto"
    cache_folder: Path | None = None
    cache_disk_bytes: int | None = Field(default=None, ge=0)
    queue_size: int = Field(default=64, ge=1)
    max_batch: int = Field(default=16, ge=1)
    deadline: float = Field(default=120.0, gt=0.0)
    grace: float = Field(default=30.0, ge=0.0)
    api_keys: tuple[SecretStr, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    max_body_bytes: int = Field(default=32 * 2**20, ge=1)
    max_documents: int = Field(default=1000, ge=1)
    max_request_tokens: int = Field(default=500_000, ge=1)
    max_new_tokens: int = Field(default=4096, ge=1)
    default_new_tokens: int = Field(default=256, ge=1)
    max_pictures: int = Field(default=8, ge=0)
    max_picture_bytes: int = Field(default=20 * 2**20, ge=1)
    max_picture_pixels: int = Field(default=25_000_000, ge=1)
    allow_urls: bool = False
    picture_timeout: float = Field(default=10.0, gt=0.0)
    log_text: bool = False

    @model_validator(mode="after")
    def _names_differ(self) -> "ServerSettings":
        if self.vision_model is not None and self.name == self.vision_name:
            raise InputError(f"two models are called {self.name!r}: pass vision_model_id=...")
        if self.cache_disk_bytes is not None and self.cache_folder is None:
            raise InputError("cache_disk_bytes limits a folder: pass cache_folder too")
        if any(not key.get_secret_value().strip() for key in self.api_keys):
            raise InputError("an API key is empty: leave it out, or pass one with letters in it")
        return self

    @property
    def name(self) -> str:
        """What clients call the model that ranks."""
        return self.model_id or _last_part(self.model)

    @property
    def vision_name(self) -> str | None:
        """What clients call the one for pictures."""
        return self.vision_model_id or (self.vision_model and _last_part(self.vision_model))


def _last_part(name: str) -> str:
    """A folder's own name; paths are nobody's business."""
    path = Path(name).expanduser()
    return path.resolve().name if path.exists() else name
