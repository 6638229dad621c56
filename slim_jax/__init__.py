"""SliM-LLM in JAX: post-training quantization of language models to a mean of 2 or 3 bits."""

from slim_jax.calibrate.pipeline import quantize as quantize
from slim_jax.calibrate.pipeline import quantize_to_checkpoint as quantize_to_checkpoint
from slim_jax.config import SlimConfig as SlimConfig
from slim_jax.eval.perplexity import perplexity as perplexity
from slim_jax.infer.generate import generate as generate
from slim_jax.infer.generate import sample_text as sample_text
from slim_jax.method.sba import load_allocation as load_allocation
from slim_jax.method.sba import save_allocation as save_allocation
from slim_jax.model.config import DecoderConfig as DecoderConfig
from slim_jax.model.decoder import Decoder as Decoder
from slim_jax.modules.quantize import ModuleReport as ModuleReport
from slim_jax.modules.quantize import quantize_module as quantize_module
from slim_jax.report import BlockReport as BlockReport
from slim_jax.report import LayerReport as LayerReport
from slim_jax.report import Report as Report
from slim_jax.rules import Rule as Rule
from slim_jax.store.checkpoint import CheckpointError as CheckpointError
from slim_jax.store.checkpoint import CheckpointSource as CheckpointSource
from slim_jax.store.checkpoint import inspect as inspect
from slim_jax.store.checkpoint import is_checkpoint as is_checkpoint
from slim_jax.store.checkpoint import load as load
from slim_jax.store.checkpoint import save as save
from slim_jax.store.checkpoint import save_source as save_source
