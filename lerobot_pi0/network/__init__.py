"""π₀ itself: sizes, layers, flow matching. Plain PyTorch; knows no LeRobot, no files and no processor."""
