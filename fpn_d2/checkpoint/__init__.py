"""Weight files, in and out."""
