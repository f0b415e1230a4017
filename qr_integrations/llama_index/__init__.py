"""For LlamaIndex: a reranker, a retriever that answers, agent tools, models that see pictures, picture embeddings.

Importing it loads neither torch nor LangChain; a model is loaded when it is first used.
"""

from importlib.util import find_spec

from qr_integrations.errors import MissingExtra

if find_spec("llama_index") is None or find_spec("llama_index.core") is None:
    raise MissingExtra("qr_integrations.llama_index", "llama-index")

from qr_integrations.llama_index.image_embedding import MQTImageEmbedding
from qr_integrations.llama_index.multimodal import DeCoLLM, ViCropLLM
from qr_integrations.llama_index.query_engine import QRQueryEngine
from qr_integrations.llama_index.rerank import QRRerank
from qr_integrations.llama_index.retriever import QRRetriever
from qr_integrations.llama_index.tools import QRToolSpec

__all__ = ["DeCoLLM", "MQTImageEmbedding", "QRQueryEngine", "QRRerank", "QRRetriever", "QRToolSpec", "ViCropLLM"]
