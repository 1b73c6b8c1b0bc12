"""What run.py can do: each task takes a plain config and a folder, and returns its main number."""
