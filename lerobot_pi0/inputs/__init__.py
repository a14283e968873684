"""Inputs of the network, made from LeRobot's batches: observations, processor steps, checks of statistics."""
