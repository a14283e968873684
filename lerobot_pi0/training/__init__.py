"""What training adds: random draws, augmentation, averages, optimizers, guards and LoRA."""
