"""For Schemathesis: chats ask for models that are there, or hardly any would get past their names."""

from typing import Any

import schemathesis


@schemathesis.hook
def before_load_schema(context: Any, raw_schema: dict[str, Any]) -> None:
    chat = raw_schema["components"]["schemas"]["ChatRequest"]
    chat["properties"]["model"] = {"enum": ["qr-mini", "qr-mini-vl"]}
