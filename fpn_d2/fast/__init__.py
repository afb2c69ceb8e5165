"""The same results sooner: operations and classes that take the place of plain ones."""
