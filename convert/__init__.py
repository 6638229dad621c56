"""Readers and writers of other projects' formats (Hugging Face, GGUF, tokenizers), and the command line."""

from convert.errors import ConvertError
from convert.readers.load import load_source
from convert.readers.source import ModelSource
from convert.tokenizer import load_tokenizer, save_tokenizer
from convert.writers.export import export_hf

__all__ = ["ConvertError", "ModelSource", "export_hf", "load_source", "load_tokenizer", "save_tokenizer"]
