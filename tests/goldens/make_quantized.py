"""Creates small quantized weights and what their own libraries decode them to, one `.npz` each.

    /path/to/python-with-torch tests/goldens/make_quantized.py

It needs transformers and compressed-tensors. Each file in `quantized/` holds the stored tensors by name, and
the library's ``decoded``, float32. Created with torch 2.13.0, transformers 5.24.0, compressed-tensors 0.20.1.
"""

from pathlib import Path

import numpy as np
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

OUT = Path(__file__).parent / "quantized"
GROUP = 16


def save(name: str, tensors: dict[str, torch.Tensor], decoded: torch.Tensor) -> None:
    """Writes one case; float8 as its bytes."""
    bits = {k: v.view(torch.uint8) if v.dtype == torch.float8_e4m3fn else v for k, v in tensors.items()}
    arrays = {
        key: value.float().numpy() if value.dtype == torch.bfloat16 else value.numpy()
        for key, value in bits.items()
    }
    np.savez_compressed(OUT / f"{name}.npz", decoded=decoded.float().contiguous().numpy(), **arrays)


def packed(name: str, generator: torch.Generator, **scheme: object) -> None:
    """A linear layer in the format "pack-quantized"."""
    weight = torch.randn(24, 64, generator=generator)
    args = QuantizationArgs(type="int", **scheme)
    groups = weight.reshape(24, -1, GROUP) if scheme["strategy"] == "group" else weight[:, None]
    top = 2 ** scheme["num_bits"] - 1
    low, high = groups.amin(-1), groups.amax(-1)
    state = {"weight": weight, "weight_scale": (high - low) / top}
    if not scheme["symmetric"]:
        state["weight_zero_point"] = (-low / state["weight_scale"] - (top + 1) // 2).round().to(torch.int8)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    quantization = QuantizationScheme(targets=["Linear"], weights=args)
    stored = compressor.compress(state, quantization)
    save(name, stored, compressor.decompress(dict(stored), quantization)["weight"])


def main() -> None:
    """Writes all cases."""
    OUT.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    packed("int4_group", generator, num_bits=4, strategy="group", group_size=GROUP, symmetric=True)
    packed("int4_zero", generator, num_bits=4, strategy="group", group_size=GROUP, symmetric=False)
    packed("int8_channel", generator, num_bits=8, strategy="channel", symmetric=True)
    weight = torch.randn(40, 56, generator=generator).to(torch.float8_e4m3fn)
    for name, scale, block in (
        ("fp8_tensor", torch.tensor(0.0123), None),
        ("fp8_block", torch.rand(3, 4, generator=generator), [16, 16]),
    ):
        decoded = _dequantize_fp8_weight(weight, scale, block, torch.float32)
        save(name, {"weight": weight, "weight_scale_inv": scale}, decoded)
    blocks = torch.randint(0, 256, (2, 6, 3, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(117, 137, (2, 6, 3), generator=generator, dtype=torch.uint8)
    decoded = convert_moe_packed_tensors(blocks, scales)
    save("mxfp4", {"blocks": blocks, "scales": scales}, decoded)


if __name__ == "__main__":
    main()
