"""HTML reports of the verbs, one look for all: elements, charts, and the page around them."""
