"""The migration as data: variables, steps and properties, from which everything else is derived."""
