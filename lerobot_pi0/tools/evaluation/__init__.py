"""Open-loop evaluation of a policy on recorded episodes: predictions, errors, reactions to its inputs, the report."""
