"""What is measured side by side: a function each, which its own process imports by name."""
