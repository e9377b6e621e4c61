"""Documents that are read once and asked about in any order."""

from engine.rag.rag import Rag
from engine.rag.retriever import BM25, Vectors

__all__ = ["BM25", "Rag", "Vectors"]
