"""From LeRobot's batch to what the network sees: observations, processor steps, statistics."""
