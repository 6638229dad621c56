"""Model families that can be read and written. A new family is a file here and an entry in ``FAMILIES``."""

from convert.errors import ConvertError
from convert.families import (
    ernie,
    exaone,
    gemma,
    gemma4,
    glm,
    gpt_oss,
    granite,
    hunyuan,
    lfm,
    llama,
    minimax,
    mixtral,
    olmo,
    opt,
    phi,
    qwen,
    qwen_next,
    seed_oss,
    smollm,
    starcoder,
)
from convert.families.family import Family, GGUFFormat, HFFormat, Names

__all__ = ["FAMILIES", "Family", "GGUFFormat", "HFFormat", "Names", "by_architecture", "by_gguf", "by_name"]

FAMILIES: tuple[Family, ...] = (
    llama.FAMILY,
    mixtral.FAMILY,
    qwen.FAMILY,
    gemma.FAMILY,
    phi.FAMILY,
    opt.FAMILY,
    smollm.FAMILY,
    qwen_next.QWEN3_NEXT,
    qwen_next.QWEN3_5,
    gpt_oss.FAMILY,
    gemma4.FAMILY,
    olmo.FAMILY,
    granite.FAMILY,
    lfm.FAMILY,
    glm.GLM,
    glm.GLM_MOE,
    minimax.FAMILY,
    seed_oss.FAMILY,
    ernie.FAMILY,
    exaone.FAMILY,
    starcoder.FAMILY,
    hunyuan.FAMILY,
)


MISSING = {
    "ApertusForCausalLM": "the activation xIELU",
    "Cohere2ForCausalLM": "attention and MLP side by side",
    "DeepseekV3ForCausalLM": "latent attention",
    "GlmMoeDsaForCausalLM": "latent and sparse attention",
    "GraniteMoeHybridForCausalLM": "Mamba 2",
    "NemotronHForCausalLM": "Mamba 2",
}
"""Architectures that are not supported -> what the decoder lacks for them."""

GUIDE = "docs/adding-a-family.md says how to add a family"


def by_architecture(architecture: str) -> Family:
    """Returns the family that serves one of config.json's ``architectures``.

    Raises:
      ConvertError: no family does.
    """
    known = {name: family for family in FAMILIES for name in family.hf.architectures}
    if architecture in MISSING:
        raise ConvertError(
            f"architecture {architecture!r} is not supported, it needs {MISSING[architecture]}"
        )
    if architecture not in known:
        raise ConvertError(
            f"architecture {architecture!r} is not supported, expected one of {', '.join(known)}; {GUIDE}"
        )
    return known[architecture]


def by_gguf(architecture: str) -> GGUFFormat:
    """Returns the GGUF format of the family that serves a GGUF's ``general.architecture``.

    Raises:
      ConvertError: no family does.
    """
    known = {name: f.gguf for f in FAMILIES if f.gguf for name in f.gguf.architectures}
    if architecture not in known:
        raise ConvertError(
            f"general.architecture {architecture!r} is not supported, expected one of {', '.join(known)};"
            f" {GUIDE}"
        )
    return known[architecture]


def by_name(name: str) -> Family:
    """Returns the family that a :class:`DecoderConfig` names.

    Raises:
      ConvertError: the name is not known.
    """
    for family in FAMILIES:
        if family.name == name:
            return family
    raise ConvertError(f"family {name!r} is not known, expected one of {', '.join(f.name for f in FAMILIES)}")
