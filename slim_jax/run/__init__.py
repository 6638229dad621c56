"""A quantization as a run: calibration activations, blocks one after another, checkpoints, plans."""
