"""How many times as fast as Detectron2's own each part is, row by row."""
