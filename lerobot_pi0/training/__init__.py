"""Training: losses, random draws, image augmentation, averages of weights, optimizers, guards against NaN, LoRA."""
