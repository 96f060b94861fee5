"""What every floor may import: configuration, errors, interfaces. Standard library and numpy."""
