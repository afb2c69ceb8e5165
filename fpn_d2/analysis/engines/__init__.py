"""What people deploy with beside our detector: the same weights in other engines, each in a process of its own."""
