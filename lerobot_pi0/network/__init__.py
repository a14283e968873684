"""π₀ itself: sizes, layers, random weights, flow matching. Plain PyTorch, without LeRobot, files or processors."""
