"""Where a detector's lost AP goes."""
