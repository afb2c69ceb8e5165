"""Which level of a pyramid objects, proposals and detections belong to."""
