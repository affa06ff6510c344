"""What each decoder layer keeps between its forward and its backward, and where."""
