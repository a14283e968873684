"""Faster forms of the network's layers for one kind of processor; π₀ runs, and is right, without them."""
