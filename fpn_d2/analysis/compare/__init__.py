"""Two detectors beside each other: outputs, size, speed, memory, AP."""
