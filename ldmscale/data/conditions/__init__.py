"""Captions, labels, boxes, maps and embeddings of a sample."""
