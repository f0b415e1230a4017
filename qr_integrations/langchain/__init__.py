"""For LangChain: a document compressor, a retriever that answers, a cross-encoder, tools, chats and picture embeddings.

Importing it loads neither torch nor LlamaIndex; a model is loaded when it is first used.
"""

from importlib.util import find_spec

from qr_integrations.errors import MissingExtra

if find_spec("langchain_core") is None:
    raise MissingExtra("qr_integrations.langchain", "langchain")

from qr_integrations.langchain.chat import ChatDeCo, ChatViCrop
from qr_integrations.langchain.cross_encoder import QRCrossEncoder
from qr_integrations.langchain.image_embeddings import MQTEmbeddings
from qr_integrations.langchain.rerank import QRRerank
from qr_integrations.langchain.retriever import QRRetriever
from qr_integrations.langchain.tools import create_qr_rerank_tool, create_qr_retriever_tool

__all__ = [
    "ChatDeCo",
    "ChatViCrop",
    "MQTEmbeddings",
    "QRCrossEncoder",
    "QRRerank",
    "QRRetriever",
    "create_qr_rerank_tool",
    "create_qr_retriever_tool",
]
