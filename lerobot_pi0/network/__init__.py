"""The network of π₀: sizes, layers, random weights, flow matching. Plain PyTorch, without LeRobot or files."""
